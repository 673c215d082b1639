"""Bytes come from file to file as they are."""

from __future__ import annotations

import os
from io import FileIO
from pathlib import Path

import pytest

from loraio.errors import FormatError
from loraio.files.copying import PIECE, copy_bytes


@pytest.mark.parametrize("size", [0, 1, PIECE, 2 * PIECE + 99])
def test_bytes_are_copied_piece_by_piece(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "source").write_bytes(b"before" + data + b"after")
    (tmp_path / "target").write_bytes(b"kept" + bytes(size) + b"kept")
    with FileIO(tmp_path / "source") as source, FileIO(tmp_path / "target", "r+") as target:
        copy_bytes(source, 6, target, 4, memoryview(bytearray(size)))
        with pytest.raises(FormatError, match="changed while it was being read"):
            copy_bytes(source, 6 + size, target, 4 + size, memoryview(bytearray(6)))
    assert (tmp_path / "target").read_bytes() == b"kept" + data + b"kept"

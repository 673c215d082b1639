"""Foreign files are recognised by their first bytes; pipes and devices are refused."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from loraio.errors import MissingFileError
from loraio.files.sniffing import LOOKED_AT, open_file, recognised


def test_every_answer_comes_with_what_to_do() -> None:
    for start in (b"PK\x03\x04", b"<html>", b"\x1f\x8b\x08", b"GGUF", b'{"a":1}', bytes(16), b"Not Found"):
        found = recognised(start)
        assert found is not None
        assert all(found)


@pytest.mark.parametrize("start", [b"", b"\x07\x00\x80", bytes(15), b"a\x01b", b"\xc3\xa9", b"   "])
def test_bytes_that_say_nothing_are_nothing(start: bytes) -> None:
    assert recognised(start) is None


def test_a_quoted_line_is_short_and_printable() -> None:
    found = recognised(b"x" * LOOKED_AT)
    assert found is not None
    assert found[0] == f"a text that starts with {'x' * 60!r}"


def test_a_file_is_read_by_its_name_or_a_link(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        with open_file(tmp_path / name) as file:
            assert file.read() == b"abc"


def test_nothing_waits_for_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        with pytest.raises(MissingFileError, match="it is a named pipe") as caught:
            open_file(tmp_path / name)
        assert caught.value.hint is not None
    with pytest.raises(MissingFileError, match="it is a device"):
        open_file(Path("/dev/zero"))
    with pytest.raises(MissingFileError, match="it is a folder"):
        open_file(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        with pytest.raises(MissingFileError, match="cannot be read"):
            open_file(tmp_path / "socket")


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "n" * 300])
def test_a_name_that_no_file_has_is_an_error_of_ours(name: str, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"cannot be read|does not exist"):
        open_file(tmp_path / name)


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    before = len([*Path("/dev/fd").iterdir()])
    for _ in range(20):
        with pytest.raises(MissingFileError):
            open_file(tmp_path)
    assert len([*Path("/dev/fd").iterdir()]) == before

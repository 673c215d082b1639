"""Files of torch.save: which are read so, and what of them is not."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

from loraio.errors import FormatError
from loraio.files.pickles import PICKLE_SUFFIXES, is_saved_by_torch, read_pickle


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("suffix", [*PICKLE_SUFFIXES, ".PT"])
def test_a_name_and_the_first_bytes_make_one(suffix: str, new: bool, tmp_path: Path) -> None:
    path = tmp_path / f"some{suffix}"
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=new)
    assert is_saved_by_torch(path)
    assert read_pickle(path)["w"].equal(torch.ones(2))
    for other in ("some.safetensors", "some", "some.pt.txt"):
        (tmp_path / other).write_bytes(path.read_bytes())
        assert not is_saved_by_torch(tmp_path / other)
    path.write_bytes(b"abc")
    assert not is_saved_by_torch(path)
    assert not is_saved_by_torch(tmp_path / "none.pt")


def test_tied_and_transposed_tensors_are_read(tmp_path: Path) -> None:
    path, values = tmp_path / "some.pt", torch.arange(6.0).view(2, 3)
    torch.save({"a": values, "b": values, "c": values.T}, path)
    read = read_pickle(path)
    assert read["c"].is_contiguous()
    assert read["c"].equal(values.T)


def test_the_directory_of_an_archive_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "some.pt"
    torch.save({f"t{number}": torch.ones(1) for number in range(40)}, path)
    assert len(read_pickle(path)) == 40
    monkeypatch.setenv("LORAIO_LIMITS", "header_bytes=2000")
    with pytest.raises(FormatError, match=r"the archive's directory has [0-9,]+ bytes, at most 2,000"):
        read_pickle(path)


def test_the_pickle_in_an_archive_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "some.pt"
    torch.save({f"{'n' * 400}{number}": torch.ones(1) for number in range(20)}, path)
    with zipfile.ZipFile(path) as archive:
        directory = sum(46 + len(entry.filename) + len(entry.extra) for entry in archive.infolist())
        pickle = max(entry.file_size for entry in archive.infolist() if entry.filename.endswith(".pkl"))
    assert directory < pickle
    monkeypatch.setenv("LORAIO_LIMITS", f"header_bytes={pickle}")
    assert len(read_pickle(path)) == 20
    monkeypatch.setenv("LORAIO_LIMITS", f"header_bytes={pickle - 1}")
    with pytest.raises(FormatError, match="the pickle has"):
        read_pickle(path)

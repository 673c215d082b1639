"""Check that all files of an output appear, or none, and that a mixture is never complete."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from outputs import failing, only, value_in, write

from loraio.errors import OutputError, OutputExistsError
from loraio.files import folders
from loraio.files.folders import staged_folder

NAMES = ("data", "index")


def write_folder(folder: Path, data: str, index: str, **options: Any) -> None:
    with staged_folder(folder, NAMES, last="index", **options) as temporary:
        (temporary / "data").write_text(data)
        (temporary / "index").write_text(index)


def texts(folder: Path) -> dict[str, str]:
    return {entry.name: entry.read_text() for entry in folder.iterdir()}


def test_a_new_folder_appears_whole(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with staged_folder(folder, NAMES, last="index") as temporary:
        for name in NAMES:
            (temporary / name).write_text(name)
        assert not folder.exists()
    assert texts(folder) == {"data": "data", "index": "index"}
    only(tmp_path, "folder")


def test_files_of_a_folder_are_replaced_and_others_stay(tmp_path: Path) -> None:
    write_folder(tmp_path, "1", "1")
    (tmp_path / "other").write_text("mine")
    (tmp_path / "data").chmod(0o640)
    with pytest.raises(OutputExistsError):
        write_folder(tmp_path, "2", "2")
    write_folder(tmp_path, "2", "2", overwrite=True)
    assert texts(tmp_path) == {"data": "2", "index": "2", "other": "mine"}
    assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o640


def test_the_last_file_goes_first_and_comes_last_unless_it_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path, "1", "1")
    seen: list[dict[str, str]] = []
    real = folders.sync_folder

    def spy(path: Path) -> None:
        seen.append({name: text for name, text in texts(tmp_path).items() if name in NAMES})
        real(path)

    def texts(folder: Path) -> dict[str, str]:
        return {entry.name: entry.read_text() for entry in folder.iterdir() if entry.is_file()}

    monkeypatch.setattr(folders, "sync_folder", spy)
    write_folder(tmp_path, "2", "2", overwrite=True)
    assert seen == [{"data": "1"}, {"data": "2"}, {"data": "2", "index": "2"}]
    seen.clear()
    write_folder(tmp_path, "3", "2", overwrite=True)
    assert seen == [{"data": "3", "index": "2"}]


def test_links_in_a_folder_stay_links_also_to_another_filesystem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    for one in (folder, elsewhere):
        one.mkdir()
    for name in NAMES:
        (elsewhere / f"blob-{name}").write_text("1")
        (folder / name).symlink_to(elsewhere / f"blob-{name}")
    write_folder(folder, "2", "2", overwrite=True)
    assert texts(elsewhere) == {"blob-data": "2", "blob-index": "2"}
    with monkeypatch.context() as patch:
        patch.setattr(folders, "_is_beside", lambda *_: False)
        patch.setattr(os, "link", failing("Invalid cross-device link"))
        write_folder(folder, "3", "3", overwrite=True)
    assert texts(elsewhere) == {"blob-data": "3", "blob-index": "3"}
    assert all((folder / name).is_symlink() for name in NAMES)
    only(folder, *NAMES)


def test_a_folder_that_a_dangling_link_names_is_made_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    write_folder(tmp_path / "link", "1", "1")
    assert texts(tmp_path / "folder") == {"data": "1", "index": "1"}
    only(tmp_path, "link", "folder")


def test_a_folder_that_cannot_be_made_is_refused(old: Path) -> None:
    for folder, match in ((old, "is a file"), (old.parent / ("x" * 300), "File name too long")):
        with pytest.raises(OutputError, match=match):
            write_folder(folder, "1", "1", overwrite=True)
    assert value_in(old) == 1.0
    only(old.parent, old.name)


def test_a_filesystem_whose_files_all_have_one_mode_will_do(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refuse)
    write(old, 2.0, overwrite=True)
    write(old.with_name("new"), 3.0)
    assert (value_in(old), value_in(old.with_name("new"))) == (2.0, 3.0)


def test_a_folder_that_appears_in_the_meantime_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with (  # noqa: PT012
        pytest.raises(OutputExistsError, match="appeared while it was being written"),
        staged_folder(folder, NAMES, last="index") as temporary,
    ):
        for name in NAMES:
            (temporary / name).touch()
        write_folder(folder, "1", "1")
    assert texts(folder) == {"data": "1", "index": "1"}
    only(tmp_path, "folder")

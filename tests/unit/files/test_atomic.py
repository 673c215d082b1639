"""Check that files are refused early, written whole or not at all, and never over an input."""

from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from outputs import failing, only, value_in, write

from loraio.errors import OutputError, OutputExistsError
from loraio.files import library
from loraio.files.atomic import staged


def test_a_file_is_made_or_replaced_and_nothing_else_is_left(old: Path) -> None:
    assert value_in(old) == 1.0
    only(old.parent, old.name)
    write(old, 2.0, overwrite=True)
    assert value_in(old) == 2.0
    only(old.parent, old.name)


def test_an_existing_file_is_kept_without_overwrite(old: Path) -> None:
    with pytest.raises(OutputExistsError, match="exists") as caught:
        write(old, 2.0)
    assert "--force" in str(caught.value)
    assert value_in(old) == 1.0
    only(old.parent, old.name)


def test_a_file_that_appears_in_the_meantime_is_kept(path: Path) -> None:
    with pytest.raises(OutputExistsError, match="appeared while it was being written"):
        write(path, 2.0, check=lambda _: write(path, 1.0))
    assert value_in(path) == 1.0
    only(path.parent, path.name)


@pytest.mark.parametrize("appears", [False, True])
def test_filesystems_without_hard_links_keep_a_file_that_appears(
    path: Path, monkeypatch: pytest.MonkeyPatch, appears: bool
) -> None:
    def no_links(*_: Any) -> None:
        if appears:
            path.write_bytes(b"another's")
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(OutputExistsError, match="appeared") if appears else nullcontext():
        write(path)
    assert path.read_bytes() == b"another's" if appears else value_in(path) == 1.0
    only(path.parent, path.name)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_check_that_raises_leaves_no_trace(path: Path, overwrite: bool) -> None:
    def check(written: Path) -> None:
        assert value_in(written) == 2.0
        assert written.parent == path.parent
        raise KeyboardInterrupt

    if overwrite:
        write(path)
    with pytest.raises(KeyboardInterrupt):
        write(path, 2.0, check=check, overwrite=overwrite)
    if overwrite:
        assert value_in(path) == 1.0
    only(path.parent, *[path.name] * overwrite)


def test_the_old_file_is_whole_until_the_new_one_is(old: Path) -> None:
    with staged(old, overwrite=True) as temporary:
        temporary.write_bytes(b"new")
        assert value_in(old) == 1.0
    assert old.read_bytes() == b"new"


@pytest.mark.parametrize(
    ("module", "function"),
    [(os, "replace"), (os, "fsync"), (os, "open"), (os, "chmod"), (library, "serialized")],
)
def test_a_call_that_fails_leaves_the_old_file(
    old: Path, monkeypatch: pytest.MonkeyPatch, module: Any, function: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, function, failing("No space left on device"))
        with pytest.raises(OutputError, match="cannot be written: No space left on device") as caught:
            write(old, 2.0, overwrite=True)
    assert repr(str(old)) in str(caught.value)
    assert value_in(old) == 1.0
    only(old.parent, old.name)


@pytest.mark.parametrize("functions", [("fsync",), ("link", "replace")])
def test_a_system_call_that_fails_leaves_no_new_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, functions: tuple[str, ...]
) -> None:
    with monkeypatch.context() as patch:
        for function in functions:
            patch.setattr(os, function, failing("Input/output error"))
        with pytest.raises(OutputError, match="Input/output error"):
            write(path)
    only(path.parent)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_only_a_failing_disk_makes_the_sync_of_a_folder_an_error(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real = os.fsync

    def files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    with pytest.raises(OutputError, match="Input/output error") if number == errno.EIO else nullcontext() as caught:
        write(path)
    assert caught is None or caught.value.errno == errno.EIO
    assert value_in(path) == 1.0
    only(path.parent, path.name)


def test_the_file_is_synced_before_it_gets_its_name_and_the_folder_after(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[bool, bool]] = []
    real = os.fsync

    def spy(descriptor: int) -> None:
        synced.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), path.exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    write(path)
    assert synced == [(False, False), (True, True)]


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_of_a_new_file_follows_the_umask(
    path: Path, umask: Callable[[int], int], mask: int, mode: int
) -> None:
    umask(mask)
    write(path)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_replaced_file_keeps_its_mode(old: Path, umask: Callable[[int], int]) -> None:
    for mode in (0o640, 0o444, 0o666):
        old.chmod(mode)
        write(old, 2.0, overwrite=True)
        assert stat.S_IMODE(old.stat().st_mode) == mode


def test_a_symbolic_link_stays_and_its_file_is_replaced_only_with_overwrite(old: Path, tmp_path: Path) -> None:
    folder = tmp_path / "links"
    folder.mkdir()
    link = folder / "link"
    link.symlink_to(old)
    with pytest.raises(OutputExistsError):
        write(link, 2.0)
    assert value_in(old) == 1.0
    write(link, 2.0, overwrite=True)
    assert link.is_symlink()
    assert value_in(old) == 2.0
    only(folder, "link")


def test_a_symbolic_link_to_nothing_gets_its_file(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(path)
    write(link)
    assert link.is_symlink()
    assert value_in(path) == 1.0


def test_a_symbolic_link_to_itself_is_refused(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(link)
    with pytest.raises((OutputError, OutputExistsError), match="link"):
        write(link)
    only(tmp_path, "link")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("way", ["itself", "symbolic link", "hard link", "relative"])
def test_an_output_that_is_an_input_is_refused_even_with_overwrite(
    old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool, way: str
) -> None:
    monkeypatch.chdir(tmp_path)
    output = old if way == "itself" else Path(old.name) if way == "relative" else tmp_path / "link"
    if way == "symbolic link":
        output.symlink_to(old)
    elif way == "hard link":
        output.hardlink_to(old)
    with pytest.raises(OutputExistsError, match="is also an input"):
        write(output, 2.0, overwrite=overwrite, inputs=[tmp_path / "missing", old])
    assert value_in(old) == 1.0


def test_a_missing_folder_is_named_with_the_way_to_make_it(tmp_path: Path) -> None:
    path = tmp_path / "no" / "such" / "file"
    with pytest.raises(OutputError, match=r"the folder of .* does not exist") as caught:
        write(path)
    assert f"mkdir -p {str(path.parent)!r}" in str(caught.value)
    only(tmp_path)


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_is_a_folder_is_refused(tmp_path: Path, overwrite: bool) -> None:
    with pytest.raises(OutputError, match="is a folder"):
        write(tmp_path, overwrite=overwrite)


def test_a_folder_that_is_not_writable_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(OutputError, match="is not writable"):
        write(path)
    only(path.parent)


def test_a_file_as_a_folder_is_refused(old: Path) -> None:
    with pytest.raises(OutputError, match=re.escape(repr(str(old / "x")))):
        write(old / "x")


def test_the_longest_names_of_the_system_can_be_written_and_longer_ones_are_refused(tmp_path: Path) -> None:
    for name in ("x" * 255, "é" * 127, "字" * 85, "😀" * 63):
        write(tmp_path / name)
        assert value_in(tmp_path / name) == 1.0
        (tmp_path / name).unlink()
    with pytest.raises(OutputError, match="File name too long"):
        write(tmp_path / ("x" * 300))
    only(tmp_path)


def test_pipes_and_devices_are_named_and_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    read, write_end = os.pipe()
    try:
        # /dev/stdout in a pipeline is like /dev/fd
        for path, kind in (
            (tmp_path / "pipe", "a pipe"),
            (f"/dev/fd/{write_end}", "a pipe"),
            ("/dev/null", "a device"),
        ):
            with pytest.raises(OutputError, match=f"is {kind}, not a plain file"):
                write(Path(path), overwrite=True)
    finally:
        os.close(read)
        os.close(write_end)
    assert (tmp_path / "pipe").is_fifo()
    assert Path("/dev/null").is_char_device()


def test_an_output_that_will_be_an_input_is_refused_before_either_is_there(path: Path) -> None:
    with pytest.raises(OutputExistsError, match="is also an input"):
        write(path, inputs=[path.parent / "." / path.name])
    only(path.parent)


def test_others_cannot_read_the_new_file_while_it_is_written(old: Path) -> None:
    old.chmod(0o640)
    with staged(old, overwrite=True) as temporary:
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o600
    assert stat.S_IMODE(old.stat().st_mode) == 0o640


def test_a_replaced_file_keeps_its_owner_where_the_system_allows_it(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[int, int]] = []
    real = Path.stat

    def others(self: Path, **options: Any) -> Any:
        found = real(self, **options)
        if self == old:
            found = os.stat_result((*found[:4], 12345, 54321, *found[6:]))
        return found

    monkeypatch.setattr(Path, "stat", others)
    monkeypatch.setattr(os, "chown", lambda _, user, group: given.append((user, group)))
    write(old, 2.0, overwrite=True)
    monkeypatch.setattr(os, "chown", failing("Operation not permitted"))
    write(old, 3.0, overwrite=True)
    monkeypatch.undo()
    assert given == [(12345, 54321)]
    assert value_in(old) == 3.0


WRITER = """
import sys
from pathlib import Path
from loraio.files.atomic import staged
from loraio.files.folders import staged_folder

target, text = Path(sys.argv[1]), sys.argv[2] * 100_000
for _ in range(60):
    if target.is_dir():
        with staged_folder(target, ["data", "index"], last="index", overwrite=True) as temporary:
            for name in ("data", "index"):
                (temporary / name).write_text(text)
    else:
        with staged(target, overwrite=True) as temporary:
            temporary.write_text(text)
"""


@pytest.mark.parametrize("what", ["file", "folder"])
def test_of_several_writers_of_one_output_one_wins_whole(tmp_path: Path, what: str) -> None:
    target = tmp_path / "out"
    if what == "folder":
        target.mkdir()
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(target), letter]) for letter in "abc"]
    whole = {letter * 100_000 for letter in "abc"}
    while any(writer.poll() is None for writer in writers):
        if what == "file" and target.exists():
            assert target.read_text() in whole
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    only(tmp_path, "out")
    if what == "folder":
        only(target, "data", "index")
        data, index = ((target / name).read_text() for name in ("data", "index"))
        assert data == index
        assert data in whole

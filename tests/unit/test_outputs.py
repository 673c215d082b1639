"""Files that are written: refused early, whole or not at all, and never one of the inputs."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from loraio import container
from loraio.errors import OutputError, OutputExistsError
from loraio.outputs import staged


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "some.safetensors"


def write(path: Path, value: float = 1.0, **options: Any) -> None:
    container.write({"w": torch.full((3,), value)}, path, document={"a": 1}, **options)


def value_in(path: Path) -> float:
    return float(container.read_tensors(container.read_header(path))["w"][0])


def only(folder: Path, *names: str) -> None:
    """Nothing else lies in the folder."""
    assert sorted(entry.name for entry in folder.iterdir()) == sorted(names)


@pytest.fixture
def old(path: Path) -> Path:
    """A file with the value 1."""
    write(path)
    return path


def test_a_new_file_leaves_nothing_else_behind(old: Path) -> None:
    assert value_in(old) == 1.0
    only(old.parent, old.name)


def test_an_existing_file_is_kept_without_overwrite(old: Path) -> None:
    with pytest.raises(OutputExistsError, match="exists") as caught:
        write(old, 2.0)
    assert "--force" in str(caught.value)
    assert value_in(old) == 1.0
    only(old.parent, old.name)


def test_an_existing_file_is_replaced_with_overwrite(old: Path) -> None:
    write(old, 2.0, overwrite=True)
    assert value_in(old) == 2.0
    only(old.parent, old.name)


def test_a_file_that_appears_in_the_meantime_is_kept(path: Path) -> None:
    with pytest.raises(OutputExistsError, match="appeared while it was being written"):
        write(path, 2.0, check=lambda _: write(path, 1.0))
    assert value_in(path) == 1.0
    only(path.parent, path.name)


def test_a_file_that_appears_is_kept_also_where_hard_links_are_not_to_be_had(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: Any) -> None:
        path.write_bytes(b"another's")
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(OutputExistsError, match="appeared"):
        write(path)
    assert path.read_bytes() == b"another's"
    only(path.parent, path.name)


def test_a_filesystem_without_hard_links_will_do(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", failing("Operation not permitted"))
    write(path)
    assert value_in(path) == 1.0
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


def failing(message: str) -> Callable[..., None]:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, message)

    return fail


@pytest.mark.parametrize("function", ["replace", "fsync", "open", "chmod"])
def test_a_system_call_that_fails_leaves_the_old_file(
    old: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, function, failing("No space left on device"))
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


def test_a_disk_that_is_full_leaves_the_old_file(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(container, "tensor_sha256", lambda _: "0" * 64)  # so that the header is written by then
        patch.setattr(container, "tensor_bytes", failing("No space left on device"))
        with pytest.raises(OutputError, match="No space left"):
            write(old, 2.0, overwrite=True)
    assert value_in(old) == 1.0
    only(old.parent, old.name)


def test_a_folder_that_cannot_be_synced_does_no_harm(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    write(path)
    assert value_in(path) == 1.0


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
def umask() -> Iterator[Callable[[int], None]]:
    before = os.umask(0o022)
    yield lambda mask: void(os.umask(mask))
    os.umask(before)


def void(_: object) -> None:
    """Drops a result."""


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_of_a_new_file_follows_the_umask(
    path: Path, umask: Callable[[int], None], mask: int, mode: int
) -> None:
    umask(mask)
    write(path)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_replaced_file_keeps_its_mode(old: Path, umask: Callable[[int], None]) -> None:
    for mode in (0o640, 0o444, 0o666):
        old.chmod(mode)
        write(old, 2.0, overwrite=True)
        assert stat.S_IMODE(old.stat().st_mode) == mode


def test_a_symbolic_link_stays_and_its_file_is_replaced(old: Path, tmp_path: Path) -> None:
    folder = tmp_path / "links"
    folder.mkdir()
    link = folder / "link"
    link.symlink_to(old)
    write(link, 2.0, overwrite=True)
    assert link.is_symlink()
    assert value_in(old) == 2.0
    only(folder, "link")


def test_a_symbolic_link_to_an_existing_file_is_not_overwritten_unasked(old: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(old)
    with pytest.raises(OutputExistsError):
        write(link, 2.0)
    assert value_in(old) == 1.0


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


def test_an_input_beside_the_output_does_no_harm(old: Path, tmp_path: Path) -> None:
    write(tmp_path / "new", 2.0, inputs=[old])
    assert value_in(tmp_path / "new") == 2.0


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


def test_a_device_or_pipe_is_never_replaced_by_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OutputError, match="not a plain file"):
        write(pipe, overwrite=True)
    assert pipe.is_fifo()


def test_a_folder_that_is_not_writable_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(OutputError, match="is not writable"):
        write(path)
    only(path.parent)


def test_a_file_as_a_folder_is_refused(old: Path) -> None:
    with pytest.raises(OutputError, match=re.escape(repr(str(old / "x")))):
        write(old / "x")


def test_an_output_name_too_long_for_the_system_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="File name too long"):
        write(tmp_path / ("x" * 300))
    only(tmp_path)


def test_the_longest_names_that_the_system_takes_can_be_written(tmp_path: Path) -> None:
    for name in ("x" * 255, "é" * 127, "字" * 85, "😀" * 63):
        write(tmp_path / name)
        assert value_in(tmp_path / name) == 1.0

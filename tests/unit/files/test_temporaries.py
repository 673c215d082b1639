"""Hidden temporaries: unique, held while their owner lives, and removed by the next one when it does not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from loraio.files import temporaries
from loraio.files.atomic import staged
from loraio.files.temporaries import owned_file, owned_folder, remove_stale

OWNER = """
import sys, time
from pathlib import Path
from loraio.files.temporaries import owned_file, owned_folder

with {function}(Path(sys.argv[1])) as path:
    if path.is_dir():
        (path / "inside").write_text("x")
    print(path, flush=True)
    time.sleep(600)
"""


def owner(target: Path, function: str) -> tuple[subprocess.Popen[str], Path]:
    """A process that has a temporary, and what that is."""
    command = [sys.executable, "-c", OWNER.replace("{function}", function), str(target)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


@pytest.mark.parametrize("function", ["owned_file", "owned_folder"])
def test_what_a_killed_process_left_is_removed_and_what_a_living_one_has_is_not(tmp_path: Path, function: str) -> None:
    target = tmp_path / "out"
    process, path = owner(target, function)
    try:
        assert path.parent == tmp_path
        with staged(target) as temporary:
            temporary.write_bytes(b"new")
        assert path.exists()
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert path.exists()
    remove_stale(tmp_path, ["other", "ou"])
    assert path.exists()  # another output's
    with staged(target, overwrite=True) as temporary:
        temporary.write_bytes(b"newer")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert target.read_bytes() == b"newer"


def test_no_file_of_another_name_or_of_a_user_is_removed(tmp_path: Path) -> None:
    names = [".out.tmp", ".out.1-abc.tmp", ".out.12-0123456g.tmp", "out.12-01234567.tmp", ".out.x.12-01234567.tmp"]
    for name in names:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".out.12-01234567.tmp").symlink_to(tmp_path / names[0])
    remove_stale(tmp_path, ["out"])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([*names, ".out.12-01234567.tmp"])


def test_a_name_of_any_length_and_with_any_characters_is_found_again(tmp_path: Path) -> None:
    for name in ("x" * 255, "é" * 127, "a\nb", ".hidden", "[*].(x)"):
        with owned_file(tmp_path / name) as path:
            left = path.with_name(f"{path.name[:-5]}{'01'[path.name[-5] == '0']}.tmp")
            left.touch()
            remove_stale(tmp_path, [name])
            assert path.exists()
            assert not left.exists()
        assert not list(tmp_path.iterdir())


def test_one_that_is_taken_for_stale_before_it_is_held_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, made = temporaries._lock, []

    def late(descriptor: int, *, wait: bool = False) -> bool:
        if not made:
            made.append(os.listdir(tmp_path))  # noqa: PTH208
            with monkeypatch.context() as patch:
                patch.setattr(temporaries, "_lock", real)
                remove_stale(tmp_path, ["out"])
        return real(descriptor, wait=wait)

    monkeypatch.setattr(temporaries, "_lock", late)
    with owned_file(tmp_path / "out") as path:
        assert [[path.name]] != made
        assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_where_there_are_no_locks_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(temporaries.fcntl, "flock", refuse)
    left = tmp_path / ".out.12-01234567.tmp"
    left.touch()
    with staged(tmp_path / "out") as temporary:
        temporary.write_bytes(b"new")
    assert left.exists()
    assert (tmp_path / "out").read_bytes() == b"new"


def test_a_folder_is_removed_with_what_is_in_it_unless_it_has_got_another_name(tmp_path: Path) -> None:
    with owned_folder(tmp_path / "out") as path:
        (path / "sub").mkdir()
        (path / "sub/file").touch()
    assert not list(tmp_path.iterdir())
    with owned_folder(tmp_path / "out") as path:
        (path / "file").touch()
        path.rename(tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]

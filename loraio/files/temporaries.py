"""Hidden temporary files and folders beside an output, each held by its owner; those that nobody holds are removed.

A killed process leaves the file that it was writing. So that another one can remove it, the owner of a temporary
holds a lock on it (flock), which the system releases when the process ends, however it ends. A temporary that can be
locked has no owner. On systems without such locks nothing is removed.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on this system
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def owned_file(target: Path) -> Iterator[Path]:
    """Yield a new empty file beside ``target``, and remove it at the end if it still has its name.

    Its mode is what the umask gives.

    Raises:
        OSError: the system refuses it.
    """
    with _owned(target, _new_file) as path:
        yield path


@contextlib.contextmanager
def owned_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder as `owned_file` does a file, and remove it with its contents."""
    with _owned(target, _new_folder) as path:
        yield path


def remove_stale(folder: Path, names: Iterable[str]) -> None:
    """Remove the temporaries of outputs of these names whose owners have ended without doing so."""
    if fcntl is None:
        return
    starts = {_start(name) for name in names}
    with contextlib.suppress(OSError):
        for entry in os.listdir(folder):  # noqa: PTH208  # of thousands of names most are no candidates
            match = _NAME.fullmatch(entry)
            if match and match["start"] in starts:
                _remove_unowned(os.path.join(folder, entry))  # noqa: PTH118


def lock(path: str | os.PathLike[str], *, wait: bool = False) -> int:
    """Lock a file or folder until the descriptor that is returned is closed, or the process ends.

    On filesystems without locks the descriptor is returned too.

    Raises:
        BlockingIOError: somebody else has it, and ``wait`` is false.
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _lock(descriptor, wait=wait)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _lock(descriptor: int, *, wait: bool = False) -> bool:
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:  # some filesystems, and folders on NFS, have none
        return False
    return True


def _start(name: str) -> str:
    # A part of the name only: a file name has 255 bytes at most, and a character up to four.
    return f".{name[:40]}"


_NAME = re.compile(r"(?P<start>\..{1,40})\.\d+-[0-9a-f]{8}\.tmp", re.DOTALL)


def _new_file(path: str) -> int:
    return os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)


def _new_folder(path: str) -> int | None:
    os.mkdir(path)  # noqa: PTH102
    with contextlib.suppress(FileNotFoundError):  # somebody took it for stale before it could be locked
        return os.open(path, os.O_RDONLY)
    return None


@contextlib.contextmanager
def _owned(target: Path, make: Callable[[str], int | None]) -> Iterator[Path]:
    owned = False
    while not owned:
        path = f"{os.fspath(target.with_name(_start(target.name)))}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
        descriptor = None
        try:
            descriptor = make(path)
            owned = descriptor is not None and _own(descriptor, path)
            if owned:
                yield Path(path)
        finally:
            # Python looks for signals after a call into C: none comes between the end of the block and the removal.
            try:
                os.unlink(path)  # noqa: PTH108
            except FileNotFoundError:  # it has got its name
                pass
            except OSError:
                _remove(path)
            if descriptor is not None:
                os.close(descriptor)


def _own(descriptor: int, path: str) -> bool:
    """Lock what was just made; false where somebody took it for stale in the moment between."""
    try:
        _lock(descriptor)
        return os.path.samestat(os.fstat(descriptor), os.stat(path))  # noqa: PTH116
    except (BlockingIOError, FileNotFoundError):
        return False


def _remove_unowned(path: str) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if not _lock(descriptor):
                return
            _remove(path)
        finally:
            os.close(descriptor)


def _remove(path: str) -> None:
    """Remove a file or a folder, as far as the system allows it."""
    if not os.path.isdir(path):  # noqa: PTH112
        with contextlib.suppress(OSError):
            os.unlink(path)  # noqa: PTH108
        return
    try:
        shutil.rmtree(path, ignore_errors=True)
    except BaseException:  # a signal
        shutil.rmtree(path, ignore_errors=True)
        raise

"""Write files atomically: refuse bad outputs early, write beside the place, and rename only what is whole."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from loraio.errors import LoraioError, OutputError, OutputExistsError
from loraio.files.temporaries import owned_file, remove_stale


def check_output(
    path: str | os.PathLike[str], *, overwrite: bool = False, inputs: Iterable[str | os.PathLike[str]] = ()
) -> Path:
    """Refuse an output that could not or must not be written, before any work is done.

    Returns:
        the file that will be written: ``path`` with symbolic links followed.

    Raises:
        OutputExistsError: it exists and ``overwrite`` is false, or it is one of ``inputs`` or a hard link to one.
        OutputError: its folder is missing or not writable, or it is something else than a file, such as a folder.
    """
    target = Path(os.path.realpath(path))
    name = f"{os.fspath(path)!r}"
    with system_errors(name):
        mode = mode_of(path)  # of what the system finds there: /dev/stdout is a link that leads to no path
        if (mode is not None and stat.S_ISDIR(mode)) or os.fspath(path).endswith(os.sep):
            raise OutputError(f"{name} is a folder", hint="name a file")
        for source in inputs:
            if _is_same(target, source):
                raise OutputExistsError(f"{name} is also an input", hint="name another output")
        if mode is not None and not stat.S_ISREG(mode):  # a rename would put a plain file in the place of /dev/null
            raise OutputError(f"{name} is {_kind(mode)}, not a plain file", hint="name a file")
        if mode is not None and not overwrite:
            raise OutputExistsError(f"{name} exists", hint="pass --force to replace it (overwrite=True in Python)")
        if not target.parent.is_dir():
            raise OutputError(f"the folder of {name} does not exist", hint=f"mkdir -p {str(target.parent)!r}")
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise OutputError(f"the folder of {name} is not writable")
    return target


@contextlib.contextmanager
def staged(
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    inputs: Iterable[str | os.PathLike[str]] = (),
    tidy: bool = True,
) -> Iterator[Path]:
    """Yield a temporary file that replaces ``path`` if the block succeeds, and is removed if it fails.

    At every moment ``path`` is the whole old file or the whole new one. The new file is flushed to the disk before it
    gets its name. It takes mode and owner of the file that it replaces, as far as the system allows, or else what the
    umask gives. A symbolic link stays a link. Without ``overwrite``, a file that appears in the meantime stays too. A
    killed process leaves its temporary file; the next one that writes ``path`` removes it.

    Args:
        path: the file to make.
        overwrite, inputs: as `check_output`.
        tidy: remove temporary files that killed processes left.

    Raises:
        OutputExistsError, OutputError: as `check_output`, and when the system refuses a write.
    """
    target = check_output(path, overwrite=overwrite, inputs=inputs)
    if tidy:
        remove_stale(target.parent, [target.name])
    name = f"{os.fspath(path)!r}"
    with system_errors(name, target.parent):
        with owned_file(target) as temporary:
            mode = _withhold(temporary, target)
            yield temporary
            _give_mode(temporary, target, mode)
            fsync(temporary)
            _give_name(temporary, target, name, overwrite=overwrite)
        sync_folder(target.parent)


EARLY = 1 << 26
"""Bytes from which on a file is flushed while it is written."""

PAUSE = 0.1
"""Seconds between two flushes."""


@contextlib.contextmanager
def flushed_early(path: Path, size: int) -> Iterator[None]:
    """Flush a large file to the disk while the block writes it, so that the last flush is short.

    Args:
        path: the file.
        size: bytes that it will have.

    Raises:
        OSError: the disk refuses a write. The system reports that only once, so it must not be lost.
    """
    if size < EARLY or not hasattr(os, "fdatasync"):
        yield
        return
    ended, failures = threading.Event(), []
    descriptor = os.open(path, os.O_RDONLY)

    def flush() -> None:
        try:
            while not ended.wait(PAUSE):
                os.fdatasync(descriptor)
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=flush, name="flush")
    try:
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
    finally:
        os.close(descriptor)
    if failures:
        raise failures[0]


_HINTS = {
    errno.ENOSPC: "free some room, or name an output on another filesystem",
    errno.EDQUOT: "free some of your quota, or name an output on another filesystem",
    errno.EROFS: "name an output on a filesystem that can be written to",
}


@contextlib.contextmanager
def system_errors(name: str, folder: Path | None = None) -> Iterator[None]:
    """Turn errors of the operating system into an `OutputError` for the output of that name."""
    try:
        yield
    except LoraioError:
        raise
    except OSError as error:
        gone = error.errno == errno.ENOENT and folder is not None and not folder.is_dir()
        raise output_error(f"{name} cannot be written", error, "its folder has gone" if gone else None) from error


def output_error(what: str, error: OSError, reason: str | None = None) -> OutputError:
    found = OutputError(f"{what}: {reason or error.strerror or error}", hint=_HINTS.get(error.errno or 0))
    found.errno = error.errno
    return found


def mode_of(path: str | os.PathLike[str]) -> int | None:
    """Return type and mode of the file at a path; None if there is none."""
    try:
        return Path(path).stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def _is_same(target: Path, source: str | os.PathLike[str]) -> bool:
    """Return True if writing the target would overwrite the source, which may not exist yet."""
    if target.exists() and Path(source).exists():
        return target.samefile(source)
    return target == Path(os.path.realpath(source))


def _kind(mode: int) -> str:
    return "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"


def _withhold(temporary: Path, target: Path) -> int:
    """Return the temporary file's mode, and hide it from everyone who may not read the file that it replaces."""
    mode = stat.S_IMODE(temporary.stat().st_mode)
    if target.exists():
        with contextlib.suppress(PermissionError):  # a filesystem whose files all have one mode
            temporary.chmod(0o600)
    return mode


def _give_mode(temporary: Path, target: Path, mode: int) -> None:
    """Set mode and owner of the file that is replaced; where there is none, the given mode."""
    own = temporary.stat()
    with contextlib.suppress(FileNotFoundError):
        found = target.stat()
        mode = stat.S_IMODE(found.st_mode)
        if (own.st_uid, own.st_gid) != (found.st_uid, found.st_gid):
            with contextlib.suppress(OSError):  # only root may give files away
                os.chown(temporary, found.st_uid, found.st_gid)
    if stat.S_IMODE(temporary.stat().st_mode) != mode:
        temporary.chmod(mode)


def _give_name(temporary: Path, target: Path, name: str, *, overwrite: bool) -> None:
    if overwrite:
        temporary.replace(target)
        return
    try:
        os.link(temporary, target)  # unlike rename, fails when the name is taken
    except FileExistsError:
        raise OutputExistsError(f"{name} appeared while it was being written") from None
    except OSError:  # a filesystem without hard links
        if target.exists():
            raise OutputExistsError(f"{name} appeared while it was being written") from None
        temporary.replace(target)


def sync_folder(path: Path) -> None:
    """Flush the names in a folder, where the filesystem can."""
    try:
        fsync(path)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Files that are written: refused early, written beside their place, and named only when they are whole."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path

from loraio.errors import LoraioError, OutputError, OutputExistsError


def check_output(
    path: str | os.PathLike[str], *, overwrite: bool = False, inputs: Iterable[str | os.PathLike[str]] = ()
) -> Path:
    """Refuse an output that could not or must not be written, before any work is done.

    Returns:
        the file that will be written: ``path`` with symbolic links followed.

    Raises:
        OutputExistsError: it exists and ``overwrite`` is false, or it is one of ``inputs``.
        OutputError: its folder is missing or not writable, or it is something else than a file, such as a folder.
    """
    target = Path(os.path.realpath(path))
    name = f"{os.fspath(path)!r}"
    with _system_errors(name):
        if target.is_dir() or os.fspath(path).endswith(os.sep):
            raise OutputError(f"{name} is a folder", hint="name a file")
        for source in inputs:
            if target.exists() and Path(source).exists() and target.samefile(source):
                raise OutputExistsError(f"{name} is also an input", hint="name another output")
        if target.exists() and not target.is_file():  # a rename would put a plain file in the place of /dev/null
            raise OutputError(f"{name} is not a plain file", hint="name a file")
        if target.exists() and not overwrite:
            raise OutputExistsError(f"{name} exists", hint="pass --force to replace it (overwrite=True in Python)")
        if not target.parent.is_dir():
            raise OutputError(f"the folder of {name} does not exist", hint=f"mkdir -p {str(target.parent)!r}")
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise OutputError(f"the folder of {name} is not writable")
    return target


@contextlib.contextmanager
def staged(
    path: str | os.PathLike[str], *, overwrite: bool = False, inputs: Iterable[str | os.PathLike[str]] = ()
) -> Iterator[Path]:
    """A temporary file beside ``path`` that gets its name when the block ends well, and is removed when it does not.

    At every moment ``path`` is the old file, whole, or the new one, whole. The file is flushed to the disk first;
    the mode is that of the file replaced, else what the umask gives; a symbolic link stays a link. Without
    ``overwrite`` a file that appears in the meantime is not replaced either.

    Raises:
        OutputExistsError, OutputError: as `check_output`, and when the system refuses a write.
    """
    target = check_output(path, overwrite=overwrite, inputs=inputs)
    # A part of the name only: a file name has 255 bytes at most, and a character up to four.
    temporary = target.with_name(f".{target.name[:40]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    name = f"{os.fspath(path)!r}"
    try:
        with _system_errors(name):
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            yield temporary
            _fsync(temporary)
            if target.exists():
                temporary.chmod(target.stat().st_mode & 0o7777)
            if overwrite:
                temporary.replace(target)
            else:
                _rename_unless_exists(temporary, target, name)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    _sync_folder(target.parent)


PIECE = 1 << 20
"""Bytes that pass through memory at once where the system cannot copy from file to file."""

_CANNOT = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.ENOTSOCK}


def copy_range(source: FileIO, begin: int, target: FileIO, place: int, count: int) -> int:
    """Copy bytes from file to file, by the system itself where it can: ``copy_file_range``, else ``sendfile``.

    Some pairs of filesystems can do neither; then the bytes pass through memory.

    Args:
        source: an unbuffered file.
        begin: of the bytes in it.
        target: another one.
        place: where they go.
        count: how many.

    Returns:
        how many were copied: fewer than asked for only where the source ends.
    """
    done = 0
    for way in (_copy_file_range, _sendfile, _by_memory):
        try:
            while done < count:
                copied = way(source, begin + done, target, place + done, count - done)
                if not copied:  # the end of the source; or one of those files of which the system copies nothing
                    break
                done += copied
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
        if done == count:
            break
    return done


def _copy_file_range(source: FileIO, begin: int, target: FileIO, place: int, count: int) -> int:
    if not hasattr(os, "copy_file_range"):
        return 0
    return os.copy_file_range(source.fileno(), target.fileno(), count, begin, place)


def _sendfile(source: FileIO, begin: int, target: FileIO, place: int, count: int) -> int:
    if not hasattr(os, "sendfile"):
        return 0
    target.seek(place)
    return os.sendfile(target.fileno(), source.fileno(), begin, count)


def _by_memory(source: FileIO, begin: int, target: FileIO, place: int, count: int) -> int:
    source.seek(begin)
    piece = source.read(min(count, PIECE))
    target.seek(place)
    write_all(target, memoryview(piece))
    return len(piece)


def write_all(target: FileIO, data: memoryview) -> None:
    """Write all of it to an unbuffered file, whose ``write`` may take less than it is given."""
    while len(data):
        data = data[target.write(data) :]


@contextlib.contextmanager
def working_folder(output: Path) -> Iterator[Path]:
    """A hidden folder beside an output of several files, for those that are finished before all of them are.

    It outlives a process that is killed, so that another one can go on from it; it is for the caller to look whether
    what is in it belongs to the same work. One process at a time has it.

    Raises:
        OutputError: another process has it, it is a link, or the system refuses it.
    """
    short = output.name
    if len(short) > 40:  # see `staged`
        short = f"{short[:40]}-{hashlib.sha256(os.fsencode(short)).hexdigest()[:8]}"
    folder = output.parent / f".{short}.merging"
    name = f"{os.fspath(output)!r}"
    with _system_errors(name):
        if folder.is_symlink():  # what is in it may be removed
            raise OutputError(f"{str(folder)!r} is a link", hint="remove it")
        folder.mkdir(exist_ok=True)
        with _held(folder, name):
            yield folder


def remove_folder(folder: Path) -> None:
    """Remove a working folder and what is in it."""
    shutil.rmtree(folder, ignore_errors=True)


def name_folder(folder: Path, target: Path) -> None:
    """Give a finished folder its name, which no folder with files may have."""
    with _system_errors(f"{os.fspath(target)!r}"):
        _sync_folder(folder)
        folder.rename(target)
        _sync_folder(target.parent)


def move_files(folder: Path, target: Path, names: Iterable[str], *, last: str) -> None:
    """Move finished files into a folder that is there already, in the place of files of their names.

    ``last`` is moved last, and its predecessor goes first: without it nobody takes the others for a whole.
    """
    with _system_errors(f"{os.fspath(target / last)!r}"):
        (target / last).unlink(missing_ok=True)
        _sync_folder(target)
        for name in names:
            (folder / name).replace(target / name)
        _sync_folder(target)
        (folder / last).replace(target / last)
        _sync_folder(target)


@contextlib.contextmanager
def _held(folder: Path, name: str) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{name} is being written by another process", where=f"{str(folder)!r}") from None
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _system_errors(name: str) -> Iterator[None]:
    """Turn what the operating system refuses into an `OutputError` for the output of that name."""
    try:
        yield
    except LoraioError:
        raise
    except OSError as error:
        raise OutputError(f"{name} cannot be written: {error.strerror or error}") from error


def _sync_folder(path: Path) -> None:
    with contextlib.suppress(OSError):  # the files are whole under their names; not every filesystem can do this
        _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename_unless_exists(temporary: Path, target: Path, name: str) -> None:
    try:
        os.link(temporary, target)  # unlike rename, fails when the name is taken
    except FileExistsError:
        raise OutputExistsError(f"{name} appeared while it was being written") from None
    except OSError:  # a filesystem without hard links
        if target.exists():
            raise OutputExistsError(f"{name} appeared while it was being written") from None
        temporary.replace(target)

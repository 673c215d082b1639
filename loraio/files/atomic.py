"""Files that are written: refused early, written beside their place, and named only when they are whole."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import filecmp
import hashlib
import os
import shutil
import stat
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from io import FileIO
from pathlib import Path

from loraio.errors import LoraioError, OutputError, OutputExistsError
from loraio.files.temporaries import lock, owned_file, owned_folder, remove_stale


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
    with _system_errors(name):
        mode = _mode_of(path)  # of what the system finds there: /dev/stdout is a link that leads to no path
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
    """A temporary file beside ``path`` that gets its name when the block ends well, and is removed when it does not.

    At every moment ``path`` is the old file, whole, or the new one, whole. The file is flushed to the disk first; mode
    and owner are those of the file replaced, as far as the system allows it, else what the umask gives; a symbolic link
    stays a link. Without ``overwrite`` a file that appears in the meantime is not replaced either. A process that is
    killed leaves the temporary file, which the next one that writes ``path`` removes.

    Args:
        path: the file to make.
        overwrite, inputs: as `check_output`.
        tidy: whether to look for temporary files that were left.

    Raises:
        OutputExistsError, OutputError: as `check_output`, and when the system refuses a write.
    """
    target = check_output(path, overwrite=overwrite, inputs=inputs)
    if tidy:
        remove_stale(target.parent, [target.name])
    name = f"{os.fspath(path)!r}"
    with _system_errors(name, target.parent):
        with owned_file(target) as temporary:
            mode = _withhold(temporary, target)
            yield temporary
            _give_mode(temporary, target, mode)
            _fsync(temporary)
            _give_name(temporary, target, name, overwrite=overwrite)
        _sync_folder(target.parent)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, where they are not there.

    Raises:
        OutputError: the system refuses it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _output_error(f"the folder {os.fspath(folder)!r} cannot be made", error) from error


@contextlib.contextmanager
def staged_folder(
    folder: str | os.PathLike[str],
    names: Iterable[str],
    *,
    last: str,
    overwrite: bool = False,
    inputs: Iterable[str | os.PathLike[str]] = (),
) -> Iterator[Path]:
    """A temporary folder for files that belong together, which get their places when the block ends well.

    A folder that is not there yet appears with all of them in it. In one that is there they take the places
    of files of their names as in `move_files`.

    Args:
        folder: it is made where it is not there; its parent must be.
        names: of all files; the block writes each.
        last: the one without which nobody takes the others for a whole.
        overwrite, inputs: as `check_output`, for each file.

    Raises:
        OutputExistsError, OutputError: as `staged`.
    """
    names, name = list(names), f"{os.fspath(folder)!r}"
    with _system_errors(name):
        mode = _mode_of(folder)
    there = mode is not None and stat.S_ISDIR(mode)
    if there:
        into = Path(folder)
        for one in names:
            check_output(into / one, overwrite=overwrite, inputs=inputs)
        place = into / last  # the temporary folder is inside: nothing else is sure to be on its filesystem
    elif mode is not None:
        raise OutputError(f"{name} is a file", hint="name a folder")
    else:
        place = into = check_output(os.fspath(folder).rstrip(os.sep), inputs=inputs)
    remove_stale(place.parent, [place.name])
    with _system_errors(name, place.parent), owned_folder(place) as temporary:
        with _named(temporary, into):
            yield temporary
        if there:
            move_files(temporary, into, names, last=last, overwrite=overwrite)
        else:
            for one in names:
                _fsync(temporary / one)
            name_folder(temporary, into)


PIECE = 1 << 18
"""Bytes that pass through memory at once: more of them, written in one call, take the system much longer for each."""

PAGE = 4096
"""What the system keeps of a file in memory comes in pieces of so many bytes, or of a multiple."""

_CANNOT = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.ENOTSOCK}


def copy_range(
    source: FileIO, begin: int, target: FileIO, place: int, count: int, *, room: memoryview | None = None
) -> int:
    """Copy bytes from file to file, by the system itself where it can: ``copy_file_range``, else ``sendfile``.

    Some pairs of filesystems can do neither; then the bytes pass through memory. They also do where somebody has memory
    to spare and every page would have to be put together of two: that takes the system longer than both ways.

    Args:
        source: an unbuffered file.
        begin: of the bytes in it.
        target: another one.
        place: where they go.
        count: how many.
        room: memory that may be written over.

    Returns:
        how many were copied: fewer than asked for only where the source ends.
    """
    piece = room[:PIECE] if room is not None else memoryview(bytearray(min(count, PIECE)))

    def by_memory(source: FileIO, begin: int, target: FileIO, place: int, count: int) -> int:
        source.seek(begin)
        read = source.readinto(piece[:count]) or 0
        target.seek(place)
        write_all(target, piece[:read])
        return read

    done, apart = 0, room is not None and (place - begin) % PAGE != 0
    for way in (_copy_file_range, _sendfile, by_memory)[2 * apart :]:
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


def reserve(file: FileIO, size: int) -> None:
    """Make a file so long, and have the system set the space for it aside, where it can.

    To fill what is set aside takes the system less than to find the space block by block, and a disk without the room
    says so before anything is written.

    Raises:
        OSError: the system refuses it.
    """
    file.truncate(size)
    while _fallocate is not None and _fallocate(file.fileno(), 0, 0, size):
        code = ctypes.get_errno()
        if code in _CANNOT:
            return
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def _found_fallocate() -> Callable[[int, int, int, int], int] | None:
    """The system's own: ``os.posix_fallocate`` writes to every block where there is none."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None, use_errno=True)
    function = getattr(library, "fallocate64", None) or getattr(library, "fallocate", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return function


_fallocate = _found_fallocate()

EARLY = 1 << 26
"""Files from so many bytes on are flushed while they are written."""

PAUSE = 0.1
"""Seconds between two flushes."""


@contextlib.contextmanager
def flushed_early(path: Path, size: int) -> Iterator[None]:
    """While the block writes a large file, let the system put on the disk what is in it, so that less is left to wait
    for in the end.

    Args:
        path: the file.
        size: what it will have.

    Raises:
        OSError: the disk refuses it. The system tells it once, and not to those who open the file later.
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


def write_all(target: FileIO, data: memoryview) -> None:
    """Write all of it to an unbuffered file, whose ``write`` may take less than it is given."""
    while len(data):
        data = data[target.write(data) :]


@contextlib.contextmanager
def working_folder(output: Path) -> Iterator[Path]:
    """A hidden folder beside an output of several files, for those that are finished before all of them are.

    It outlives a process that is killed, so that another one can go on from it; it is for the caller to look whether
    what is in it belongs to the same work. One process at a time has it. It does not stay when there is nothing in it.

    Raises:
        OutputError: another process has it, it is a link, or the system refuses it.
    """
    short = output.name
    if len(short) > 40:  # a file name has 255 bytes at most
        short = f"{short[:40]}-{hashlib.sha256(os.fsencode(short)).hexdigest()[:8]}"
    folder = output.parent / f".{short}.merging"
    name = f"{os.fspath(output)!r}"
    with _system_errors(name, output.parent):
        if folder.is_symlink():  # what is in it may be removed
            raise OutputError(f"{str(folder)!r} is a link", hint="remove it")
        try:
            descriptor = _lock_folder(folder)
        except BlockingIOError:
            raise OutputError(f"{name} is being written by another process", where=f"{str(folder)!r}") from None
        try:
            with _named(folder, output):
                yield folder
        finally:
            with contextlib.suppress(OSError):  # there is something in it
                folder.rmdir()
            os.close(descriptor)


def _lock_folder(folder: Path) -> int:
    """Make a folder and lock it; another process may be about to remove it."""
    while True:
        folder.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            descriptor = lock(folder)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), folder.stat()):
                    return descriptor
            os.close(descriptor)


def remove_folder(folder: Path) -> None:
    """Remove a working folder and what is in it."""
    shutil.rmtree(folder, ignore_errors=True)


def name_folder(folder: Path, target: Path) -> None:
    """Give a finished folder its name, which no folder with files may have."""
    name = f"{os.fspath(target)!r}"
    with _system_errors(name, target.parent):
        _sync_folder(folder)
        try:
            folder.rename(target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            raise OutputExistsError(f"{name} appeared while it was being written") from None
        _sync_folder(target.parent)


def move_files(folder: Path, target: Path, names: Iterable[str], *, last: str, overwrite: bool = True) -> None:
    """Move finished files into a folder that is there already, in the place of files of their names.

    ``last``, without which nobody takes the others for a whole, goes first and comes last. Where its bytes do not
    change it stays, and one other file is then replaced at one moment. When the system refuses a step all files are put
    back. Of several that move files into one folder at the same time each waits for the one before.

    Args:
        folder: on the filesystem of ``target``.
        target: the folder.
        names: of the files; with or without ``last``.
        last: as said.
        overwrite: whether there may be files of these names.

    Raises:
        OutputExistsError: there is one.
        OutputError: the system refuses.
    """
    others = [name for name in names if name != last]
    with _system_errors(f"{os.fspath(target / last)!r}", target), contextlib.ExitStack() as stack:
        stack.callback(os.close, lock(target, wait=True))
        places = {name: Path(os.path.realpath(target / name)) for name in (*others, last)}
        there = [name for name, place in places.items() if place.exists()]
        if there and not overwrite:
            raise OutputExistsError(f"{str(target / there[0])!r} appeared while it was being written")
        for name in there:
            (folder / name).chmod(stat.S_IMODE(places[name].stat().st_mode))
        for name in places:
            _fsync(folder / name)
        stays = last in there and len(others) == 1 and filecmp.cmp(folder / last, places[last], shallow=False)
        moved = []
        try:
            if last in there and not stays:
                _set_aside(places[last], folder / f"{_ASIDE}{last}")
                moved.append(last)
                places[last].unlink(missing_ok=True)
                _sync_folder(places[last].parent)
            for name in [*others, *([] if stays else [last])]:
                if name in there and name != last:
                    _set_aside(places[name], folder / f"{_ASIDE}{name}")
                moved.append(name)
                _move(folder / name, places[name])
                _sync_folder(places[name].parent)
        except BaseException:
            for name in sorted(set(moved), key=last.__eq__):
                if name in there:
                    _move(folder / f"{_ASIDE}{name}", places[name])
                else:
                    places[name].unlink(missing_ok=True)
            raise


_ASIDE = ".before-"
"""Starts the name under which a file that is replaced waits until all are."""


def _set_aside(file: Path, aside: Path) -> None:
    """Keep a file under another name too."""
    try:
        os.link(file, aside)
    except OSError:  # a filesystem without hard links, or another one
        shutil.copy2(file, aside)


def _move(file: Path, target: Path) -> None:
    """Move a file over another, which a link may have on another filesystem."""
    if _is_beside(file, target):
        file.replace(target)
        return
    with staged(target, overwrite=True) as temporary:
        shutil.copyfile(file, temporary)
    file.unlink()


def _is_beside(file: Path, target: Path) -> bool:
    """Whether both are on one filesystem."""
    return target.parent.stat().st_dev == file.stat().st_dev


_HINTS = {
    errno.ENOSPC: "free some room, or name an output on another filesystem",
    errno.EDQUOT: "free some of your quota, or name an output on another filesystem",
    errno.EROFS: "name an output on a filesystem that can be written to",
}


@contextlib.contextmanager
def _system_errors(name: str, folder: Path | None = None) -> Iterator[None]:
    """Turn what the operating system refuses into an `OutputError` for the output of that name."""
    try:
        yield
    except LoraioError:
        raise
    except OSError as error:
        gone = error.errno == errno.ENOENT and folder is not None and not folder.is_dir()
        raise _output_error(f"{name} cannot be written", error, "its folder has gone" if gone else None) from error


def _output_error(what: str, error: OSError, reason: str | None = None) -> OutputError:
    found = OutputError(f"{what}: {reason or error.strerror or error}", hint=_HINTS.get(error.errno or 0))
    found.errno = error.errno
    return found


@contextlib.contextmanager
def _named(folder: Path, output: Path) -> Iterator[None]:
    """Let errors name the output in the place of the hidden folder that is still in its place."""
    try:
        yield
    except OutputError as error:
        found = OutputError(error.message.replace(str(folder), str(output)), where=error.where, hint=error.hint)
        found.errno = error.errno
        raise found from error


def _mode_of(path: str | os.PathLike[str]) -> int | None:
    """Type and mode of the file that a path leads to; None where there is none."""
    try:
        return Path(path).stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def _is_same(target: Path, source: str | os.PathLike[str]) -> bool:
    """Whether a file that is written would be that one, which may not be there yet."""
    if target.exists() and Path(source).exists():
        return target.samefile(source)
    return target == Path(os.path.realpath(source))


def _kind(mode: int) -> str:
    for kind, holds in {"a pipe": stat.S_ISFIFO, "a socket": stat.S_ISSOCK}.items():
        if holds(mode):
            return kind
    return "a device"


def _withhold(temporary: Path, target: Path) -> int:
    """The mode that the temporary has; while it is written nobody else reads it who may not read the file before."""
    mode = stat.S_IMODE(temporary.stat().st_mode)
    if target.exists():
        with contextlib.suppress(PermissionError):  # a filesystem whose files all have one mode
            temporary.chmod(0o600)
    return mode


def _give_mode(temporary: Path, target: Path, mode: int) -> None:
    """Mode and owner of the file that is replaced, else that mode."""
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


def _sync_folder(path: Path) -> None:
    """Flush the names in a folder, where the filesystem can."""
    try:
        _fsync(path)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

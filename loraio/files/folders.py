"""Write several files that belong together: all of them appear in a folder, or none."""

from __future__ import annotations

import contextlib
import errno
import filecmp
import hashlib
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from loraio.errors import OutputError, OutputExistsError
from loraio.files.atomic import check_output, fsync, mode_of, output_error, staged, sync_folder, system_errors
from loraio.files.temporaries import lock, owned_folder, remove_stale


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, where they are not there.

    Raises:
        OutputError: the system refuses it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(f"the folder {os.fspath(folder)!r} cannot be made", error) from error


@contextlib.contextmanager
def staged_folder(
    folder: str | os.PathLike[str],
    names: Iterable[str],
    *,
    last: str,
    overwrite: bool = False,
    inputs: Iterable[str | os.PathLike[str]] = (),
) -> Iterator[Path]:
    """Yield a temporary folder for files that belong together, and move them to their places if the block succeeds.

    A new folder appears with all of them in it. In an existing folder they replace files of the same names, as in
    `move_files`.

    Args:
        folder: it is made where it is not there; its parent must be.
        names: of all files; the block writes each.
        last: the file without which the others are not taken for complete.
        overwrite, inputs: as `check_output`, for each file.

    Raises:
        OutputExistsError, OutputError: as `staged`.
    """
    names, name = list(names), f"{os.fspath(folder)!r}"
    with system_errors(name):
        mode = mode_of(folder)
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
    with system_errors(name, place.parent), owned_folder(place) as temporary:
        with _named(temporary, into):
            yield temporary
        if there:
            move_files(temporary, into, names, last=last, overwrite=overwrite)
        else:
            for one in names:
                fsync(temporary / one)
            name_folder(temporary, into)


@contextlib.contextmanager
def working_folder(output: Path) -> Iterator[Path]:
    """Yield a hidden folder beside an output of several files, for those that are finished first.

    It outlives a killed process, so that another one can resume. The caller must check that its contents belong to the
    same work. One process at a time holds it. An empty folder is removed at the end.

    Raises:
        OutputError: another process has it, it is a link, or the system refuses it.
    """
    short = output.name
    if len(short) > 40:  # a file name has 255 bytes at most
        short = f"{short[:40]}-{hashlib.sha256(os.fsencode(short)).hexdigest()[:8]}"
    folder = output.parent / f".{short}.merging"
    name = f"{os.fspath(output)!r}"
    with system_errors(name, output.parent):
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
    """Give a finished folder its name, unless a folder with files has it."""
    name = f"{os.fspath(target)!r}"
    with system_errors(name, target.parent):
        sync_folder(folder)
        try:
            folder.rename(target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            raise OutputExistsError(f"{name} appeared while it was being written") from None
        sync_folder(target.parent)


def move_files(folder: Path, target: Path, names: Iterable[str], *, last: str, overwrite: bool = True) -> None:
    """Move finished files into an existing folder, in the place of files of the same names.

    The old ``last`` is removed first and the new one comes last, so that a mixture is never taken for complete. If its
    bytes do not change and one other file is replaced, it stays. If the system refuses a step, all files are put back.
    Processes that move files into one folder wait for each other.

    Args:
        folder: on the filesystem of ``target``.
        target: the folder.
        names: of the files; with or without ``last``.
        last: the file without which the others are not taken for complete.
        overwrite: replace existing files of these names.

    Raises:
        OutputExistsError: there is one.
        OutputError: the system refuses.
    """
    others = [name for name in names if name != last]
    with system_errors(f"{os.fspath(target / last)!r}", target), contextlib.ExitStack() as stack:
        stack.callback(os.close, lock(target, wait=True))
        places = {name: Path(os.path.realpath(target / name)) for name in (*others, last)}
        there = [name for name, place in places.items() if place.exists()]
        if there and not overwrite:
            raise OutputExistsError(f"{str(target / there[0])!r} appeared while it was being written")
        for name in there:
            (folder / name).chmod(stat.S_IMODE(places[name].stat().st_mode))
        for name in places:
            fsync(folder / name)
        stays = last in there and len(others) == 1 and filecmp.cmp(folder / last, places[last], shallow=False)
        moved = []
        try:
            if last in there and not stays:
                _set_aside(places[last], folder / f"{_ASIDE}{last}")
                moved.append(last)
                places[last].unlink(missing_ok=True)
                sync_folder(places[last].parent)
            for name in [*others, *([] if stays else [last])]:
                if name in there and name != last:
                    _set_aside(places[name], folder / f"{_ASIDE}{name}")
                moved.append(name)
                _move(folder / name, places[name])
                sync_folder(places[name].parent)
        except BaseException:
            for name in sorted(set(moved), key=last.__eq__):
                if name in there:
                    _move(folder / f"{_ASIDE}{name}", places[name])
                else:
                    places[name].unlink(missing_ok=True)
            raise


_ASIDE = ".before-"
"""Prefix of the name under which a replaced file waits until all are replaced."""


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
    """Return True if both are on one filesystem."""
    return target.parent.stat().st_dev == file.stat().st_dev


@contextlib.contextmanager
def _named(folder: Path, output: Path) -> Iterator[None]:
    """Let errors name the output in the place of the hidden folder that is still in its place."""
    try:
        yield
    except OutputError as error:
        found = OutputError(error.message.replace(str(folder), str(output)), where=error.where, hint=error.hint)
        found.errno = error.errno
        raise found from error

"""Files that are written: refused early, written beside their place, and named only when they are whole."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable, Iterator
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
    with contextlib.suppress(OSError):  # the file is whole under its name; not every filesystem can sync a folder
        _fsync(target.parent)


@contextlib.contextmanager
def _system_errors(name: str) -> Iterator[None]:
    """Turn what the operating system refuses into an `OutputError` for the output of that name."""
    try:
        yield
    except LoraioError:
        raise
    except OSError as error:
        raise OutputError(f"{name} cannot be written: {error.strerror or error}") from error


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

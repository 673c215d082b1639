"""Copy bytes from file to file, and digest the copy; needs no torch."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from loraio.errors import FormatError, MissingFileError

BLOCK = 1 << 20
"""Bytes that are copied before they are read back: few enough to stay in the processor's cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """Bytes in a file: ``size`` of them, from ``begin`` on."""

    path: Path
    begin: int
    size: int


class Inputs:
    """Files that must not change while they are read.

    Threads open them by path again and again. Each time it must be the first file: the same inode, length and time of
    change.
    """

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[int, ...]] = {}

    def open(self, path: Path) -> FileIO:
        """Open a file for reading, unbuffered.

        Raises:
            MissingFileError: it cannot be opened any more.
            FormatError: it changed.
        """
        try:
            file = FileIO(path)
        except OSError as error:
            raise MissingFileError(f"{str(path)!r} cannot be read: {error.strerror or error}") from error
        try:
            self._compare(path, os.fstat(file.fileno()))
        except FormatError:
            file.close()
            raise
        return file

    def check(self) -> None:
        """Raise FormatError if one of the files is no longer what it was."""
        for path in list(self._seen):
            self.open(path).close()

    def signature(self, path: Path) -> list[int]:
        """Return the numbers that are compared."""
        self.open(path).close()
        return list(self._seen[path])

    def _compare(self, path: Path, found: os.stat_result) -> None:
        if self._seen.setdefault(path, signature_of(found)) != signature_of(found):
            raise changed(path)


def signature_of(found: os.stat_result) -> tuple[int, ...]:
    """Return the numbers that change when somebody writes to a file."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def changed(path: Path) -> FormatError:
    """Return the error for a file that somebody else writes to."""
    return FormatError("the file changed while it was being read", where=f"{str(path)!r}", hint="try again")


def read_into(file: FileIO, begin: int, room: memoryview) -> None:
    """Fill memory with the bytes of a file.

    Raises:
        MissingFileError, FormatError: they cannot be read, or the file ends before.
    """
    path = Path(os.fsdecode(file.name))
    file.seek(begin)
    try:
        while len(room):
            read = file.readinto(room)
            if not read:
                raise changed(path)
            room = room[read:]
    except OSError as error:
        raise MissingFileError(f"{str(path)!r} cannot be read: {error.strerror or error}") from error


class Progress:
    """Counts bytes from several threads, and stops all threads when one has failed."""

    def __init__(self, report: Callable[[int], None] | None = None) -> None:
        self._report = report
        self._lock = threading.Lock()
        self.stopped = False

    def add(self, count: int) -> None:
        """Count bytes as done.

        Raises:
            StoppedError: another thread has failed.
        """
        if self.stopped:
            raise StoppedError
        if self._report is not None:
            with self._lock:
                self._report(count)


class StoppedError(Exception):
    """Another thread has failed."""


PIECE = 1 << 18
"""Bytes of one write: a write of more takes Linux longer for each byte."""


def copy_bytes(source: FileIO, begin: int, target: FileIO, place: int, room: memoryview) -> None:
    """Copy ``len(room)`` bytes from file to file, through memory.

    Args:
        source: an unbuffered file.
        begin: offset of the bytes in it.
        target: another unbuffered file.
        place: offset in it.
        room: memory that is written over.

    Raises:
        MissingFileError, FormatError: as `read_into`.
    """
    for start in range(0, len(room), PIECE):
        piece = room[start : start + PIECE]
        read_into(source, begin + start, piece)
        target.seek(place + start)
        write_all(target, piece)


def write_all(target: FileIO, data: memoryview) -> None:
    """Write all of it to an unbuffered file, whose ``write`` may take less than it is given."""
    while len(data):
        data = data[target.write(data) :]

"""Bytes that go from file to file, and the digest of what has come to be there; needs no torch."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from loraio.errors import FormatError, MissingFileError

if TYPE_CHECKING:
    from hashlib import _Hash

BLOCK = 1 << 20
"""Bytes that are copied before they are read back: few enough to be still in the processor's cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """Bytes in a file: ``size`` of them, from ``begin`` on."""

    path: Path
    begin: int
    size: int


class Inputs:
    """Files that must not change while they are read.

    They are read by their paths, again and again and from several threads; every time it must be the file of the first
    time: the same inode, length and time of change.
    """

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[int, ...]] = {}

    def open(self, path: Path) -> FileIO:
        """The file, unbuffered, for reading.

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
        """What is compared, as plain numbers."""
        self.open(path).close()
        return list(self._seen[path])

    def _compare(self, path: Path, found: os.stat_result) -> None:
        if self._seen.setdefault(path, signature_of(found)) != signature_of(found):
            raise changed(path)


def signature_of(found: os.stat_result) -> tuple[int, ...]:
    """What of a file is another when somebody writes to it."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def changed(path: Path) -> FormatError:
    """The error for a file that somebody else writes to."""
    return FormatError("the file changed while it was being read", where=f"{str(path)!r}", hint="try again")


def read_into(file: FileIO, begin: int, room: memoryview) -> None:
    """Fill memory with the bytes of a file.

    Raises:
        MissingFileError, FormatError: they cannot be read, or there are not so many.
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


@dataclass(slots=True)
class Copied:
    """How far the copy of a tensor is; it may be gone on with at any time.

    Attributes:
        done: so many of its bytes are in the output.
        digest: of them, as they were read back from there.
    """

    done: int = 0
    digest: _Hash = field(default_factory=hashlib.sha256)

    def go_on(
        self,
        copy: Callable[[int, FileIO, int, memoryview], None],
        target: FileIO,
        place: int,
        size: int,
        block: int = BLOCK,
    ) -> Iterator[int]:
        """Copy the rest, block by block; gives how many bytes each has.

        Args:
            copy: puts bytes, from the given one on, to a place in the file: as many as there is room for in memory, of
                which it may make use.
            target: the file.
            place: of the tensor in it.
            size: of the tensor in bytes.
            block: bytes at a time; but for the first and the last they are whole blocks of the file.
        """
        room = memoryview(bytearray(min(block, size - self.done)))
        while self.done < size:
            at = place + self.done
            part = room[: min(block - at % block, size - self.done)]
            copy(self.done, target, at, part)
            read_into(target, at, part)
            self.digest.update(part)
            self.done += len(part)
            yield len(part)


class Progress:
    """Counts bytes, from several threads, and stops all of them when one has failed."""

    def __init__(self, report: Callable[[int], None] | None = None) -> None:
        self._report = report
        self._lock = threading.Lock()
        self.stopped = False

    def add(self, count: int) -> None:
        """So many bytes are done.

        Raises:
            StoppedError: the work has come to nothing in another thread.
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

"""The places a bank reads adapters from: a folder, a pack or a mapping."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from loraio.adapter.adapter import Adapter
from loraio.errors import FormatError, MissingFileError
from loraio.files.names import name_clashes, normal_form
from loraio.formats.loading import load_bytes
from loraio.formats.pack import SUFFIX, Pack, listed_files, read_index, read_member, read_range, stamp_of

Stamp = tuple[int, ...]
"""Device, inode, size and time of writing of a file; empty for an adapter in memory."""

Source = Path | Mapping[str, Adapter | str | os.PathLike[str]]


class Entry(Protocol):
    """The place of one adapter. Two entries are equal exactly when they are the same place."""

    def stamp(self) -> Stamp:
        """Return the stamp of the file as it is now, without reading it."""
        ...

    def load(self) -> tuple[Stamp, Adapter]:
        """Read and check the adapter; return it with the stamp of the bytes that were read."""
        ...


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A plain file."""

    path: Path
    follow: bool = False

    def stamp(self) -> Stamp:
        try:
            status = self.path.stat(follow_symlinks=self.follow)
        except FileNotFoundError:
            raise MissingFileError("its file is gone", where=f"{str(self.path)!r}", hint="bank.refresh()") from None
        except OSError as error:
            raise MissingFileError(f"{str(self.path)!r} cannot be read: {error.strerror or error}") from error
        if not stat.S_ISREG(status.st_mode):
            raise FormatError("not a plain file any more", where=f"{str(self.path)!r}")
        return stamp_of(status)

    def load(self) -> tuple[Stamp, Adapter]:
        self.stamp()  # opening a pipe would wait for a writer
        flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | (0 if self.follow else getattr(os, "O_NOFOLLOW", 0))
        try:
            descriptor = os.open(self.path, flags | getattr(os, "O_NONBLOCK", 0))
            try:
                before = os.fstat(descriptor)
                data = read_range(descriptor, 0, before.st_size)
                changed = stamp_of(os.fstat(descriptor)) != stamp_of(before)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise MissingFileError(f"{str(self.path)!r} cannot be read: {error.strerror or error}") from error
        if changed or len(data) != before.st_size:
            raise FormatError("the file changed while it was being read", where=f"{str(self.path)!r}")
        return stamp_of(before), load_bytes(data, self.path)


@dataclass(frozen=True, slots=True)
class PackEntry:
    """A member of a pack. All members share one index object, and are equal only with the same one."""

    index: Pack
    name: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PackEntry) and self.index is other.index and self.name == other.name

    def __hash__(self) -> int:
        return hash((id(self.index), self.name))

    def stamp(self) -> Stamp:
        return FileEntry(self.index.path, follow=True).stamp()

    def load(self) -> tuple[Stamp, Adapter]:
        data = read_member(self.index, self.name)
        return self.index.stamp, load_bytes(data, f"{self.index.path}:{self.name}")


@dataclass(frozen=True, slots=True, eq=False)
class GivenEntry:
    """An adapter that the caller holds in memory."""

    adapter: Adapter

    def stamp(self) -> Stamp:
        return ()

    def load(self) -> tuple[Stamp, Adapter]:
        return (), self.adapter


@dataclass(frozen=True, slots=True)
class Listing:
    """The adapters of a source by name, and for each name that clashes with another one the reason."""

    entries: Mapping[str, Entry]
    clashes: Mapping[str, str]


def list_source(source: Source) -> Listing:
    """List the adapters of a source without reading any.

    Raises:
        MissingFileError: no such folder or file.
        FormatError: the file is no pack.
    """
    entries: list[tuple[str, Entry]] = []
    if isinstance(source, Mapping):
        for name, given in source.items():
            entry = GivenEntry(given) if isinstance(given, Adapter) else FileEntry(Path(given), follow=True)
            entries.append((normal_name(name), entry))
    elif source.is_dir():
        files = [entry.name for entry in listed_files(source)]
        entries = [(normal_form(file.removesuffix(SUFFIX)), FileEntry(source / file)) for file in files]
    else:
        index = read_index(source)
        return Listing({name: PackEntry(index, name) for name in index.members}, {})
    clashes = name_clashes(name for name, _ in entries)
    return Listing({name: entry for name, entry in entries if name not in clashes}, clashes)


def normal_name(name: Any) -> Any:
    """Return a name in the form in which names are listed; anything but a string stays, and is not found."""
    return normal_form(name) if isinstance(name, str) else name

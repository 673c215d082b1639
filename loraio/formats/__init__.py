"""File dialects: each reads a file into an Adapter and writes one. A new dialect is one file and one line here."""

from __future__ import annotations

import os
from typing import Protocol

from loraio import container
from loraio.adapter import Adapter
from loraio.container import Header
from loraio.errors import FormatError
from loraio.formats.native import Native


class Dialect(Protocol):
    """One tool's way to lay an adapter out in a file."""

    @property
    def name(self) -> str:
        """As ``inspect`` prints it."""
        ...

    def detect(self, header: Header) -> bool:
        """Whether a file with this header is of this dialect, judged by content, never by file name."""
        ...

    def read(self, header: Header) -> Adapter:
        """The adapter in the file."""
        ...

    def write(self, adapter: Adapter, path: str | os.PathLike[str], *, overwrite: bool) -> None:
        """Write the adapter, atomically."""
        ...


DIALECTS: dict[str, Dialect] = {
    "native": Native(),
}


def detect(header: Header) -> Dialect:
    """The dialect of a file.

    Raises:
        FormatError: it is no adapter of a known dialect.
    """
    for dialect in DIALECTS.values():
        if dialect.detect(header):
            return dialect
    document = header.document()
    what = "a base model" if document is not None else "a file without loraio metadata"
    if document is not None and "pack" in document:
        what = "a pack of them"
    raise FormatError(f"{str(header.path)!r} is not an adapter but {what}")


def load(path: str | os.PathLike[str]) -> Adapter:
    """Read an adapter file, whole and checked, onto the CPU.

    Raises:
        MissingFileError: no such file.
        FormatError: its bytes are not what the format says, or it is no adapter.
        AdapterError: what it says contradicts itself, or a factor holds NaN or infinity.
    """
    header = container.read_header(path)
    return detect(header).read(header)


def load_bytes(data: bytes, path: str | os.PathLike[str]) -> Adapter:
    """As `load`, of a whole adapter file in memory.

    Args:
        data: all bytes of the file.
        path: where they are from, for errors only.

    Raises:
        FormatError, AdapterError: as `load`.
    """
    header = container.parse_file(data, path)
    return detect(header).read(header)


def save(adapter: Adapter, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write an adapter in the native format, atomically; the same adapter always gives the same bytes.

    Args:
        adapter: any device.
        path: the safetensors file to make.
        overwrite: replace an existing file.

    Raises:
        OutputExistsError: the file exists and ``overwrite`` is false.
        OutputError: the system refused to write.
    """
    DIALECTS["native"].write(adapter, path, overwrite=overwrite)

"""Register the dialects of other tools, and identify files. A new dialect is one file and one line in `DIALECTS`.

The native format is the hub: another tool's file becomes an `Adapter` when it is bound to a base, and every dialect
writes an `Adapter`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from loraio.errors import FormatError
from loraio.formats.diffusers import Diffusers
from loraio.formats.foreign import Dialect
from loraio.formats.kohya import Kohya
from loraio.formats.loralib import Loralib
from loraio.formats.lycoris import Lycoris
from loraio.formats.minlora import MinLora
from loraio.formats.native import Native
from loraio.formats.peft import Peft
from loraio.formats.sources import Source, is_adapter_folder, open_source
from loraio.formats.torchtune import Torchtune

NATIVE = Native()

DIALECTS: dict[str, Dialect] = {
    "peft": Peft(),
    "lycoris": Lycoris(),
    "kohya": Kohya(),
    "diffusers": Diffusers(),
    "torchtune": Torchtune(),
    "minlora": MinLora(),  # before loralib, whose keys end alike
    "loralib": Loralib(),
}
"""Dialects of other tools; the first that recognises a file gets it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A file or folder, identified.

    Attributes:
        source: the file and its contents.
        dialect: of another tool; None for a file of ours.
        reason: the evidence.
    """

    source: Source
    dialect: Dialect | None
    reason: str


def identify(path: str | os.PathLike[str]) -> Found:
    """Return the dialect of a file or folder, by its content; of safetensors only the header is read, without torch.

    Raises:
        MissingFileError: no such file.
        FormatError: its bytes contradict its container, or it is no adapter of a known dialect.
    """
    source = open_source(path)
    found = recognised(source)
    if found is None:
        raise FormatError(f"{str(path)!r} is not an adapter but {otherwise(source)}")
    return found


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Return True for an adapter of a known dialect; a folder needs a file with one of the usual names.

    Raises:
        MissingFileError, FormatError: as `identify`, for a file that cannot be read.
    """
    if Path(path).is_dir() and not is_adapter_folder(path):
        return False
    return recognised(open_source(path)) is not None


def recognised(source: Source) -> Found | None:
    """Identify an open source; None if it is no adapter of a known dialect."""
    if source.header is not None and NATIVE.detect(source.header):
        return Found(source=source, dialect=None, reason="the loraio metadata describe targets")
    for dialect in DIALECTS.values():
        reason = dialect.recognise(source)
        if reason is not None:
            return Found(source=source, dialect=dialect, reason=reason)
    return None


def otherwise(source: Source) -> str:
    """Return the name of a file that is no adapter, for an error."""
    document = source.header.document() if source.header is not None else None
    if document is not None and "pack" in document:
        return "a pack of them"
    if document is not None:
        return "a base model"
    first = next(iter(source.tensors), None)
    return "a file without loraio metadata" + (f", and {first!r} is no adapter's key" if first is not None else "")

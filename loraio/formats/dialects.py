"""File dialects: how adapters lie in files. A new dialect is one file and one line in `DIALECTS`.

The native format is the hub: what another tool wrote becomes an `Adapter` when it is bound to a base, and an `Adapter`
is what every dialect writes.
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
"""Dialects of other tools. The first that recognises a file has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a file or folder is.

    Attributes:
        source: what lies on the disk.
        dialect: of another tool; None for a file of ours.
        reason: why we think so.
    """

    source: Source
    dialect: Dialect | None
    reason: str


def identify(path: str | os.PathLike[str]) -> Found:
    """What an adapter's file or folder is, judged by content; of safetensors the header alone, without torch.

    Raises:
        MissingFileError: no such file.
        FormatError: its bytes are not what their container says, or it is no adapter of a known dialect.
    """
    source = open_source(path)
    found = recognised(source)
    if found is None:
        raise FormatError(f"{str(path)!r} is not an adapter but {otherwise(source)}")
    return found


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether it is an adapter of a known dialect; a folder is none where no file has one of the usual names.

    Raises:
        MissingFileError, FormatError: as `identify`, for a file that cannot be read.
    """
    if Path(path).is_dir() and not is_adapter_folder(path):
        return False
    return recognised(open_source(path)) is not None


def recognised(source: Source) -> Found | None:
    """As `identify`, of what was opened; None where it is no adapter of a known dialect."""
    if source.header is not None and NATIVE.detect(source.header):
        return Found(source=source, dialect=None, reason="the loraio metadata describe targets")
    for dialect in DIALECTS.values():
        reason = dialect.recognise(source)
        if reason is not None:
            return Found(source=source, dialect=dialect, reason=reason)
    return None


def otherwise(source: Source) -> str:
    document = source.header.document() if source.header is not None else None
    if document is not None and "pack" in document:
        return "a pack of them"
    if document is not None:
        return "a base model"
    first = next(iter(source.tensors), None)
    return "a file without loraio metadata" + (f", and {first!r} is no adapter's key" if first is not None else "")

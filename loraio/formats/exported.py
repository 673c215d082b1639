"""Keep our own metadata in the files that we write for other tools, and find it there again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loraio.adapter.adapter import Adapter
from loraio.files.tensorfile import METADATA_KEY
from loraio.formats.native import FORMAT_VERSION, NativeMetadata, read_document, to_document
from loraio.formats.report import Line, settings
from loraio.formats.sources import Source

ORIGIN = "converted_from"
"""Key in an adapter's ``training`` for the settings of another tool's file."""

_DOCUMENT = "exported"  # key of the loraio metadata under which an exported file holds the native document


def exported_document(adapter: Adapter) -> dict[str, Any]:
    """Return the loraio document of an exported safetensors file, which other tools ignore."""
    return {"format_version": FORMAT_VERSION, _DOCUMENT: to_document(adapter)}


def origin_of(adapter: Adapter, dialect: str) -> dict[str, Any]:
    """Return the settings of the dialect's file from which the adapter came; empty for other adapters."""
    origin = adapter.training.get(ORIGIN)
    if not isinstance(origin, Mapping) or origin.get("dialect") != dialect:
        return {}
    found = origin.get("settings")
    return dict(found) if isinstance(found, Mapping) else {}


def carried_lines(adapter: Adapter) -> list[Line]:
    """Return lines on the settings that an exported safetensors file keeps in our own metadata."""
    named = ["base", "training", *adapter.extra]
    return settings(named, "carried", f"in the header, under {METADATA_KEY!r}, which the other tool passes over")


def kept_metadata(source: Source) -> NativeMetadata | None:
    """Return the metadata that an export of ours holds; None if it has none."""
    document = source.header.document() if source.header is not None else None
    if document is None or _DOCUMENT not in document:
        return None
    return read_document(document[_DOCUMENT], where=f"the metadata of {str(source.file)!r}")

"""Read residue files: what a reversible merge wrote beside the merged checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraio.adapter.metadata import check_strength
from loraio.errors import ConfigError, FormatError
from loraio.files import tensorfile
from loraio.files.integrity import is_sha256
from loraio.files.tensorfile import Header

FORMAT_VERSION = 3
"""Version of the metadata and the blocks of a residue file."""

SUFFIX = ".residue"
"""Follows the name of the merged checkpoint."""

KEY = "residue"
"""Key that only the document of a residue file has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidueFile:
    """The header of a residue file, checked.

    Attributes:
        header: header of the file.
        adapter_sha256, base_sha256, merged_sha256: digests of the adapter's tensors and of both state dicts.
        strength: strength of the merge.
        tensors: digest of each tensor of the base, by name.
        stripped: prefix of every name in the base's file.
        metadata: strings in the header of the base's file; None if the base was no single safetensors file.
        index: text of the index of a sharded base; None for others.
    """

    header: Header
    adapter_sha256: str
    base_sha256: str
    merged_sha256: str
    strength: float
    tensors: Mapping[str, str]
    stripped: str = ""
    metadata: Mapping[str, str] | None = None
    index: str | None = field(default=None, repr=False)

    @property
    def where(self) -> str:
        """Name of the file, for errors."""
        return f"{str(self.header.path)!r}"


def residue_beside(output: Path) -> Path:
    """Return where the residue of a merged checkpoint is: of a file, a folder, or an index."""
    output = output if output.name not in ("", "..") else output.resolve()
    return output.with_name(output.name + SUFFIX)


def is_residue(document: Mapping[str, Any]) -> bool:
    """Return True if a document is that of a residue file."""
    return KEY in document and "targets" not in document


def read_residue(path: str | os.PathLike[str]) -> ResidueFile:
    """Read the header of a residue file.

    Raises:
        MissingFileError: no such file.
        FormatError: it is not a residue, or one of another version.
    """
    header = tensorfile.read_header(path)
    where = f"{os.fspath(path)!r}"
    document = header.document() or {}
    if not is_residue(document):
        raise FormatError(
            f"{where} is not a residue of a merge", hint="the file that `loraio merge --reversible` makes"
        )
    version = document.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        older = isinstance(version, int) and not isinstance(version, bool) and version < FORMAT_VERSION
        raise FormatError(
            f"residue version {version!r}, this loraio reads version {FORMAT_VERSION}",
            where=where,
            hint="--base BASE (base= in Python), or the loraio that wrote it" if older else "a newer loraio",
        )
    said = document[KEY]
    if not isinstance(said, dict):
        raise FormatError(f"its description of the merge is {said!r}, not an object", where=where)
    problems = [
        f"{key} is {value!r}, not a {expected}"
        for key, expected, is_right in _ENTRIES
        if not is_right(value := said.get(key))
    ]
    try:
        strength = check_strength(said.get("strength"))  # type: ignore[arg-type]  # which it checks
    except ConfigError as error:
        problems.append(error.message)
    if problems:
        raise FormatError("this residue was not written by loraio", problems=problems, where=where)
    entries = {key: said[key] for key, *_ in _ENTRIES if said.get(key) is not None}
    return ResidueFile(header=header, strength=strength, **entries)


def _is_mapping(value: Any, is_right: Any) -> bool:
    return isinstance(value, dict) and all(map(is_right, value.values()))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_ENTRIES = (
    ("adapter_sha256", "digest", is_sha256),
    ("base_sha256", "digest", is_sha256),
    ("merged_sha256", "digest", is_sha256),
    ("tensors", "mapping from names to digests", lambda value: _is_mapping(value, is_sha256)),
    ("stripped", "text", lambda value: value is None or _is_text(value)),
    ("metadata", "mapping from names to texts", lambda value: value is None or _is_mapping(value, _is_text)),
    ("index", "text", lambda value: value is None or _is_text(value)),
)
"""Entries of the description beside the strength: key, kind, check."""

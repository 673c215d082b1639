"""Read sharded checkpoints without torch: several safetensors files, and an index of the tensors in each."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loraio.errors import FormatError, LoraioError, MissingFileError
from loraio.files import integrity, tensorfile
from loraio.files.names import is_device, name_clashes
from loraio.files.strictjson import read_json_text
from loraio.files.tensorfile import METADATA_KEY, Header, TensorInfo
from loraio.registry import known

INDEX_SUFFIX = ".safetensors.index.json"
"""Ending of the index of a checkpoint of several safetensors files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardedHeader:
    """An index and the headers of its shards, checked against each other.

    Attributes:
        index: the index.
        places: name of the file that holds each tensor, by the tensor's name, in the order of the index.
        headers: of the shards, by file name.
        metadata: the index's object ``metadata``.
    """

    index: Path
    places: Mapping[str, str]
    headers: Mapping[str, Header]
    metadata: Mapping[str, Any]

    def document(self) -> dict[str, Any]:
        """Return the document of loraio in the index, without its digests; empty if there is none."""
        document: dict[str, Any] = self.metadata.get(METADATA_KEY, {})
        return document

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors by name, in the order of the index; offsets are those in the tensor's own shard."""
        return {name: self.headers[file].tensors[name] for name, file in self.places.items()}

    @property
    def header_bytes(self) -> int:
        """Length of the JSON headers of all shards."""
        return sum(header.header_bytes for header in self.headers.values())

    @property
    def file_bytes(self) -> int:
        """Length of all shards."""
        return sum(header.file_bytes for header in self.headers.values())


def is_sharded(path: str | os.PathLike[str]) -> bool:
    """Return True for a name like that of an index, and for a folder, which should hold one."""
    path = Path(path)
    return path.name.endswith(INDEX_SUFFIX) or _is_folder(path)


def checkpoint_files(path: str | os.PathLike[str]) -> tuple[Path, ...]:
    """List the files of a checkpoint: of a sharded one the index and the shards, as far as they can be read."""
    if is_sharded(path):
        with contextlib.suppress(LoraioError):
            parted = read_sharded_header(path)
            return (parted.index, *(header.path for header in parted.headers.values()))
    return (Path(path),)


def read_sharded_header(path: str | os.PathLike[str]) -> ShardedHeader:
    """Read the headers of a sharded checkpoint; every tensor must be where the index says, and nowhere else.

    Args:
        path: the index, or a folder that holds exactly one.

    Raises:
        MissingFileError: no such index, or no such shard.
        FormatError: it is no index, it names files outside of its own folder, index and shards contradict each other,
            or it is not what was written.
    """
    index = _index_of(Path(path))
    where = f"{str(index)!r}"
    raw, document = read_json_text(index)
    places = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(places, dict) or not places:
        raise FormatError("not an index of a sharded checkpoint: it has no 'weight_map' with tensors", where=where)
    hostile = [f"{name!r} is in {file!r}" for name, file in places.items() if not _is_file_name(file)]
    if hostile:
        raise FormatError(
            "shards must be plain names of files in the index's own folder", problems=hostile, where=where
        )
    clashes = name_clashes(set(places.values()))
    if clashes:
        told = sorted(set(clashes.values()))
        raise FormatError("shards must have names that every system tells apart", problems=told, where=where)
    problems: list[str] = []
    refusal: type[LoraioError] = FormatError
    headers: dict[str, Header] = {}
    holders: dict[str, list[str]] = {}
    for file in sorted(set(places.values())):
        try:
            headers[file] = tensorfile.read_header(index.parent / file)
        except LoraioError as error:
            problems.append(error.message if file in error.message else f"{file!r}: {error.message}")
            refusal = MissingFileError if isinstance(error, MissingFileError) else refusal
            continue
        for name in headers[file].tensors:
            holders.setdefault(name, []).append(file)
    problems += [
        f"{name!r} is not in {file!r}{f', but in {holders[name][0]!r}' if name in holders else ''}"
        for name, file in places.items()
        if file in headers and file not in holders.get(name, [])
    ]
    problems += [f"{name!r} is in {len(files)} files: {known(files)}" for name, files in holders.items() if files[1:]]
    problems += [
        f"{name!r} in {files[0]!r} is not in the index" for name, files in holders.items() if name not in places
    ]
    if problems:
        raise refusal("index and shards do not belong together", problems=problems, where=where)
    metadata = document.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    own = metadata.get(METADATA_KEY)
    if own is not None and not isinstance(own, dict):
        raise FormatError("the loraio metadata is not a JSON object", where=where)
    found = integrity.check(raw, own, sorted(places), where=where)
    if found is not None:
        other = [file for file in headers if found.shards.get(file) != headers[file].sha256]
        if other:
            raise integrity.damaged_shards(other, where=where)
        digests = found.tensors or {}
        headers = {
            file: replace(header, digests={name: digests[name] for name in header.tensors})
            for file, header in headers.items()
        }
    return ShardedHeader(index=index, places=places, headers=headers, metadata=metadata)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name that is too long, for example: reading the file says what is wrong
        return False


def _index_of(path: Path) -> Path:
    """Return the index itself, or the only index in a folder."""
    if not _is_folder(path):
        return path
    try:
        found = sorted(file for file in path.iterdir() if file.name.endswith(INDEX_SUFFIX))
    except OSError as error:
        raise MissingFileError(f"the folder {str(path)!r} cannot be read: {error.strerror or error}") from error
    if len(found) == 1:
        return found[0]
    if found:
        raise FormatError(f"the folder {str(path)!r} holds {len(found)} indexes", hint=known(map(str, found)))
    raise MissingFileError(
        f"the folder {str(path)!r} holds no index of a sharded checkpoint, *{INDEX_SUFFIX}", hint="name a file"
    )


def _is_file_name(file: Any) -> bool:
    """Return True for a safetensors file in the same folder, on any system; links too, since caches use them."""
    return (
        isinstance(file, str)
        and file.endswith(".safetensors")
        and ".." not in file
        and not set(file) & set("/\\:\0")
        and file.isprintable()
        and not is_device(file)
    )

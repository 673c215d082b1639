"""Compare files with the digests that they hold, byte for byte. Needs no torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loraio.errors import LoraioError, MissingFileError
from loraio.files import tensorfile
from loraio.files.integrity import damaged_tensors, state_digest
from loraio.files.sharded import INDEX_SUFFIX, ShardedHeader, read_sharded_header
from loraio.files.tensorfile import Header
from loraio.formats import native, pack

_CHUNK = 1 << 20
_OTHERS = {"exported": "export", "residue": "residue"}
"""The kind of a document that is neither an adapter's nor a pack's, by one of its keys; else it is a base's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """The result of checking one file, or one sharded checkpoint.

    Attributes:
        path: the file; of a sharded checkpoint the index.
        kind: "adapter", "pack", "base", "residue", "export" (a file that loraio wrote in another tool's layout) or
            "other"; "unreadable" if the header is refused.
        bytes: of the file, and of all shards.
        tensors: the number of those compared with a digest.
        complete: True if digests cover every bit; files of format version 1 and of other tools have none, or few.
        problems: empty if the file is as it was written.
    """

    path: Path
    kind: str
    bytes: int
    tensors: int
    complete: bool
    problems: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """True if no digest differs."""
        return not self.problems


def check(path: str | os.PathLike[str]) -> Checked:
    """Compare a file with the digests that it holds: its header, every tensor, every member of a pack.

    An adapter's metadata are checked too, and a base checkpoint's own digest. Of a file without digests only the header
    is checked.

    Args:
        path: a safetensors file, or the index of a sharded checkpoint; all its shards are read.

    Raises:
        MissingFileError: the file cannot be read.
    """
    path = Path(path)
    try:
        if path.name.endswith(INDEX_SUFFIX):
            return _sharded(read_sharded_header(path))
        return _file(tensorfile.read_header(path))
    except MissingFileError:
        raise
    except LoraioError as error:
        size = path.stat().st_size
        lines = (error.message, *error.problems, *([f"try: {error.hint}"] if error.hint else []))
        return Checked(path=path, kind="unreadable", bytes=size, tensors=0, complete=False, problems=lines)


def checkable(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the files in a folder and its subfolders that `check` takes, sorted; links are ignored.

    The shards of a checkpoint are not listed beside its index.

    Raises:
        MissingFileError: the folder cannot be read.
    """
    found: list[Path] = []
    shards: set[Path] = set()
    for file in _files(Path(folder)):
        if file.name.endswith(INDEX_SUFFIX):
            found.append(file)
            try:
                shards.update(file.parent / shard for shard in read_sharded_header(file).headers)
            except LoraioError:
                continue  # `check` gives the reason, and its shards are checked one by one
        elif file.suffix in (".safetensors", ".residue"):
            found.append(file)
    return sorted(file for file in found if file not in shards)


def _files(folder: Path) -> Iterator[Path]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise MissingFileError(f"the folder {str(folder)!r} cannot be read: {error.strerror or error}") from error
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _files(Path(entry.path))
        elif entry.is_file(follow_symlinks=False) and not entry.name.startswith("."):
            yield Path(entry.path)


def _file(header: Header) -> Checked:
    document = header.document()
    if document is None:
        kind = "other"
    elif "pack" in document:
        return _pack(header)
    elif "targets" in document:
        kind = "adapter"
        native.read_metadata(header)
    else:
        kind = next((key for word, key in _OTHERS.items() if word in document), "base")
    found = _digests(header) if header.digests or kind == "base" else {}
    problems = _compared(found, header)
    if kind == "base" and document is not None and "sha256" in document:
        rows = ((name, info.dtype, info.shape, found[name]) for name, info in header.tensors.items())
        if state_digest(rows) != document["sha256"]:
            problems.append("the weights have another digest than its metadata say")
    return _checked(header, kind, len(header.digests or {}), problems)


def _pack(header: Header) -> Checked:
    index = pack.read_index(header.path)
    problems: list[str] = []
    for name in index.members:
        try:
            data = pack.read_member(index, name)
            inner = tensorfile.parse_file(data, header.path)
            native.read_metadata(inner)
            problems += [f"{name!r}: {line}" for line in _compared(_digests(inner), inner)]
        except LoraioError as error:
            problems.append(error.message if repr(name) in error.message else f"{name!r}: {error.message}")
    return _checked(header, "pack", len(index.members), problems)


def _sharded(sharded: ShardedHeader) -> Checked:
    document = sharded.document()
    problems: list[str] = []
    known: dict[str, str] = {}
    for header in sharded.headers.values():
        found = _digests(header)
        known |= found
        problems += _compared(found, header)
    rows = ((name, info.dtype, info.shape, known[name]) for name, info in sharded.tensors.items())
    if "sha256" in document and state_digest(rows) != document["sha256"]:
        problems.append("the weights have another digest than the index says")
    return _checked(sharded, "base", sum(len(header.digests or {}) for header in sharded.headers.values()), problems)


def _checked(header: Header | ShardedHeader, kind: str, tensors: int, problems: Sequence[str]) -> Checked:
    return Checked(
        path=header.index if isinstance(header, ShardedHeader) else header.path,
        kind=kind,
        bytes=header.file_bytes,
        tensors=tensors,
        complete=(header.document() or {}).get("format_version", 1) != 1,
        problems=tuple(problems),
    )


def _digests(header: Header) -> dict[str, str]:
    """Return the SHA-256 of every tensor's bytes, read a megabyte at a time."""
    start = 8 + header.header_bytes
    if header.data is not None:
        view = memoryview(header.data)[start:]
        return {n: hashlib.sha256(view[info.begin : info.end]).hexdigest() for n, info in header.tensors.items()}
    digests = {}
    try:
        with header.path.open("rb") as file:
            file.seek(start)
            for name, info in header.tensors.items():
                whole, left = hashlib.sha256(), info.end - info.begin
                while left and (piece := file.read(min(left, _CHUNK))):
                    whole.update(piece)
                    left -= len(piece)
                digests[name] = whole.hexdigest()
    except OSError as error:
        raise MissingFileError(f"{str(header.path)!r} cannot be read: {error.strerror or error}") from error
    return digests


def _compared(found: Mapping[str, str], header: Header) -> list[str]:
    said = header.digests or {}
    damaged = [name for name, digest in said.items() if found[name] != digest]
    if not damaged:
        return []
    error = damaged_tensors(damaged, of=len(said), where=str(header.path))
    return [error.message, *error.problems]

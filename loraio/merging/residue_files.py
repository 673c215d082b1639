"""Read and write residue files, which a reversible merge leaves beside the merged checkpoint.

Any program must be able to load a merged checkpoint, so the residue is a safetensors file of its own. It holds a tensor
of bytes for each target, and the originals of the tensors that the adapter replaced whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

from torch import Tensor

from loraio.adapter.adapter import Adapter
from loraio.adapter.metadata import check_strength
from loraio.errors import ConfigError, FormatError, VerificationError
from loraio.files import tensorfile
from loraio.files.atomic import staged
from loraio.files.copying import Inputs, write_all
from loraio.files.integrity import PENDING, is_sha256
from loraio.files.temporaries import owned_file
from loraio.files.tensorfile import Header
from loraio.files.tensors import tensor_bytes
from loraio.merging.checkpoint_writer import copy_tensor
from loraio.merging.plans import Plans, facts_sha256, read_bytes
from loraio.merging.residues import residue_of, restored

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


def read_residue(path: str | os.PathLike[str]) -> ResidueFile:
    """Read the header of a residue file.

    Raises:
        MissingFileError: no such file.
        FormatError: it is not a residue, or one of another version.
    """
    header = tensorfile.read_header(path)
    where = f"{os.fspath(path)!r}"
    document = header.document() or {}
    if KEY not in document or "targets" in document:
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


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_mapping(value: Any, is_right: Any) -> bool:
    return isinstance(value, dict) and all(map(is_right, value.values()))


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Residue:
    """Size of a residue.

    Attributes:
        path: the file.
        bytes: length of the file.
        weights: number of values in the folded weights.
        coded: bytes of their residue; the rest are originals of whole tensors, and the header.
        share: ``bytes`` divided by the bytes of the base's tensors.
    """

    path: Path
    bytes: int
    weights: int
    coded: int
    share: float

    @property
    def bits_per_weight(self) -> float:
        """Bits of residue for each value of the folded weights."""
        return 8 * self.coded / self.weights


@contextlib.contextmanager
def residue_writer(
    output: Path, strength: float, *, overwrite: bool, inputs: Iterable[str | os.PathLike[str]]
) -> Iterator[ResidueWriter]:
    """Open a residue beside the output of a merge; it gets its name when the block ends well.

    The checkpoint must get its name inside the block. Then a new checkpoint may lack its residue, while its base is at
    hand; but an old checkpoint never loses its residue to the new one's.
    """
    path = residue_beside(output)
    with (
        staged(path, overwrite=overwrite, inputs=inputs) as temporary,
        owned_file(path) as spool,
        FileIO(spool, "r+") as blocks,
    ):
        yield ResidueWriter(path, temporary, blocks, strength)


@dataclass(slots=True)
class ResidueWriter:
    """Takes the blocks of a merge from several threads, and makes a file of them.

    Blocks wait in a spool file until their number is known. The digest of the tensors is `PENDING` until `write`.
    """

    path: Path
    temporary: Path
    spool: FileIO
    strength: float
    sha256: str = PENDING
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _end: int = 0
    _blocks: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    _file_bytes: int = 0

    def keep(self, name: str, part: Adapter, base: Tensor, folded: Tensor) -> None:
        """Take a slice of a weight; raise VerificationError if its residue does not restore it."""
        block = residue_of(part, base, folded, self.strength)
        back = restored(part, folded, self.strength, block, where=f"{name!r}")
        if not tensor_bytes(back).equal(tensor_bytes(base)):
            raise VerificationError(f"{name!r} cannot be restored from its residue; nothing was written")
        with self._lock:
            self.spool.seek(self._end)
            write_all(self.spool, memoryview(block))
            self._blocks.setdefault(name, []).append((self._end, len(block)))
            self._end += len(block)

    def write(self, originals: Plans, document: Mapping[str, Any], *, inputs: Inputs) -> None:
        """Write the file and read it back; raise VerificationError if that differs.

        Args:
            originals: plans of the tensors that were replaced whole; ``inputs`` opens their files.
            document: describes the merge.
        """
        where = f"{str(self.path)!r}"
        facts: dict[str, tuple[str, tuple[int, ...]]] = {
            name: ("U8", (sum(size for _, size in blocks),)) for name, blocks in self._blocks.items()
        }
        facts |= {name: (plan.dtype, plan.shape) for name, plan in originals.items()}  # not what replaces them
        whole = {"format_version": FORMAT_VERSION, KEY: dict(document)}
        metadata = partial(tensorfile.metadata_of, whole, facts, where=where)
        start, placed = tensorfile.layout(facts, metadata(lambda _: PENDING), where=where)
        found: dict[str, str] = {}
        with FileIO(self.temporary, "r+") as file:
            file.truncate(0)
            for name, info in placed.items():
                if name in originals:
                    found[name] = copy_tensor(originals[name], file, len(start) + info.begin, inputs)
                else:
                    found[name] = self._put(name, file, len(start) + info.begin)
            self._file_bytes = file.seek(0, os.SEEK_END)
            start, _ = tensorfile.layout(facts, metadata(found.__getitem__), where=where)
            file.seek(0)
            write_all(file, memoryview(start))
        if tensorfile.read_header(self.temporary).tensors != placed:
            raise VerificationError("the header reads back wrong; nothing was written", where=where)
        self.sha256 = facts_sha256(facts, found)

    def size(self, *, weights: int, base_bytes: int) -> Residue:
        size = self._file_bytes
        return Residue(path=self.path, bytes=size, weights=weights, coded=self._end, share=size / base_bytes)

    def _put(self, name: str, file: FileIO, place: int) -> str:
        """Write the blocks of a weight, and return their digest as read back."""
        wanted, found, position = hashlib.sha256(), hashlib.sha256(), place
        for begin, size in self._blocks[name]:
            self.spool.seek(begin)
            block = self.spool.read(size)
            wanted.update(block)
            file.seek(position)
            write_all(file, memoryview(block))
            found.update(read_bytes(file, position, size).numpy().data)
            position += size
        if found.digest() != wanted.digest():
            raise VerificationError(f"the residue of {name!r} reads back wrong; nothing was written")
        return found.hexdigest()

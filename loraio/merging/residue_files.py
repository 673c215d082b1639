"""Residue files: what `loraio.merging.residues` keeps of all weights of a merge, beside the merged checkpoint.

A merged checkpoint must stay one that every program loads; so the residue is a file of its own: a safetensors file with
a tensor of bytes for each target, and the originals of the tensors that the adapter replaced whole.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraio.adapter.adapter import Adapter
from loraio.adapter.metadata import check_strength
from loraio.bases.identity import state_sha256
from loraio.errors import ConfigError, FormatError, MissingFileError, VerificationError
from loraio.files import tensorfile
from loraio.files.copying import Inputs, Stored, write_all
from loraio.files.integrity import PENDING, is_sha256
from loraio.files.tensorfile import Header
from loraio.files.tensors import TORCH_DTYPES, tensor_bytes
from loraio.merging.checkpoint_writer import TensorPlan, copy_tensor, read_bytes
from loraio.merging.residues import LENGTHS, block_length, residue_of, restored

FORMAT_VERSION = 2
"""Version of the metadata of a residue file."""

SUFFIX = ".residue"
"""Follows the name of the merged checkpoint."""

KEY = "residue"
"""What the document of a residue file has, and no other has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Residue:
    """How large a residue is.

    Attributes:
        path: the file.
        bytes: its length.
        weights: how many numbers the folded weights hold.
        coded: bytes of their residue; the rest are originals of whole tensors and the header.
        share: of the bytes of the base's tensors.
    """

    path: Path
    bytes: int
    weights: int
    coded: int
    share: float

    @property
    def bits_per_weight(self) -> float:
        """Of the folded weights."""
        return 8 * self.coded / self.weights


def residue_beside(output: Path) -> Path:
    """Where the residue of a merged checkpoint of that name is: a file, a folder, or an index."""
    output = output if output.name not in ("", "..") else output.resolve()
    return output.with_name(output.name + SUFFIX)


class ResidueWriter:
    """Takes the blocks of a merge, from several threads, and makes the file of them.

    Blocks wait in a file of their own until it is known how many there are.

    Args:
        spool: that file, which is there already.
        strength: of the merge.
    """

    def __init__(self, spool: Path, strength: float) -> None:
        self._strength = strength
        self._spool = FileIO(spool, "r+")
        self._lock = threading.Lock()
        self._end = 0
        self._blocks: dict[str, list[tuple[int, int]]] = {}
        self.coded = 0
        self.file_bytes = 0

    def close(self) -> None:
        """Let the blocks go."""
        self._spool.close()

    def keep(self, name: str, part: Adapter, base: Tensor, folded: Tensor) -> None:
        """Take a slice of a weight; it is restored at once, and compared.

        Raises:
            VerificationError: it would not be restored.
        """
        block = residue_of(part, base, folded, self._strength)
        back = restored(part, folded, self._strength, block, where=f"{name!r}")
        if not tensor_bytes(back).equal(tensor_bytes(base)):
            raise VerificationError(f"{name!r} cannot be had back from its residue; nothing was written")
        with self._lock:
            self._spool.seek(self._end)
            write_all(self._spool, memoryview(block))
            self._blocks.setdefault(name, []).append((self._end, len(block)))
            self._end += len(block)
            self.coded += len(block)

    def write(
        self,
        path: Path,
        originals: Mapping[str, TensorPlan],
        document: Mapping[str, Any],
        *,
        inputs: Inputs,
        where: str,
    ) -> str:
        """Write the file; it is read back.

        Args:
            path: it is there already and is written over.
            originals: of the tensors that were replaced whole.
            document: what it says of the merge.
            inputs: the files that hold the originals.
            where: the file's name, for errors.

        Returns:
            digest of its tensors, as a state dict.
        """
        sizes = {name: sum(size for _, size in blocks) for name, blocks in self._blocks.items()}
        facts: dict[str, tuple[str, tuple[int, ...]]] = {name: ("U8", (size,)) for name, size in sizes.items()}
        facts |= {name: (plan.dtype, plan.shape) for name, plan in originals.items()}
        whole = {"format_version": FORMAT_VERSION, KEY: dict(document)}
        metadata = partial(tensorfile.metadata_of, whole, facts, where=where)
        start, placed = tensorfile.layout(facts, metadata(lambda _: PENDING), where=where)
        found: dict[str, str] = {}
        with FileIO(path, "r+") as file:
            file.truncate(0)
            for name, info in placed.items():
                if name in originals:
                    found[name] = copy_tensor(originals[name], file, len(start) + info.begin, inputs)
                else:
                    found[name] = self._put(name, file, len(start) + info.begin)
            self.file_bytes = file.seek(0, os.SEEK_END)
            start, _ = tensorfile.layout(facts, metadata(found.__getitem__), where=where)
            file.seek(0)
            write_all(file, memoryview(start))
        if tensorfile.read_header(path).tensors != placed:
            raise VerificationError("the header that was written is another one; nothing was written", where=where)
        return digest_of(facts, found)

    def _put(self, name: str, file: FileIO, place: int) -> str:
        """Write the blocks of a weight; their digest, as they are in the file."""
        wanted, found, position = hashlib.sha256(), hashlib.sha256(), place
        for begin, size in self._blocks[name]:
            self._spool.seek(begin)
            block = self._spool.read(size)
            wanted.update(block)
            file.seek(position)
            write_all(file, memoryview(block))
            found.update(read_bytes(file, position, size).numpy().data)
            position += size
        if found.digest() != wanted.digest():
            raise VerificationError(f"the residue of {name!r} reads back wrong; nothing was written")
        return found.hexdigest()


def digest_of(facts: Mapping[str, tuple[str, tuple[int, ...]]], known: Mapping[str, str]) -> str:
    """As `loraio.bases.identity.state_sha256`, given dtype codes and shapes."""
    state = {
        name: torch.empty(shape, dtype=getattr(torch, TORCH_DTYPES[dtype]), device="meta")
        for name, (dtype, shape) in facts.items()
    }
    return state_sha256(state, known)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidueFile:
    """What a residue file says.

    Attributes:
        header: of the file.
        adapter_sha256, base_sha256, merged_sha256: digests of the adapter's tensors and of both state dicts.
        strength: of the merge.
        tensors: digest of each tensor of the base, by name.
        stripped: what stood before every name in the base's file.
        metadata: the strings in the header of the base's file; None where it was none.
        index: the text of the index of a parted base; None for others.
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

    def place(self, name: str) -> Stored:
        """Where the bytes of a tensor are."""
        info = self.header.tensors[name]
        start = 8 + self.header.header_bytes
        return Stored(path=self.header.path, begin=start + info.begin, size=info.end - info.begin)


def index_text(path: Path) -> str:
    """The text of an index, which was read before.

    Raises:
        MissingFileError: it is gone.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MissingFileError(f"{str(path)!r} cannot be read any more: {error}") from error


def is_residue(document: Mapping[str, Any]) -> bool:
    """Whether a document is that of a residue file."""
    return KEY in document and "targets" not in document


def read_residue(path: str | os.PathLike[str]) -> ResidueFile:
    """The header of a residue file, checked.

    Raises:
        MissingFileError: no such file.
        FormatError: it is none.
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
        raise FormatError(
            f"residue version {version!r}, this loraio reads version {FORMAT_VERSION}",
            where=where,
            hint="a newer loraio",
        )
    said = document[KEY]
    if not isinstance(said, dict):
        raise FormatError(f"what it says of the merge is {said!r}, not an object", where=where)
    digests = {key: said.get(key) for key in ("adapter_sha256", "base_sha256", "merged_sha256")}
    problems = [f"{key} is {value!r}, not a digest" for key, value in digests.items() if not is_sha256(value)]
    tensors, stripped = said.get("tensors"), said.get("stripped", "")
    metadata, index = said.get("metadata"), said.get("index")
    if not isinstance(tensors, dict) or not all(map(is_sha256, tensors.values())):
        problems.append("tensors is no object of names and digests")
    if not isinstance(stripped, str):
        problems.append(f"stripped is {stripped!r}, not a text")
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        problems.append("metadata is no object of texts")
    if index is not None and not isinstance(index, str):
        problems.append("index is no text")
    try:
        strength = check_strength(said.get("strength"))  # type: ignore[arg-type]  # which it checks
    except ConfigError as error:
        problems.append(error.message)
        strength = 0.0
    if problems:
        raise FormatError("a residue that loraio did not write", problems=problems, where=where)
    return ResidueFile(
        header=header,
        **digests,  # type: ignore[arg-type]  # digests, which was checked
        strength=strength,
        tensors=tensors,  # type: ignore[arg-type]  # likewise
        stripped=stripped,
        metadata=metadata,
        index=index,
    )


class Unfolding:
    """A merge taken back: the base weight from the folded one and its residue; a `loraio.merging.checkpoint_writer.Change`.

    Args:
        adapter: what was folded in.
        residue: of the merge.
        inputs: opens the residue file.
    """

    def __init__(self, adapter: Adapter, residue: ResidueFile, inputs: Inputs) -> None:
        self.adapter = adapter
        self._residue = residue
        self._inputs = inputs
        self._read: dict[str, int] = {}

    def make(self, name: str, part: Adapter, weight: Tensor) -> Tensor:
        """The slice of the base."""
        where = f"{name!r} of {str(self._residue.header.path)!r}"
        return restored(part, weight, self._residue.strength, self._next(name, where), where=where)

    def look(self, name: str, part: Adapter, weight: Tensor, found: Tensor, so_far: Any) -> Any:
        """Nothing: the digest of the whole says whether it is the base."""
        return so_far

    def finish(self) -> None:
        """All is restored.

        Raises:
            FormatError: a residue has more blocks than the weight has slices.
        """
        for name in self.adapter.targets:
            if self._read.get(name) != self._residue.place(name).size:
                raise FormatError(f"the residue of {name!r} is longer than it should be", where=f"{name!r}")

    def _next(self, name: str, where: str) -> bytes:
        place, done = self._residue.place(name), self._read.get(name, 0)
        with self._inputs.open(place.path) as file:
            head = bytes(read_bytes(file, place.begin + done, min(4 * LENGTHS, place.size - done)).numpy().data)
            size = block_length(head, where=where)
            if done + size > place.size:
                raise FormatError("the residue is damaged: a block is longer than what there is", where=where)
            block = bytes(read_bytes(file, place.begin + done, size).numpy().data)
        self._read[name] = done + size
        return block

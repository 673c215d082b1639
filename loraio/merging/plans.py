"""Plan how each tensor of an output is made, and read the sources of these plans."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from loraio.bases.checkpoints import BaseCheckpoint
from loraio.bases.identity import state_sha256
from loraio.errors import MissingFileError
from loraio.files.copying import BLOCK, Inputs, Progress, Stored, copy_bytes, read_into, write_all
from loraio.files.tensorfile import Header
from loraio.files.tensors import TORCH_DTYPES, dtype_code, tensor_bytes
from loraio.merging.workers import run_each


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """The source of one tensor of the output, and how it is changed.

    Attributes:
        dtype: safetensors code.
        shape: shape of the source's tensor.
        source: the bytes to copy, fold or replace: in a file, or in memory.
        folded: True for a weight that is changed slice by slice.
        given: the tensor that replaces the source's, in the same dtype; the shape may differ.
        expected: digest that the source must have; None if that is checked later.
    """

    dtype: str
    shape: tuple[int, ...]
    source: Stored | Tensor
    folded: bool = False
    given: Tensor | None = None
    expected: str | None = None

    @property
    def size(self) -> int:
        """Bytes of the source."""
        return self.source.size if isinstance(self.source, Stored) else self.source.nbytes

    @property
    def made(self) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape of the tensor in the output."""
        return self.dtype, self.shape if self.given is None else tuple(self.given.shape)

    @property
    def made_size(self) -> int:
        """Bytes of the tensor in the output."""
        return self.size if self.given is None else self.given.nbytes


Plans = Mapping[str, TensorPlan]
"""Plans by the name of the tensor."""

Shards = Mapping[str, Plans]
"""Plans by the name of the file; a checkpoint that is one file has one shard."""


def copy_plans(checkpoint: BaseCheckpoint, headers: tuple[Header, ...]) -> dict[str, dict[str, TensorPlan]]:
    """Plan to copy every tensor of a checkpoint, by shard; a pickle has no headers, and is one shard without a name."""
    if not headers:
        tensors = checkpoint.state.items()
        return {"": {n: TensorPlan(dtype=dtype_code(t.dtype), shape=tuple(t.shape), source=t) for n, t in tensors}}
    return {
        header.path.name: {
            name.removeprefix(checkpoint.stripped): TensorPlan(
                dtype=info.dtype, shape=info.shape, source=stored(header, name)
            )
            for name, info in header.tensors.items()
        }
        for header in headers
    }


def replanned(shards: Shards, change: Callable[[str, TensorPlan], TensorPlan]) -> dict[str, dict[str, TensorPlan]]:
    """Return the plans of all shards with each plan changed."""
    return {file: {name: change(name, plan) for name, plan in plans.items()} for file, plans in shards.items()}


def stored(header: Header, name: str) -> Stored:
    """Return the place of a tensor's bytes in its file."""
    info, start = header.tensors[name], 8 + header.header_bytes
    return Stored(path=header.path, begin=start + info.begin, size=info.end - info.begin)


def joined(shards: Shards) -> dict[str, TensorPlan]:
    """Return the plans of all shards."""
    return {name: plan for plans in shards.values() for name, plan in plans.items()}


def facts_of(plans: Plans) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of each tensor of the output."""
    return {name: plan.made for name, plan in plans.items()}


def facts_sha256(facts: Mapping[str, tuple[str, tuple[int, ...]]], known: Mapping[str, str]) -> str:
    """Return `loraio.bases.identity.state_sha256`, given dtype codes, shapes and digests."""
    state = {
        name: torch.empty(shape, dtype=getattr(torch, TORCH_DTYPES[dtype]), device="meta")
        for name, (dtype, shape) in facts.items()
    }
    return state_sha256(state, known)


def index_text(path: Path) -> str:
    """Read an index again; raise MissingFileError if it is gone."""
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MissingFileError(f"{str(path)!r} cannot be read any more: {error}") from error


def digests_of(plans: Plans, inputs: Inputs, *, workers: int) -> dict[str, str]:
    """Return the SHA-256 of each plan's source."""
    progress = Progress()

    def job(name: str) -> str:
        with opened(plans[name].source, inputs) as source:
            return source_sha256(source, plans[name].size, progress)

    return run_each(plans, job, workers=workers, progress=progress)


def read_bytes(file: FileIO, begin: int, count: int) -> Tensor:
    """Return bytes of a file, as a flat uint8 tensor that is aligned for every dtype; errors as of `read_into`."""
    raw = torch.empty(count, dtype=torch.uint8)
    read_into(file, begin, raw.numpy().data)
    return raw


@dataclass(frozen=True, slots=True)
class InFile:
    """The bytes of a tensor in an open file."""

    stored: Stored
    file: FileIO

    def read(self, start: int, count: int) -> Tensor:
        return read_bytes(self.file, self.stored.begin + start, count)

    def fill(self, start: int, room: memoryview) -> None:
        read_into(self.file, self.stored.begin + start, room)

    def copy(self, start: int, target: FileIO, place: int, room: memoryview) -> None:
        """Copy ``len(room)`` bytes into a file; ``room`` may be written over."""
        copy_bytes(self.file, self.stored.begin + start, target, place, room)


@dataclass(frozen=True, slots=True)
class InMemory:
    """The bytes of a tensor in memory, flat uint8."""

    data: Tensor

    def read(self, start: int, count: int) -> Tensor:
        return self.data[start : start + count]

    def fill(self, start: int, room: memoryview) -> None:
        room[:] = self.read(start, len(room)).numpy().data

    def copy(self, start: int, target: FileIO, place: int, room: memoryview) -> None:
        target.seek(place)
        write_all(target, self.read(start, len(room)).numpy().data)


Source = InFile | InMemory


@contextlib.contextmanager
def opened(source: Stored | Tensor, inputs: Inputs) -> Iterator[Source]:
    """Open a plan's source for reading."""
    if isinstance(source, Tensor):
        yield InMemory(tensor_bytes(source))
        return
    with inputs.open(source.path) as file:
        yield InFile(source, file)


def source_sha256(source: Source, size: int, progress: Progress) -> str:
    """Return the SHA-256 of a source, read block by block."""
    whole, room = hashlib.sha256(), memoryview(bytearray(min(BLOCK, size)))
    for start in range(0, size, BLOCK):
        block = room[: min(BLOCK, size - start)]
        source.fill(start, block)
        whole.update(block)
        progress.add(0)
    return whole.hexdigest()

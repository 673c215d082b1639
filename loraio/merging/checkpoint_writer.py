"""Write a checkpoint tensor by tensor, in memory that does not grow with the checkpoint.

A tensor of the output is copied from its source, changed slice by slice, or given by the adapter. Everything written
is read back: the digest comes from the output, and a changed slice is checked while its source is still in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from loraio.adapter.adapter import Adapter, parts_of
from loraio.errors import VerificationError
from loraio.files.atomic import flushed_early
from loraio.files.copying import BLOCK, Inputs, Progress, read_into, write_all
from loraio.files.integrity import PENDING
from loraio.files.tensorfile import layout, metadata_of, read_header
from loraio.files.tensors import TORCH_DTYPES, tensor_bytes
from loraio.merging.effect import Fold
from loraio.merging.plans import InMemory, Plans, Source, TensorPlan, facts_of, opened, read_bytes, source_sha256
from loraio.merging.workers import run_each


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """Digests of a tensor in the output and of its source, and the evidence if it is a folded weight."""

    sha256: str
    source_sha256: str
    fold: Fold | None = None


Metadata = Callable[[Mapping[str, Written]], Mapping[str, str]]
"""Returns a file's metadata once all tensors are written. It is called first with an empty mapping, for the length,
which must not depend on the argument."""


class Change(Protocol):
    """Changes weights slice by slice; the slices of one weight come in order, in one thread."""

    @property
    def adapter(self) -> Adapter:
        """The adapter that is folded in or taken out."""

    def make(self, name: str, part: Adapter, weight: Tensor) -> Tensor:
        """Return the new slice of a weight, given the adapter for the slice from `loraio.adapter.parts_of`."""

    def look(self, name: str, part: Adapter, weight: Tensor, found: Tensor, so_far: Fold) -> Fold:
        """Return the evidence for a slice as it was written; ``so_far`` is that for the slices before it."""


class SourceDiffersError(Exception):
    """The bytes of a source are not the expected ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointWriter:
    """Writes safetensors files, and checks what was written.

    Attributes:
        inputs: the files that the plans name.
        workers: number of threads; the bytes do not depend on it.
        progress: counts bytes of the output.
        where: name of the output, for errors.
        change: changes the folded weights; None if there are none.
    """

    inputs: Inputs
    workers: int
    progress: Progress
    where: str
    change: Change | None = None

    def write(self, plans: Plans, path: Path, metadata: Metadata, *, prefix: str = "") -> dict[str, Written]:
        """Write an existing file over; ``prefix`` stands before every name in it.

        Raises:
            SourceDiffersError: a source does not have the digest that its plan expects.
            FormatError, MissingFileError: a source changed or went away.
            AdapterError: a sum overflows.
            VerificationError: the header reads back wrong. Weights are for the caller to judge.
        """
        facts = {prefix + name: fact for name, fact in facts_of(plans).items()}
        start, placed = layout(facts, metadata({}), where=self.where)

        def job(name: str) -> Written:
            plan, place = plans[name], len(start) + placed[prefix + name].begin
            with opened(plan.source, self.inputs) as source, FileIO(path, "r+") as target:
                if self.change is not None and plan.folded:
                    made = _change(name, plan, source, target, place, self.change, self.progress)
                elif plan.given is not None:
                    made = _give(plan.given, plan, source, target, place, self.progress)
                else:
                    made = _copy(plan, source, target, place, self.progress)
            if plan.expected not in (None, made.source_sha256):
                raise SourceDiffersError(name)
            return made

        size = len(start) + sum(plan.made_size for plan in plans.values())
        with FileIO(path, "r+") as file:
            file.truncate(size)
        with flushed_early(path, size):
            names = (name[len(prefix) :] for name in placed)
            written = run_each(names, job, workers=self.workers, progress=self.progress)
        end, _ = layout(facts, metadata(written), where=self.where)
        with FileIO(path, "r+") as file:
            write_all(file, memoryview(end))
        self.inputs.check()
        if read_header(path).tensors != placed:
            raise VerificationError("the header reads back wrong; nothing was written", where=self.where)
        return written


def document_metadata(
    document: Mapping[str, Any], plans: Plans, written: Mapping[str, Written], *, where: str
) -> dict[str, str]:
    """Return metadata with a document of loraio and the digest of each tensor; without tensors of the same length."""
    digests = {name: tensor.sha256 for name, tensor in written.items()} or dict.fromkeys(plans, PENDING)
    return metadata_of(document, facts_of(plans), digests.__getitem__, where=where)


def copy_tensor(plan: TensorPlan, target: FileIO, place: int, inputs: Inputs) -> str:
    """Copy the bytes of a plan's source into a file, and return the digest of the copy."""
    with opened(plan.source, inputs) as source:
        return _copy(plan, source, target, place, Progress()).sha256


def _change(
    name: str, plan: TensorPlan, source: Source, target: FileIO, place: int, change: Change, progress: Progress
) -> Written:
    before, after, fold = hashlib.sha256(), hashlib.sha256(), Fold()
    dtype = getattr(torch, TORCH_DTYPES[plan.dtype])
    row = plan.size // plan.shape[0]
    for at, part in parts_of(change.adapter, name):
        start, shape = at.start * row, (at.stop - at.start, *plan.shape[1:])
        raw = source.read(start, shape[0] * row)
        before.update(raw.numpy().data)
        weight = raw.view(dtype).view(shape)
        target.seek(place + start)
        write_all(target, tensor_bytes(change.make(name, part, weight)).numpy().data)
        raw = read_bytes(target, place + start, shape[0] * row)
        after.update(raw.numpy().data)
        fold += change.look(name, part, weight, raw.view(dtype).view(shape), fold)
        progress.add(len(raw))
    return Written(sha256=after.hexdigest(), source_sha256=before.hexdigest(), fold=fold)


def _give(given: Tensor, plan: TensorPlan, source: Source, target: FileIO, place: int, progress: Progress) -> Written:
    before = source_sha256(source, plan.size, Progress())
    written = _copy(replace(plan, source=given), InMemory(tensor_bytes(given)), target, place, progress)
    return replace(written, source_sha256=before)


def _copy(plan: TensorPlan, source: Source, target: FileIO, place: int, progress: Progress) -> Written:
    """Copy a source block by block; the blocks of the file are read back while they are in the processor's cache."""
    digest, done, room = hashlib.sha256(), 0, memoryview(bytearray(min(BLOCK, plan.size)))
    while done < plan.size:
        at = place + done
        block = room[: min(BLOCK - at % BLOCK, plan.size - done)]
        source.copy(done, target, at, block)
        read_into(target, at, block)
        digest.update(block)
        done += len(block)
        progress.add(len(block))
    return Written(sha256=digest.hexdigest(), source_sha256=digest.hexdigest())

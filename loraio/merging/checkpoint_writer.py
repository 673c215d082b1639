"""A checkpoint made of another one, tensor by tensor: what that takes of memory does not grow with the checkpoint.

A tensor of the output is one of three things: bytes of the source, which the system copies from file to file; a weight
that is changed, slice by slice, which for a merge is a fold; or a tensor that the adapter gives. Everything that was
written is read back: from that comes its digest, and a changed slice is looked at while the slice of the source is
still at hand.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from io import FileIO
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from loraio.adapter.adapter import Adapter, parts_of
from loraio.errors import ConfigError, VerificationError
from loraio.files.atomic import flushed_early, reserve
from loraio.files.copying import (
    BLOCK,
    Copied,
    Inputs,
    Progress,
    StoppedError,
    Stored,
    changed,
    copy_range,
    read_into,
    write_all,
)
from loraio.files.tensorfile import layout, read_header
from loraio.files.tensors import TORCH_DTYPES, tensor_bytes
from loraio.merging.weight_check import FoldCheck, check_fold

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """What one tensor of the output is made of.

    Attributes:
        dtype: safetensors code.
        shape: of the base's tensor.
        source: where its bytes are, or those of the base's tensor that is folded or replaced: in a file, or in memory.
        folded: whether it is changed slice by slice, as a weight that an adapter is folded into.
        given: what the base's tensor is replaced by, in its dtype; the shape may be another.
        expected: the digest that the source must have; None where it is looked at later.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """What became of a weight that was folded.

    Attributes:
        check: against the reference.
        length: squared Euclidean length of the base weight.
        moved: that of the change.
    """

    check: FoldCheck = field(default_factory=FoldCheck)
    length: float = 0.0
    moved: float = 0.0

    @classmethod
    def of(cls, check: FoldCheck, base: Tensor, found: Tensor) -> Fold:
        """Of a slice of the weight, before and after."""
        wide = torch.promote_types(base.dtype, torch.float32)
        plain = base.to(wide).flatten()
        moved = found.to(wide).flatten() - plain
        if base.dtype == torch.float32:
            plain, moved = plain.double(), moved.double()
        change = float(moved.dot(moved))
        if not change and not found.equal(base):  # too small to be squared
            change = sys.float_info.min
        return cls(check=check, length=float(plain.dot(plain)), moved=change)

    def __add__(self, other: Fold) -> Fold:
        return Fold(check=self.check + other.check, length=self.length + other.length, moved=self.moved + other.moved)

    @property
    def change(self) -> float:
        """Length of the change relative to that of the weight; infinite where a weight of zeros changes."""
        if not self.moved:
            return 0.0
        return math.sqrt(self.moved / self.length) if self.length else math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """One tensor of the output, as it was found there.

    Attributes:
        sha256: digest of what is in the output.
        source_sha256: digest of what it was made from; of copied bytes the same.
        fold: what became of a weight that was folded.
    """

    sha256: str
    source_sha256: str
    fold: Fold | None = None


class Change(Protocol):
    """What becomes of the weights that are changed; slices of one weight come in order, in one thread."""

    @property
    def adapter(self) -> Adapter:
        """Whose targets they are."""
        ...

    def make(self, name: str, part: Adapter, weight: Tensor) -> Tensor:
        """The new slice of a weight.

        Args:
            name: of the weight.
            part: the adapter's part for the slice, as `loraio.adapter.parts_of` gives it.
            weight: the slice.
        """
        ...

    def look(self, name: str, part: Adapter, weight: Tensor, found: Tensor, so_far: Fold) -> Fold:
        """What became of the slice, given what was written; ``so_far`` is what became of those before it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Folding:
    """A merge: the adapter is folded in, and what was written is compared with the reference.

    Attributes:
        adapter: what is folded in.
        strength: multiplies its scale.
        exact: whether weights are folded in float64, or in float32.
        keep: is given every slice, as it was and as it is now.
    """

    adapter: Adapter
    strength: float
    exact: bool
    keep: Callable[[str, Adapter, Tensor, Tensor], None] | None = None

    def make(self, name: str, part: Adapter, weight: Tensor) -> Tensor:
        """The slice folded."""
        return part.fold(name, weight, strength=self.strength, exact=self.exact)

    def look(self, name: str, part: Adapter, weight: Tensor, found: Tensor, so_far: Fold) -> Fold:
        """Evidence for the slice."""
        check = check_fold(part, weight, found, self.strength, exact=self.exact, told=so_far.check.max_ulp)
        if self.keep is not None:
            self.keep(name, part, weight, found)
        return Fold.of(check, weight, found)


class SourceDiffersError(Exception):
    """The bytes of a tensor are not those that were expected."""


def counting(report: Callable[[int, int], None] | None, total: int) -> Progress:
    """Progress that is reported as bytes done, of so many in all."""
    if report is None:
        return Progress()
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        report(done, total)

    return Progress(add)


def worker_count(workers: int | None) -> int:
    """How many threads there are to be: one for each processor, but at most four, where nobody says.

    Raises:
        ConfigError: none.
    """
    count = min(os.cpu_count() or 1, 4) if workers is None else workers
    if count < 1:
        raise ConfigError(f"{count} workers do no work")
    return count


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """The workers share the processors; each operation keeps to the one of its worker.

    For products of NumPy too: the threads of its OpenBLAS wait for each other by running in circles, and several
    workers that call it at once wait for its threads.
    """
    counts = [(torch.get_num_threads, torch.set_num_threads), *_openblas()]
    before = [get() for get, _ in counts]
    try:
        for _, put in counts:
            put(1)
        yield
    finally:
        for (_, put), count in zip(counts, before, strict=True):
            put(count)


@functools.cache
def _openblas() -> list[tuple[Callable[[], int], Callable[[int], None]]]:
    """How many threads NumPy's OpenBLAS has, and how to set that; nothing where NumPy has another library."""
    modules = (sys.modules.get(f"numpy.{core}._multiarray_umath") for core in ("_core", "core"))
    module = next((module for module in modules if module is not None), None)
    if module is None:
        return []
    try:
        library = ctypes.CDLL(module.__file__)  # and those that it is linked with
    except OSError:
        return []
    names = [f"{start}{{}}_num_threads{end}" for start in ("scipy_openblas_", "openblas_") for end in ("64_", "")]
    return [
        (getattr(library, name.format("get")), getattr(library, name.format("set")))
        for name in names
        if hasattr(library, name.format("set")) and hasattr(library, name.format("get"))
    ]


def digests_of(plans: Mapping[str, TensorPlan], inputs: Inputs, *, workers: int, progress: Progress) -> dict[str, str]:
    """SHA-256 of the sources of some tensors, by name."""

    def job(name: str) -> str:
        plan, whole = plans[name], hashlib.sha256()
        with _opened(plan.source, inputs) as source:
            for block in _blocks(source, plan.size):
                whole.update(block)
                progress.add(0)
        return whole.hexdigest()

    return _each(plans, job, workers=workers, progress=progress)


def copy_tensor(plan: TensorPlan, target: FileIO, place: int, inputs: Inputs) -> str:
    """Copy the bytes of a tensor's source into a file; their digest, as they are there."""
    with _opened(plan.source, inputs) as source:
        return _copy(plan, source, target, place, progress=Progress()).sha256


def read_bytes(file: FileIO, begin: int, count: int) -> Tensor:
    """Bytes of a file, as a flat uint8 tensor that is aligned for every dtype.

    Raises:
        MissingFileError, FormatError: they cannot be read, or there are not so many.
    """
    raw = torch.empty(count, dtype=torch.uint8)
    read_into(file, begin, raw.numpy().data)
    return raw


def read_source(plan: TensorPlan, inputs: Inputs) -> Tensor:
    """All bytes of a tensor's source, as a flat uint8 tensor."""
    with _opened(plan.source, inputs) as source:
        return source.read(0, plan.size)


def write_tensors(
    plans: Mapping[str, TensorPlan],
    path: Path,
    *,
    metadata: Callable[[Mapping[str, Written]], Mapping[str, str]],
    inputs: Inputs,
    workers: int,
    progress: Progress,
    where: str,
    change: Change | None = None,
    prefix: str = "",
) -> dict[str, Written]:
    """Write one safetensors file, tensor by tensor, and look at what was written.

    Args:
        plans: of all tensors, by name.
        path: the file, which is there already and is written over.
        metadata: gives the file's metadata when everything else is written; called first with nothing, for its length,
            which must not depend on what it is called with.
        inputs: the files that the plans name.
        workers: threads; the bytes do not depend on how many there are.
        progress: is told about the bytes of the output.
        where: the output's name, for errors.
        change: what becomes of the weights that are to be folded; None where there are none.
        prefix: stands before every name in the file.

    Raises:
        SourceDiffersError: a source has not the digest that its plan expects.
        FormatError, MissingFileError: a source changed or went away.
        AdapterError: a sum overflows.
        VerificationError: the header reads back wrong; what the weights are is for the caller to judge.
    """
    facts = {prefix + name: plan.made for name, plan in plans.items()}
    start, placed = layout(facts, metadata({}), where=where)

    def job(name: str) -> Written:
        plan, place = plans[name], len(start) + placed[prefix + name].begin
        with _opened(plan.source, inputs) as source, FileIO(path, "r+") as target:
            if change is not None and plan.folded:
                made = _change(name, plan, source, target, place, change=change, progress=progress)
            elif plan.given is not None:
                made = _give(plan.given, plan, source, target, place, progress=progress)
            else:
                made = _copy(plan, source, target, place, progress=progress)
        if plan.expected not in (None, made.source_sha256):
            raise SourceDiffersError(name)
        return made

    size = len(start) + sum(plan.made_size for plan in plans.values())
    with FileIO(path, "r+") as file:
        reserve(file, size)
    with flushed_early(path, size):
        written = _each((name[len(prefix) :] for name in placed), job, workers=workers, progress=progress)
    end, _ = layout(facts, metadata(written), where=where)
    with FileIO(path, "r+") as file:
        write_all(file, memoryview(end))
    inputs.check()
    if read_header(path).tensors != placed:
        raise VerificationError("the header that was written is another one; nothing was written", where=where)
    return written


def _change(
    name: str, plan: TensorPlan, source: _Source, target: FileIO, place: int, *, change: Change, progress: Progress
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


def _give(
    given: Tensor, plan: TensorPlan, source: _Source, target: FileIO, place: int, *, progress: Progress
) -> Written:
    before = hashlib.sha256()
    for block in _blocks(source, plan.size):
        before.update(block)
    written = _copy(replace(plan, source=given), _InMemory(tensor_bytes(given)), target, place, progress=progress)
    return replace(written, source_sha256=before.hexdigest())


def _copy(plan: TensorPlan, source: _Source, target: FileIO, place: int, *, progress: Progress) -> Written:
    copied = Copied()
    for count in copied.go_on(source.copy, target, place, plan.size):
        progress.add(count)
    sha256 = copied.digest.hexdigest()
    return Written(sha256=sha256, source_sha256=sha256)


def _blocks(source: _Source, size: int) -> Iterator[memoryview]:
    """The bytes of a tensor, in memory that is used again for each block."""
    room = memoryview(bytearray(min(BLOCK, size)))
    for start in range(0, size, BLOCK):
        block = room[: min(BLOCK, size - start)]
        source.fill(start, block)
        yield block


class _Source(Protocol):
    """The bytes of one tensor."""

    def read(self, start: int, count: int) -> Tensor:
        """Some of them, as a flat uint8 tensor."""
        ...

    def fill(self, start: int, room: memoryview) -> None:
        """As many as there is room for."""
        ...

    def copy(self, start: int, target: FileIO, place: int, room: memoryview) -> None:
        """Put as many into a file as there is room for in memory, of which use may be made."""
        ...


@dataclass(frozen=True, slots=True)
class _InMemory:
    data: Tensor

    def read(self, start: int, count: int) -> Tensor:
        return self.data[start : start + count]

    def fill(self, start: int, room: memoryview) -> None:
        room[:] = self.read(start, len(room)).numpy().data

    def copy(self, start: int, target: FileIO, place: int, room: memoryview) -> None:
        target.seek(place)
        write_all(target, self.read(start, len(room)).numpy().data)


@dataclass(frozen=True, slots=True)
class _InFile:
    stored: Stored
    file: FileIO

    def read(self, start: int, count: int) -> Tensor:
        return read_bytes(self.file, self.stored.begin + start, count)

    def fill(self, start: int, room: memoryview) -> None:
        read_into(self.file, self.stored.begin + start, room)

    def copy(self, start: int, target: FileIO, place: int, room: memoryview) -> None:
        if copy_range(self.file, self.stored.begin + start, target, place, len(room), room=room) < len(room):
            raise changed(self.stored.path)


@contextlib.contextmanager
def _opened(source: Stored | Tensor, inputs: Inputs) -> Iterator[_Source]:
    if isinstance(source, Tensor):
        yield _InMemory(tensor_bytes(source))
        return
    with inputs.open(source.path) as file:
        yield _InFile(source, file)


def _each(names: Iterable[str], job: Callable[[str], T], *, workers: int, progress: Progress) -> dict[str, T]:
    """What a job gives for each name, in threads; the first exception of any of them ends all."""
    names = list(names)

    def guarded(name: str) -> T:
        try:
            return job(name)
        except BaseException:
            progress.stopped = True
            raise

    with ThreadPoolExecutor(max_workers=workers) as pool:
        futures = [pool.submit(guarded, name) for name in names]
        try:
            results = wait(futures, return_when=FIRST_EXCEPTION)
        except BaseException:  # an interrupt
            progress.stopped = True
            raise
        finally:
            for future in futures:
                future.cancel()
    failures = [failure for future in results.done if not future.cancelled() and (failure := future.exception())]
    if failures:
        raise next((failure for failure in failures if not isinstance(failure, StoppedError)), failures[0])
    return {name: future.result() for name, future in zip(names, futures, strict=True)}

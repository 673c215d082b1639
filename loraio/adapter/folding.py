"""Fold factors into a weight slice by slice: widen, sum in a wider dtype, and round once.

A whole weight is larger than a processor's caches. A slice stays in the cache from one pass to the next.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from loraio.adapter.kinds import Kind
from loraio.adapter.layers import LayerType

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK = 2**18
"""Numbers of a weight that are folded at a time on the CPU: in float64 they fill two megabytes."""

_thread = threading.local()  # what each thread keeps: `_scratch`

_OUT, _FAN_IN, _RANK = -1, -2, -3  # stand for sizes, to learn which axis of a factor is which


def slices(shape: Sequence[int], layer: LayerType, kind: Kind) -> list[slice]:
    """Cut a weight along its first dimension into slices of about `BLOCK` numbers, for a fold on the CPU.

    The slices follow from the shape alone, so that a weight is summed in the same order everywhere. A weight that must
    be folded as a whole comes in one slice.

    Args:
        shape: of the weight.
        layer: how it is a matrix.
        kind: how factors change that.
    """
    if layer.slices == "neither" or (layer.slices == "columns" and not kind.columns_apart):
        return [slice(0, shape[0])]
    rows = max(BLOCK // math.prod(shape[1:]), 1)
    rows = rows // 8 * 8 or rows  # eights suit the kernels of matrix products
    return [slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows)]


def share(at: slice, factors: Mapping[str, Tensor], layer: LayerType, kind: Kind) -> dict[str, Tensor]:
    """Return views of the factors that one of the `slices` needs.

    Args:
        at: the slice.
        factors: of the whole weight, by short name.
        layer, kind: of the weight and the adapter.
    """
    return _share(at, factors, _axes(layer, kind))


def _axes(layer: LayerType, kind: Kind) -> dict[str, int | None]:
    """Return the axis along which each factor is cut with the weight; None for a factor that all slices need."""
    along = {"rows": _OUT, "columns": _FAN_IN}.get(layer.slices)
    shapes = kind.shapes(_OUT, _FAN_IN, _RANK)
    return {short: shape.index(along) if along in shape else None for short, shape in shapes.items()}


def _share(at: slice, factors: Mapping[str, Tensor], axes: Mapping[str, int | None]) -> dict[str, Tensor]:
    return {
        short: factor if (axis := axes[short]) is None else factor.narrow(axis, at.start, at.stop - at.start)
        for short, factor in factors.items()
    }


class SlicedFold:
    """A fold in progress: each number is a sum in a wider dtype, rounded once, ties to even.

    Every slice is widened into contiguous memory, so that the weight's address and strides do not change the sums.
    Each slice is written by one operation.

    Args:
        weight: on the CPU, plain memory; any float dtype and strides.
        factors: by short name, likewise.
        layer, groups: how the weight is a matrix.
        kind: how factors change it.
        scale, strength: as `Kind.fold` takes them.
        wide: the dtype of the sums: float64, or float32 for weights that have no more.
    """

    def __init__(
        self,
        weight: Tensor,
        factors: Mapping[str, Tensor],
        *,
        layer: LayerType,
        kind: Kind,
        groups: int,
        scale: float,
        strength: float,
        wide: torch.dtype,
    ) -> None:
        self.weight = weight
        self.slices = slices(weight.shape, layer, kind)
        self._factors = {short: factor.to(wide, copy=True).contiguous() for short, factor in factors.items()}
        self._layer, self._kind, self._groups = layer, kind, groups
        self._scale, self._strength, self._wide = scale, strength, wide

    def write(self, folded: Tensor, start: int = 0) -> Tensor:
        """Fold the slices from one on.

        Args:
            folded: where they go, shape and dtype of the weight; the weight itself, perhaps.
            start: the number of the first.
        """
        import torch

        from loraio.adapter.rounding import ready_to_round

        layer, groups, wide, same = self._layer, self._groups, self._wide, folded is self.weight
        if folded.dtype == torch.float64:
            return self._write_in_order(folded, start)
        direct = wide == folded.dtype == torch.float32 and (self._kind.writes_once or not same)
        if direct and _shares_memory(layer.to_matrix(folded, groups), folded):
            return self._write_directly(folded, start)
        in_halves = wide == torch.float64 and folded.dtype in (torch.float16, torch.bfloat16)
        scratch = _scratch(self.slices[0].stop * math.prod(folded.shape[1:]), wide)
        room: Tensor | None = None
        for old, new, mine in self._parts(folded, start):
            if room is None or room.shape != old.shape:  # but the last slice all have one shape
                room = scratch[: old.numel()].view(old.shape)
                matrix = layer.to_matrix(room, groups)
                result = layer.from_matrix(matrix, old.shape, groups)
                views = _shares_memory(matrix, room) and _shares_memory(result, room)
            room.copy_(old)
            if not views:
                matrix = layer.to_matrix(room, groups)
            self._fold(matrix, mine)
            if not views:
                result = layer.from_matrix(matrix, old.shape, groups)
            new.copy_(ready_to_round(result, folded.dtype) if in_halves else result)
        return folded

    def _write_in_order(self, folded: Tensor, start: int) -> Tensor:
        """Sum float64 weights in a fixed order: no rounding hides in which order a library adds."""
        for old, new, mine in self._parts(folded, start):
            matrix = self._layer.to_matrix(old, self._groups)
            with _no_autocast():
                made = self._kind.fold_in_order(matrix, mine, scale=self._scale, strength=self._strength)
            new.copy_(self._layer.from_matrix(made, old.shape, self._groups))
        return folded

    def _write_directly(self, folded: Tensor, start: int) -> Tensor:
        """Sum where the result is to be."""
        for old, new, mine in self._parts(folded, start):
            if new is not old:
                new.copy_(old)
            self._fold(self._layer.to_matrix(new, self._groups), mine)
        return folded

    def _parts(self, folded: Tensor, start: int) -> Iterator[tuple[Tensor, Tensor, Mapping[str, Tensor]]]:
        """Old and new memory of each slice from one on, and its share of the factors."""
        weight, factors = self.weight, self._factors
        if len(self.slices) == 1:
            yield from [(weight, folded, factors)][start:]
            return
        axes = _axes(self._layer, self._kind)
        for at in self.slices[start:]:
            old = weight[at]
            yield old, old if folded is weight else folded[at], _share(at, factors, axes)

    def _fold(self, matrix: Tensor, factors: Mapping[str, Tensor]) -> None:
        with _no_autocast():
            self._kind.fold_(matrix, factors, scale=self._scale, strength=self._strength)


def _no_autocast() -> AbstractContextManager[object]:
    import torch

    return torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else _NOTHING


_NOTHING: AbstractContextManager[object] = nullcontext()


def _scratch(numbers: int, dtype: torch.dtype) -> Tensor:
    """Return memory to sum in. Each thread reuses its block, since fresh memory costs page faults."""
    import torch

    if numbers > BLOCK:
        return torch.empty(numbers, dtype=dtype)
    kept: Tensor | None = getattr(_thread, "scratch", None)
    if kept is None:
        with torch.inference_mode(False):  # or else it could be written to in that mode alone
            kept = _thread.scratch = torch.empty(BLOCK, dtype=torch.float64)
    return kept.view(dtype)[:numbers]


def _shares_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()

"""A weight and its factors give the new weight: summed slice by slice in a wider dtype, and rounded once.

A weight is larger than a processor's caches, and so are the passes that widening, summing and rounding take over it:
slice by slice, each of them finds in the cache what the one before has left there.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from loraio.kinds import Kind
from loraio.layers import LayerType

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK = 2**18
"""Numbers of a weight that are folded at a time on the CPU: in float64 they fill two megabytes."""

_thread = threading.local()  # what each thread keeps: `_scratch`

_OUT, _FAN_IN, _RANK = -1, -2, -3  # stand for sizes, to learn which axis of a factor is which


def slices(shape: Sequence[int], layer: LayerType, kind: Kind) -> list[slice]:
    """How a weight is parted for a fold on the CPU, along its first dimension, into about `BLOCK` numbers each.

    It follows from the shape alone, so that a weight is summed in the same order wherever and by whomever it is folded.
    A weight of which no slice can be folded by itself comes in one.

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
    """What one of the `slices` needs of the factors, as views.

    Args:
        at: the slice.
        factors: of the whole weight, by short name.
        layer, kind: of the weight and the adapter.
    """
    along = {"rows": _OUT, "columns": _FAN_IN}.get(layer.slices)
    axes = kind.shapes(_OUT, _FAN_IN, _RANK)
    return {
        short: factor[tuple(at if axis == along else slice(None) for axis in axes[short])]
        for short, factor in factors.items()
    }


def fold_by_slices(
    weight: Tensor,
    factors: Mapping[str, Tensor],
    *,
    layer: LayerType,
    kind: Kind,
    groups: int,
    scale: float,
    strength: float,
    wide: torch.dtype,
) -> Tensor:
    """The new weight, each number a sum in a wider dtype that is rounded once, to nearest, ties to even.

    Every slice is widened into one piece of memory of its own: the bits of a float64 sum do not depend on where in
    memory the weight lies, nor in which order.

    Args:
        weight: on the CPU, plain memory; any float dtype and strides.
        factors: by short name, likewise.
        layer, groups: how the weight is a matrix.
        kind: how factors change it.
        scale, strength: as `Kind.fold` takes them.
        wide: the dtype of the sums: float64, or float32 for weights that have no more.

    Returns:
        a new tensor, shape, dtype and strides of ``weight``.
    """
    import torch

    from loraio.lowrank import ready_to_round

    folded = torch.empty_like(weight)  # with its strides: channels_last runs other kernels
    cast = {short: factor.to(wide, copy=True).contiguous() for short, factor in factors.items()}
    parts = slices(weight.shape, layer, kind)
    in_place = wide == weight.dtype == torch.float32 and _shares_memory(layer.to_matrix(folded, groups), folded)
    in_halves = wide == torch.float64 and weight.dtype in (torch.float16, torch.bfloat16)
    scratch = None if in_place else _scratch(parts[0].stop * math.prod(weight.shape[1:]), wide)
    off = torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()
    with off:
        for at in parts:
            mine, old, new = cast, weight, folded
            if len(parts) > 1:
                mine, old, new = share(at, cast, layer, kind), weight[at], folded[at]
            block = (new if scratch is None else scratch[: old.numel()].view(old.shape)).copy_(old)
            matrix = layer.to_matrix(block, groups)
            kind.fold_(matrix, mine, scale=scale, strength=strength)
            if scratch is not None:
                result = layer.from_matrix(matrix, old.shape, groups)
                new.copy_(ready_to_round(result, weight.dtype) if in_halves else result)
    return folded


def _scratch(numbers: int, dtype: torch.dtype) -> Tensor:
    """Memory to sum in: that of the thread's last fold, where a block is enough. The system need not give it anew."""
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

"""Refuse adapters that make a weight overflow, from the factors alone where possible."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from loraio.adapter.metadata import Target
from loraio.errors import AdapterError


def refuse_overflow(
    targets: Mapping[str, Target],
    factors: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    *,
    strength: float,
    exact: bool = True,
) -> None:
    """Refuse an adapter with which a weight would overflow, as `loraio.merge` does.

    Rounding to nearest, no finite weight becomes infinite by a change of less than half of the spacing of numbers at
    the upper end of its dtype: 1e31 in float32, 16 in float16. Only where the factors may change a weight by more is
    it folded, and looked at.

    Args:
        targets: of the adapter, by name.
        factors: by the weight's name and the factor's, as `Adapter.factors`.
        weights: the base weights, by name, among others.
        strength: multiplies the scale.
        exact: as `Target.fold` takes it.

    Raises:
        AdapterError: a sum overflows the weight's dtype.
    """
    with torch.no_grad():
        own = {
            name: {short: factors[f"{name}.{short}"] for short in target.factor_shapes}
            for name, target in targets.items()
        }
        shorts = {short for each in own.values() for short in each}
        peaks = {short: _peak([each[short] for each in own.values() if short in each]) for short in shorts}
        dtypes = {weights[name].dtype for name in targets}
        forms = {(target.kind, target.rank, target.scale): target for target in targets.values()}.values()
        if all(form.stays_finite(peaks, dtype, strength=strength) for form in forms for dtype in dtypes):
            return
        for name, target in targets.items():
            peaks = {short: _peak([factor]) for short, factor in own[name].items()}
            weight = weights[name]
            if not target.stays_finite(peaks, weight.dtype, strength=strength):
                fold_finite(name, target, weight, own[name], strength=strength, exact=exact)


def _peak(tensors: list[Tensor]) -> float:
    """Return the largest magnitude of all tensors; NaN if there is one."""
    if len({tensor.device for tensor in tensors}) > 1:
        return max(_peak([tensor]) for tensor in tensors)
    return float(torch.cat([tensor.detach().flatten() for tensor in tensors]).abs_().max())


def fold_finite(
    name: str,
    target: Target,
    weight: Tensor,
    factors: Mapping[str, Tensor],
    *,
    strength: float = 1.0,
    exact: bool = True,
) -> Tensor:
    """Fold as `Target.fold` does, with factors on any device, and refuse a sum that overflows.

    Args:
        name: of the target, for the error.
        target, weight, factors, strength, exact: as `Target.fold` takes them.

    Raises:
        AdapterError: the sum overflows the weight's dtype.
    """
    moved = {short: factor.to(weight.device) for short, factor in factors.items()}
    folded = target.fold(weight, moved, strength=strength, exact=exact)
    if weight.numel() > 16 * target.parameters:  # the factors are read sooner
        peaks = {short: float(torch.linalg.vector_norm(factor, math.inf)) for short, factor in moved.items()}
        if target.stays_finite(peaks, weight.dtype, strength=strength):
            return folded
    # a sum is finite only where all are; but one of finite numbers may overflow itself
    suspect = not math.isfinite(float(folded.sum(dtype=torch.promote_types(folded.dtype, torch.float32))))
    if suspect and bool((weight.isfinite() & ~folded.isfinite()).any()):
        raise AdapterError(f"{name!r}: the sum overflows {weight.dtype} at strength {strength:g}")
    return folded

"""Check merged weights against a reference in NumPy float64, which shares no code with the merge."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loraio.adapter.adapter import Adapter, parts_of
from loraio.adapter.kinds import KINDS
from loraio.adapter.layers import LAYER_TYPES
from loraio.adapter.metadata import check_strength
from loraio.adapter.rounding import ulp
from loraio.bases.identity import check_base
from loraio.files.tensors import tensor_bytes

MAX_ULP = 0.5
"""Largest distance of a folded weight from the exact sum, in units in the last place: one rounding to nearest."""

NEAR = 0.49
"""Half-precision weights that are surely nearer to their sums than this, in ulp, are not checked in float64."""

UNDERFLOW = 2.0**-10
"""The largest error that underflow in float32 may hide, in ulp of a half-precision dtype.

Underflow costs at most 2**-149 in each product, while the ulp of bfloat16 is at least 2**-133.
"""

_NARROW = (torch.bfloat16, torch.float16)
_EXPONENT = np.int32(0x7F800000)  # of a float32: masks a number down to a power of two


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightReport:
    """Comparison of merged weights with base and adapter.

    Attributes:
        folded: number of tensors that the adapter changes.
        replaced: number of tensors that must be the adapter's own, bit for bit.
        untouched: number of tensors that must stay bit-identical.
        values: number of values in the folded tensors.
        max_ulp: largest distance of a folded weight from the exact sum, in units in the last place of the weight's
            dtype. The error of the float64 sums is taken off: about 1e-8 ulp for float32 weights, but a few ulp for
            float64 weights, which have no wider dtype.
        not_correctly_rounded: number of folded weights that are farther off than 0.5 ulp.
        problems: a line for each tensor that is missing, left over, changed, or folded wrong.
    """

    folded: int
    replaced: int
    untouched: int
    values: int
    max_ulp: float
    not_correctly_rounded: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """True if every tensor is right."""
        return not self.problems


def verify_weights(
    state_dict: Mapping[str, Tensor],
    adapter: Adapter,
    merged: Mapping[str, Tensor],
    strength: float = 1.0,
    *,
    allow_base_mismatch: bool = False,
    exact: bool = True,
) -> WeightReport:
    """Check merged weights as `verify` does, without a network.

    The reference is computed in NumPy, in float64, and shares no code with the merge. Weights of a merge that was not
    exact are wrong only if they are farther off than float32 sums can be.

    Raises:
        BaseMismatchError: the adapter does not belong to this base.
        ConfigError: the strength is not a finite number.
    """
    strength = check_strength(strength)
    check_base(adapter, state_dict, allow_mismatch=allow_base_mismatch)
    problems = [f"{name!r} is missing" for name in state_dict if name not in merged]
    problems += [f"{name!r} is not in the base" for name in merged if name not in state_dict]
    total = FoldCheck()
    for name, base in state_dict.items():
        found = merged.get(name)
        if found is None:
            continue
        wanted = adapter.replace(name, base) if name in adapter.whole else base
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            problems.append(
                f"{name!r} is {found.dtype} {tuple(found.shape)}, it must be {wanted.dtype} {tuple(wanted.shape)}"
            )
        elif name in adapter.targets:
            check = FoldCheck()
            for at, part in parts_of(adapter, name):
                check += check_fold(part, base[at], found[at], strength, exact=exact, told=check.max_ulp)
            total += check
            problems += check.problems(name)
        elif not same_bits(found, wanted):
            is_whole = name in adapter.whole
            problems.append(f"{name!r} is not the adapter's" if is_whole else f"{name!r} is no target and was changed")
    return total.report(adapter, len(state_dict), problems)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Compare two tensors bit by bit, so that NaN equals NaN."""
    return a.shape == b.shape and tensor_bytes(a).equal(tensor_bytes(b))


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldCheck:
    """Comparison of folded weights with the reference; the sum of two is the comparison of both slices.

    Attributes:
        values: number of weights.
        wrong: number of weights that are farther off than `MAX_ULP`.
        max_ulp: largest distance in ulp.
    """

    values: int = 0
    wrong: int = 0
    max_ulp: float = 0.0

    def __add__(self, other: FoldCheck) -> FoldCheck:
        worst = max(self.max_ulp, other.max_ulp)
        return FoldCheck(values=self.values + other.values, wrong=self.wrong + other.wrong, max_ulp=worst)

    def report(self, adapter: Adapter, tensors: int, problems: Iterable[str] = ()) -> WeightReport:
        """Report on all targets of an adapter, given the sum of their checks and the number of the base's tensors."""
        return WeightReport(
            folded=len(adapter.targets),
            replaced=len(adapter.whole),
            untouched=tensors - len(adapter.targets) - len(adapter.whole),
            values=self.values,
            max_ulp=self.max_ulp,
            not_correctly_rounded=self.wrong,
            problems=tuple(problems),
        )

    def problems(self, name: str) -> list[str]:
        """Describe the weights that are wrong, in one line or none."""
        if not self.wrong:
            return []
        return [
            f"{name!r}: {self.wrong} of {self.values} weights are not the sum rounded to nearest, "
            f"the worst by {self.max_ulp:.3g} ulp"
        ]


def check_fold(
    part: Adapter, base: Tensor, found: Tensor, strength: float, *, exact: bool = True, told: float = 0.0
) -> FoldCheck:
    """Compare folded weights with the reference.

    Args:
        part: an adapter of one target, from `loraio.adapter.parts_of`; ``base`` is the slice that it is for.
        found: the folded weight, shape and dtype of ``base``.
        exact: false for weights that were summed in float32; the error of such sums is taken off the distances.
        told: a distance in ulp that was found before. If no weight is farther off, ``max_ulp`` may be 0.
    """
    name = next(iter(part.targets))
    with np.errstate(over="ignore", invalid="ignore"):  # the base or a sum may not be finite
        near = _near_half(part, name, base, found, strength, told) if exact and base.dtype in _NARROW else None
        return near or _from_all(part, name, base, found, strength, exact)


def _from_all(adapter: Adapter, name: str, base: Tensor, found: Tensor, strength: float, exact: bool) -> FoldCheck:
    target = adapter.targets[name]
    layer = LAYER_TYPES[target.layer]
    weight, values = (layer.to_matrix(t.detach().cpu().double(), target.groups).numpy() for t in (base, found))
    factors = {short: factor.detach().cpu().double().numpy() for short, factor in adapter.factors_of(name).items()}
    sums, error = KINDS[target.kind].reference(weight, factors, scale=target.scale, strength=strength)
    if not exact and base.dtype != torch.float64:
        error *= torch.finfo(torch.float32).eps / torch.finfo(torch.float64).eps
    distance = _distance(values, sums, error, base.dtype)
    return FoldCheck(values=base.numel(), wrong=int((distance > MAX_ULP).sum()), max_ulp=float(distance.max()))


def _near_half(
    adapter: Adapter, name: str, base: Tensor, found: Tensor, strength: float, told: float
) -> FoldCheck | None:
    """Check half-precision weights in float64 only where float32 cannot show that they are near their sums.

    Those are the weights that may be as far off as `NEAR`, or as ``told``. float32 decides nothing else. The result is
    None if there are none, or if not all numbers are finite.
    """
    target = adapter.targets[name]
    layer, kind = LAYER_TYPES[target.layer], KINDS[target.kind]
    weight, values = (layer.to_matrix(t.detach().cpu().float(), target.groups).numpy() for t in (base, found))
    factors = {short: factor.detach().cpu() for short, factor in adapter.factors_of(name).items()}
    narrow = {short: factor.float().numpy() for short, factor in factors.items()}
    reference, margin = kind.reference(weight, narrow, scale=target.scale, strength=strength)
    margin *= 2  # factors and scale may have been rounded to float32 too
    off = np.abs(values - reference)
    off += margin
    np.abs(reference, out=reference)
    reference -= margin  # towards zero: the ulp is smaller there
    info = torch.finfo(base.dtype)
    bits = reference.view(np.int32)
    bits &= _EXPONENT
    np.maximum(bits, np.float32(info.tiny).view(np.int32), out=bits)  # positive floats are ordered like their bits
    power = bits.view(np.float32)
    least = max(NEAR, min(told, MAX_ULP)) - UNDERFLOW
    power *= np.float32(info.eps * least)
    doubtful = ~(off <= power)
    if not np.isfinite(off.max()) or not doubtful.any():
        return None if told < NEAR or not np.isfinite(off.max()) else FoldCheck(values=base.numel())
    at = np.divmod(np.flatnonzero(doubtful), doubtful.shape[1])
    wide = {short: factor.double().numpy() for short, factor in factors.items()}
    exact, error = kind.reference(weight, wide, scale=target.scale, strength=strength, at=at)
    distance = _distance(values[at].astype(np.float64), exact, error, base.dtype)
    worst = float(distance.max())
    if worst < NEAR and told < NEAR:
        return None
    return FoldCheck(values=base.numel(), wrong=int((distance > MAX_ULP).sum()), max_ulp=worst)


def _distance(values: Any, exact: Any, error: Any, dtype: torch.dtype) -> Tensor:
    """Measure how far numbers are from exact ones, less the error of these, in ulp of a dtype; float64 in and out."""
    found, reference, slack = (torch.from_numpy(array) for array in (values, exact, error))
    beyond = ((found - reference).abs() - slack).clamp(min=0)
    distance = (beyond / ulp(reference, dtype)).nan_to_num(nan=torch.inf, posinf=torch.inf)
    same = torch.where(reference.isnan(), found.isnan(), found == reference)  # also where the base is not finite
    return torch.where(same, 0.0, distance)

"""Evidence that a merge is right: weights against a float64 reference, outputs against the attached adapter."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loraio.adapter.adapter import Adapter, check_strength, parts_of
from loraio.adapter.kinds import KINDS
from loraio.adapter.layers import LAYER_TYPES
from loraio.adapter.lowrank import ulp
from loraio.bases.checkpoints import load_state
from loraio.bases.identity import check_base
from loraio.bases.networks import (
    NAME_FORMS,
    NETWORKS,
    build_network,
    find_network,
    network_args_of,
    network_of,
    refuse_own_code,
    resize_heads,
)
from loraio.errors import ConfigError, UnknownNameError
from loraio.files.tensorfile import tensor_bytes
from loraio.live.attachment import attach
from loraio.live.base_state import refuse_attached
from loraio.registry import known

MAX_ULP = 0.5
"""A folded weight may be this far from the exact sum, in units in the last place: rounding to nearest, nothing more."""

OUTPUT_ROUNDINGS = 16
"""Outputs may differ by this many roundings (eps of their dtype) of the largest output. On one machine, merged and
attached networks run the same kernels on the same bits and differ by none; another machine may sum in another order."""

FAST_OUTPUT_ROUNDINGS = 256
"""The same, where the weights were summed in float32 and are other bits than those of the attached network."""

MAX_SHARE_OF_EFFECT = 0.05
"""But never by more than this share of what the adapter does to them, or the comparison would prove nothing."""

NEAR = 0.49
"""Half-precision weights that are surely nearer to their sums than this, in ulp, are not looked at in float64."""

UNDERFLOW = 2.0**-10
"""What products that are too small for float32 may hide, in ulp of a half-precision dtype: 2**-149 each, the ulp of
bfloat16 is at least 2**-133."""

_NARROW = (torch.bfloat16, torch.float16)
_EXPONENT = np.int32(0x7F800000)  # its bits in a float32: what is left is the power of two below the number

BATCH = 64
"""Samples in one forward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightReport:
    """The merged weights against base and adapter.

    Attributes:
        folded: how many tensors the adapter changes.
        replaced: how many tensors must be the adapter's own, bit for bit.
        untouched: how many it must leave bit-identical.
        values: how many numbers the folded tensors hold.
        max_ulp: the largest distance of a folded weight from the exact sum, in units in the last place of the
            weight's dtype. What the float64 sums are unsure of is taken off: about 1e-8 ulp for float32 weights, but
            a few ulp for float64 weights, whose sums have no wider dtype.
        not_correctly_rounded: how many folded weights are farther than 0.5 ulp.
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
        """Whether every tensor is what it must be."""
        return not self.problems


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputReport:
    """The merged network's outputs against those of the base with the adapter attached.

    Attributes:
        samples: how many inputs were run.
        max_abs: largest absolute difference of two outputs.
        max_rel: that of the outputs divided by their own size, where they are not zero.
        effect: largest absolute difference that the adapter makes to the base's outputs; the largest output where it
            gives another number of them.
        relative_to_effect: max_abs / effect; None when the adapter has no effect on these inputs.
        argmax_agreement: share of the samples, 0 to 1, for which both name the same class.
        bound: what max_abs may be: `OUTPUT_ROUNDINGS`, or `FAST_OUTPUT_ROUNDINGS`, * eps of the dtype * the largest
            output, but at most `MAX_SHARE_OF_EFFECT` * effect.
    """

    samples: int
    max_abs: float
    max_rel: float
    effect: float
    relative_to_effect: float | None
    argmax_agreement: float
    bound: float

    @property
    def ok(self) -> bool:
        """Whether the difference is within the bound; never so when an output is NaN or infinite."""
        return self.max_abs <= self.bound < math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What `verify` found.

    Attributes:
        weights: the weights' report.
        outputs: the outputs' report; None when the merged weights do not fit the network, which ``weights`` then says.
    """

    weights: WeightReport
    outputs: OutputReport | None

    @property
    def ok(self) -> bool:
        """Whether weights and outputs both are."""
        return self.weights.ok and self.outputs is not None and self.outputs.ok


def verify(
    state_dict: Mapping[str, Tensor],
    adapter: Adapter,
    merged: Mapping[str, Tensor],
    strength: float = 1.0,
    *,
    model: nn.Module | str | None = None,
    inputs: Tensor | None = None,
    samples: int = 256,
    seed: int = 1,
    allow_base_mismatch: bool = False,
    exact: bool = True,
) -> Report:
    """Whether ``merged`` is the base with the adapter folded in, once, at this strength, and nothing else.

    Args:
        state_dict: the base model's.
        adapter: the adapter that was merged.
        merged: the state dict to check.
        strength: that of the merge.
        model: the network, as a module or by name; needed only where the adapter does not name it.
        inputs: (n, ...) real inputs, float; without them ``samples`` uniform random ones in [0, 1).
        samples: how many random inputs.
        seed: of the random inputs.
        allow_base_mismatch, exact: as the merge was told.

    Returns:
        the report. A merge that is wrong is a report that says so, not an error.

    Raises:
        BaseMismatchError: the adapter does not belong to this base.
        UnknownNameError: the network is not known and ``model`` was not given.
        ConfigError: strength or samples are out of range, a module was given without inputs, or the network does not
            take the inputs.
        StateError: the model that was given carries an adapter.
    """
    weights = verify_weights(
        state_dict, adapter, merged, strength, allow_base_mismatch=allow_base_mismatch, exact=exact
    )
    network = _network(adapter, model)
    if inputs is None:
        inputs = _random_inputs(network, samples, seed)
    if not len(inputs):
        raise ConfigError("no inputs verify nothing")
    outputs = None
    if _fits(state_dict, adapter, merged):
        outputs = _verify_outputs(network, state_dict, adapter, merged, strength, inputs, allow_base_mismatch, exact)
    return Report(weights=weights, outputs=outputs)


def verify_weights(
    state_dict: Mapping[str, Tensor],
    adapter: Adapter,
    merged: Mapping[str, Tensor],
    strength: float = 1.0,
    *,
    allow_base_mismatch: bool = False,
    exact: bool = True,
) -> WeightReport:
    """The first half of `verify`, which needs no network.

    The reference shares no code with the merge: it is computed in NumPy, in float64. Where the merge was told that it
    need not be exact, its weights are wrong only when they are farther off than float32 sums can be.

    Raises:
        BaseMismatchError: the adapter does not belong to this base.
        ConfigError: the strength is not a finite number.
    """
    strength = check_strength(strength)
    check_base(adapter, state_dict, allow_mismatch=allow_base_mismatch)
    problems = [f"{name!r} is missing" for name in state_dict if name not in merged]
    problems += [f"{name!r} is not in the base" for name in merged if name not in state_dict]
    worst, wrong, values = 0.0, 0, 0
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
            worst, wrong, values = max(worst, check.max_ulp), wrong + check.wrong, values + check.values
            problems += check.problems(name)
        elif not tensor_bytes(found).equal(tensor_bytes(wanted)):
            is_whole = name in adapter.whole
            problems.append(f"{name!r} is not the adapter's" if is_whole else f"{name!r} is no target and was changed")
    return WeightReport(
        folded=len(adapter.targets),
        replaced=len(adapter.whole),
        untouched=len(state_dict) - len(adapter.targets) - len(adapter.whole),
        values=values,
        max_ulp=worst,
        not_correctly_rounded=wrong,
        problems=tuple(problems),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldCheck:
    """Folded weights against the reference; of two parts of a weight the sum is that of both together.

    Attributes:
        values: how many were looked at.
        wrong: how many are farther than `MAX_ULP`.
        max_ulp: the largest distance.
    """

    values: int = 0
    wrong: int = 0
    max_ulp: float = 0.0

    def __add__(self, other: FoldCheck) -> FoldCheck:
        return FoldCheck(
            values=self.values + other.values,
            wrong=self.wrong + other.wrong,
            max_ulp=max(self.max_ulp, other.max_ulp),
        )

    def problems(self, name: str) -> list[str]:
        """A line for the weight of that name, or none."""
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
        part: an adapter of one target, as `loraio.adapter.parts_of` gives them.
        base: the base weight, or the slice of it that ``part`` is for.
        found: what should be that weight with the adapter folded in, shape and dtype of ``base``.
        strength: that of the merge.
        exact: false for weights that were summed in float32: what such sums are unsure of is taken off the distances.
        told: a distance in ulp that is known already: smaller ones need not be told.

    Returns:
        the check; its ``max_ulp`` may be 0 where no weight is farther off than ``told``.
    """
    name = next(iter(part.targets))
    with np.errstate(over="ignore", invalid="ignore"):  # where the base or a sum is not finite
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
    """`check_fold` by way of float32, which is enough to see that most half-precision weights are near their sums.

    Only those that may be as far off as `NEAR`, or as ``told``, are looked at in float64; if none is, or not all is
    finite, there is no answer. Nothing rests on float32 but which weights these are.
    """
    target = adapter.targets[name]
    layer, kind = LAYER_TYPES[target.layer], KINDS[target.kind]
    weight, values = (layer.to_matrix(t.detach().cpu().float(), target.groups).numpy() for t in (base, found))
    factors = {short: factor.detach().cpu() for short, factor in adapter.factors_of(name).items()}
    narrow = {short: factor.float().numpy() for short, factor in factors.items()}
    reference, margin = kind.reference(weight, narrow, scale=target.scale, strength=strength)
    margin *= 2  # the factors and their scale may have been rounded to float32 too
    off = np.abs(values - reference)
    off += margin
    np.abs(reference, out=reference)
    reference -= margin  # towards zero, where the numbers are denser
    info = torch.finfo(base.dtype)
    bits = reference.view(np.int32)
    bits &= _EXPONENT
    np.maximum(bits, np.float32(info.tiny).view(np.int32), out=bits)  # positive numbers are ordered as their bits are
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


def _fits(state_dict: Mapping[str, Tensor], adapter: Adapter, merged: Mapping[str, Tensor]) -> bool:
    needed = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state_dict.items()}
    needed |= {name: (whole.shape, state_dict[name].dtype) for name, whole in adapter.whole.items()}
    return needed == {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in merged.items()}


def _distance(values: Any, exact: Any, error: Any, dtype: torch.dtype) -> Tensor:
    """Distance of numbers from exact ones, beyond the error of these, in ulp of a dtype; float64 in and out."""
    found, reference, slack = (torch.from_numpy(array) for array in (values, exact, error))
    beyond = ((found - reference).abs() - slack).clamp(min=0)
    distance = (beyond / ulp(reference, dtype)).nan_to_num(nan=torch.inf, posinf=torch.inf)
    same = torch.where(reference.isnan(), found.isnan(), found == reference)  # also where the base is not finite
    return torch.where(same, 0.0, distance)


def _network(adapter: Adapter, model: nn.Module | str | None) -> nn.Module:
    """A network that may be written to."""
    if isinstance(model, nn.Module):
        refuse_attached(model)
        return copy.deepcopy(model).eval()
    base = adapter.base
    if model is None and base.network is None:
        raise UnknownNameError(
            "the adapter does not say which network it is for",
            hint=f"--model NAME (model= in Python): {known(NETWORKS)}, or {NAME_FORMS}",
        )
    name = model or refuse_own_code(base.network or "", where="the adapter")
    network = build_network(name, args=base.network_args if name == base.network else None, seed=0)
    resize_heads(network, base.heads)
    return network


def _random_inputs(network: nn.Module, samples: int, seed: int) -> Tensor:
    if samples < 1:
        raise ConfigError(f"{samples} samples verify nothing")
    name = network_of(network)
    if name is None:
        raise ConfigError("random inputs need a network with a name", hint="pass inputs= of the shape it takes")
    shape = find_network(name, network_args_of(network)).input_shape
    if shape is None:
        raise ConfigError(f"which inputs {name!r} takes is not known", hint="pass inputs= of the shape it takes")
    return torch.rand(samples, *shape, generator=torch.Generator().manual_seed(seed))


def _verify_outputs(
    network: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter: Adapter,
    merged: Mapping[str, Tensor],
    strength: float,
    inputs: Tensor,
    allow_base_mismatch: bool,
    exact: bool,
) -> OutputReport:
    load_state(network, state_dict)
    base = _forward(network, inputs)
    with attach(network, adapter, strength, allow_base_mismatch=allow_base_mismatch):
        attached = _forward(network, inputs)
    resize_heads(network, adapter.heads)
    load_state(network, merged)
    after = _forward(network, inputs)
    difference = (after - attached).abs()
    size = torch.maximum(after.abs(), attached.abs())
    max_abs = float(difference.max())
    effect = float((attached - base if attached.shape == base.shape else attached).abs().max())
    roundings = OUTPUT_ROUNDINGS if exact else FAST_OUTPUT_ROUNDINGS
    bound = roundings * torch.finfo(attached.dtype).eps * float(attached.abs().max())
    return OutputReport(
        samples=len(inputs),
        max_abs=max_abs,
        max_rel=float((difference / size).nan_to_num(nan=0.0).max()),
        effect=effect,
        relative_to_effect=max_abs / effect if effect else None,
        argmax_agreement=float((after.argmax(1) == attached.argmax(1)).double().mean()),
        bound=min(bound, MAX_SHARE_OF_EFFECT * effect) if effect else bound,
    )


def _forward(network: nn.Module, inputs: Tensor) -> Tensor:
    first = next(network.parameters())
    try:
        with torch.no_grad():
            return torch.cat([network(batch.to(first.device, first.dtype)) for batch in inputs.split(BATCH)])
    except RuntimeError as error:
        raise ConfigError(f"the network does not take inputs of shape {tuple(inputs.shape)}: {error}") from error

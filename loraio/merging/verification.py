"""Verify a merge: weights against a float64 reference, outputs against the attached adapter."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loraio.adapter.adapter import Adapter
from loraio.bases.checkpoints import load_state
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
from loraio.live.attachment import attach
from loraio.live.base_state import refuse_attached
from loraio.merging.weight_check import WeightReport, verify_weights
from loraio.registry import known

OUTPUT_ROUNDINGS = 16
"""Outputs may differ by this many roundings (eps of their dtype) of the largest output. On one machine, merged and
attached networks run the same kernels on the same bits and differ by none; another machine may sum in another order."""

FAST_OUTPUT_ROUNDINGS = 256
"""The same, where the weights were summed in float32 and are other bits than those of the attached network."""

MAX_SHARE_OF_EFFECT = 0.05
"""But never by more than this share of what the adapter does to them, or the comparison would prove nothing."""

BATCH = 64
"""Samples in one forward pass."""


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


def _fits(state_dict: Mapping[str, Tensor], adapter: Adapter, merged: Mapping[str, Tensor]) -> bool:
    needed = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state_dict.items()}
    needed |= {name: (whole.shape, state_dict[name].dtype) for name, whole in adapter.whole.items()}
    return needed == {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in merged.items()}


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

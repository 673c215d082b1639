"""Verify a merge: weights against a float64 reference, outputs against the attached adapter."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from loraio.adapter.adapter import Adapter
from loraio.bases import networks
from loraio.bases.models import load_state
from loraio.bases.own_code import refuse_own_code
from loraio.errors import ConfigError, UnknownNameError
from loraio.live.attachment import attach
from loraio.live.base_state import refuse_attached
from loraio.merging.determinism import NondeterministicLayer, find_nondeterministic, scribble
from loraio.merging.weight_check import WeightReport, same_bits, verify_weights
from loraio.registry import known

OUTPUT_ROUNDINGS = 16
"""Outputs may differ by this many roundings (eps of their dtype) of the largest output. On one machine merged and
attached networks run the same kernels on the same bits, and differ by none."""

FAST_OUTPUT_ROUNDINGS = 256
"""The same for weights that were summed in float32, so that their bits differ from those of the attached network."""

MAX_SHARE_OF_EFFECT = 0.05
"""Outputs may never differ by more than this share of the adapter's effect, or the comparison would prove nothing."""

BATCH = 64
"""Samples in one forward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputReport:
    """Comparison of the merged network's outputs with those of the base with the adapter attached.

    Attributes:
        samples: number of inputs.
        max_abs: largest absolute difference of two outputs.
        max_rel: largest difference divided by the larger of both outputs, where that is not zero.
        effect: largest absolute change that the adapter makes to the base's outputs; the largest output if the
            adapter changes their number.
        relative_to_effect: max_abs / effect; None if the adapter has no effect on these inputs.
        argmax_agreement: share of the samples, 0 to 1, for which both name the same class.
        bound: largest allowed max_abs: `OUTPUT_ROUNDINGS`, or `FAST_OUTPUT_ROUNDINGS`, * eps of the dtype * the
            largest output, but at most `MAX_SHARE_OF_EFFECT` * effect.
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
        """True if the difference is within the bound; false if an output is NaN or infinite."""
        return self.max_abs <= self.bound < math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The result of `verify`.

    ``ok`` says whether the merge is right, as far as this machine can tell. The weights alone prove it; outputs can
    only disprove it. So a network that gives two answers for one input does not make ``ok`` false: ``outputs`` is then
    None, and ``nondeterministic`` names the layer. A script that insists on outputs also asks for
    ``report.outputs is not None``.

    Attributes:
        weights: report on the weights.
        outputs: report on the outputs; None if the merged weights do not fit the network, as ``weights`` then says, or
            if the network is nondeterministic.
        nondeterministic: the first layer that gave another answer for the same input on this machine; None if the
            network repeats itself, or was not run.
    """

    weights: WeightReport
    outputs: OutputReport | None
    nondeterministic: NondeterministicLayer | None = None

    @property
    def ok(self) -> bool:
        """True if the weights are right, and so are the outputs wherever they can be compared."""
        if self.nondeterministic is not None:
            return self.weights.ok
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
    """Check that ``merged`` is the base with the adapter folded in, once, at this strength, and nothing else.

    The base is run twice on the same inputs first. If its two answers differ, outputs are not compared, and the report
    names the layer instead of blaming the merge.

    Args:
        state_dict: the base model's.
        adapter: the adapter that was merged.
        merged: the state dict to check.
        strength: the strength of the merge.
        model: the network, as a module or by name; needed only where the adapter does not name it.
        inputs: (n, ...) real inputs, float; without them ``samples`` uniform random ones in [0, 1).
        samples: number of random inputs.
        seed: seed of the random inputs.
        allow_base_mismatch, exact: as given to the merge.

    Returns:
        the report. A wrong merge gives a report that says so, not an error.

    Raises:
        BaseMismatchError: the adapter does not belong to this base.
        UnknownNameError: the network is not known and ``model`` was not given.
        ConfigError: strength or samples are out of range, a module was given without inputs, or the network does not
            take the inputs.
        StateError: the given model carries an adapter.
    """
    weights = verify_weights(
        state_dict, adapter, merged, strength, allow_base_mismatch=allow_base_mismatch, exact=exact
    )
    network = _network(adapter, model)
    if inputs is None:
        inputs = _random_inputs(network, samples, seed)
    if not len(inputs):
        raise ConfigError("there are no inputs to verify with")
    if not _fits(state_dict, adapter, merged):
        return Report(weights=weights, outputs=None)
    run = partial(_forward, network, inputs)
    load_state(network, state_dict)
    base = run()
    nondeterministic = _nondeterministic(network, run, base)
    if nondeterministic is not None:
        return Report(weights=weights, outputs=None, nondeterministic=nondeterministic)
    with attach(network, adapter, strength, allow_base_mismatch=allow_base_mismatch):
        attached = run()
    networks.resize_heads(network, adapter.heads)
    load_state(network, merged)
    after = run()
    outputs = _compare(base, attached, after, exact=exact)
    if not outputs.ok:  # other weights may take another kernel
        nondeterministic = _nondeterministic(network, run, after)
    return Report(weights=weights, outputs=None if nondeterministic else outputs, nondeterministic=nondeterministic)


def _fits(state_dict: Mapping[str, Tensor], adapter: Adapter, merged: Mapping[str, Tensor]) -> bool:
    needed = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state_dict.items()}
    needed |= {name: (whole.shape, state_dict[name].dtype) for name, whole in adapter.whole.items()}
    return needed == {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in merged.items()}


def _network(adapter: Adapter, model: nn.Module | str | None) -> nn.Module:
    """Return a network of our own, to load weights into."""
    if isinstance(model, nn.Module):
        refuse_attached(model)
        return copy.deepcopy(model).eval()
    base = adapter.base
    if model is None and base.network is None:
        raise UnknownNameError(
            "the adapter does not say which network it is for",
            hint=f"--model NAME (model= in Python): {known(networks.NETWORKS)}, or {networks.NAME_FORMS}",
        )
    name = model or refuse_own_code(base.network or "", where="the adapter")
    network = networks.build_network(name, args=base.network_args if name == base.network else None, seed=0)
    networks.resize_heads(network, base.heads)
    return network


def _random_inputs(network: nn.Module, samples: int, seed: int) -> Tensor:
    if samples < 1:
        raise ConfigError(f"{samples} samples are not enough to verify with")
    name = networks.network_of(network)
    if name is None:
        raise ConfigError("random inputs need a network with a name", hint="pass inputs= of the shape it takes")
    shape = networks.find_network(name, networks.network_args_of(network)).input_shape
    if shape is None:
        raise ConfigError(f"the input shape of {name!r} is not known", hint="pass inputs= of the shape it takes")
    return torch.rand(samples, *shape, generator=torch.Generator().manual_seed(seed))


def _nondeterministic(network: nn.Module, run: Callable[[], Tensor], first: Tensor) -> NondeterministicLayer | None:
    scribble(first.device)
    return None if same_bits(first, run()) else find_nondeterministic(network, run)


def _compare(base: Tensor, attached: Tensor, after: Tensor, *, exact: bool) -> OutputReport:
    difference = (after - attached).abs()
    size = torch.maximum(after.abs(), attached.abs())
    max_abs = float(difference.max())
    effect = float((attached - base if attached.shape == base.shape else attached).abs().max())
    roundings = OUTPUT_ROUNDINGS if exact else FAST_OUTPUT_ROUNDINGS
    bound = roundings * torch.finfo(attached.dtype).eps * float(attached.abs().max())
    return OutputReport(
        samples=len(after),
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

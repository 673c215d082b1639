"""How long does folding an adapter into every weight take, against one pass over the same weights?

usage: python scripts/bench/merge.py [--networks NAME ...] [--dtypes NAME ...] [--rounds N] [--json]

The pass is ``W.add_(0)``: it reads and writes each weight once. Rank 8 on every convolution and linear layer, one
thread. Ways to fold: what ``loraio.merge(.., in_place=True)`` does once it knows the base, rounded once and with
``exact=False``; the same into new tensors, as without ``in_place``, for which the system has to give memory; PEFT's
``merge_adapter``, in place, and what minLoRA's ``merge_lora`` does to each layer, where they can be imported (float32
only). Then the whole of ``loraio.merge(.., in_place=True)``, which hashes the base first. Bounds: one in-place
float32 addmm for each weight; and, for each slice in which a weight is folded, nothing but the casts to and from
float64 and the product of matrices in float64, in place.

Before any time is taken, every exactly folded weight is verified to be rounded correctly, and the others to be near.
How many folded weights are not rounded correctly is a figure of its own.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import torch
from _contestants import built, drawn, in_minlora, in_peft, left_out, peer, ungrouped
from _paired import CLOCKS, Measured, exactly, gathered, interleaved, parser, ratios, require, rounds, run_row, short
from torch import Tensor, nn
from torch.nn.utils import parametrize

import loraio
from loraio.merging.in_memory import overwrite, planned

ROW = "merge"
DTYPES = ("float32", "bfloat16", "float16")
BASELINE = "W.add_(0)"
FAST, NEW, NEW_FAST, WHOLE = "loraio fast", "loraio, new tensors", "loraio fast, new tensors", "loraio, base hashed"
TARGETS = {("torchvision:resnet50", "loraio"): 4.0, ("torchvision:resnet50", FAST): 1.6}
"""Where passes over the weights are what it costs; in smaller networks it is the number of calls."""
ROUNDS = {"digit-cnn": 200, "torchvision:mobilenet_v3_small": 60, "torchvision:resnet50": 15}

NEAR = 1e-5
"""Of the largest weight: how far a float32 sum may be from the exact one; and the spacing of 16-bit dtypes."""

State = dict[str, Tensor]


def fold(adapter: loraio.Adapter, weights: State, *, exact: bool) -> State:
    """Every target, into new tensors."""
    return {name: adapter.fold(name, weight, exact=exact) for name, weight in weights.items()}


def in_place(adapter: loraio.Adapter, state: State, *, exact: bool) -> Callable[[], object]:
    """Every target over itself: the adapter is added in one round and taken away in the next."""
    mine, strengths = {name: tensor.clone() for name, tensor in state.items()}, itertools.cycle((1.0, -1.0))
    return lambda: overwrite(planned(mine, adapter, strength=next(strengths), exact=exact))


def addmm(adapter: loraio.Adapter, weights: State) -> Callable[[], object]:
    """One float32 product for each weight, added to a copy of it in place: this rounds more than once."""
    there = {name: weight.clone() for name, weight in weights.items()}
    parts = [
        (there[name].flatten(1), adapter.factors[f"{name}.lora_B"], adapter.factors[f"{name}.lora_A"], target.scale)
        for name, target in adapter.targets.items()
    ]
    return lambda: [matrix.addmm_(B, A, alpha=scale) for matrix, B, A, scale in parts]


def casts(adapter: loraio.Adapter, weights: State) -> Callable[[], object]:
    """Slice by slice a cast to float64, a product and a cast back, in place."""
    most = max(weights[name][at].numel() for name, target in adapter.targets.items() for at in target.slices())
    wide = torch.empty(most, dtype=torch.float64)
    parts = []
    for name, target in adapter.targets.items():
        B, A = (adapter.factors[f"{name}.{factor}"].double() for factor in ("lora_B", "lora_A"))
        mine = weights[name].clone().flatten(1)
        for at in target.slices():
            parts.append((wide[: mine[at].numel()].view(mine[at].shape), mine[at], B[at], A, target.scale))
    signs = itertools.cycle((1.0, -1.0))

    def work() -> None:
        sign = next(signs)
        for matrix, mine, B, A, scale in parts:
            mine.copy_(matrix.copy_(mine).addmm_(B, A, alpha=sign * scale))

    return work


def not_correct(state: State, adapter: loraio.Adapter, weights: State) -> float:
    """The share of folded weights that are farther than half a unit in the last place from the exact sum."""
    found = loraio.verify_weights(state, adapter, {**state, **weights})
    return found.not_correctly_rounded / sum(weights[name].numel() for name in adapter.targets)


def require_near(found: State, expected: State, *, what: str) -> None:
    """Refuse weights that are others."""
    for name, tensor in expected.items():
        apart = float((found[name].double() - tensor.double()).abs().max() / tensor.double().abs().max())
        near = NEAR + torch.finfo(tensor.dtype).eps
        require(apart <= near, f"{what}, {name}: off by {apart:.2g} of the largest weight")


def merge_minlora(model: nn.Module) -> None:
    """Merge each layer as ``merge_lora`` does, which itself changes a dict while iterating over it, and fails."""
    for layer in model.modules():
        if parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


@torch.no_grad()
def measure_one(network: str, dtype: str, count: int, clock: Callable[[], float]) -> Measured:
    """One network in one dtype."""
    model = built(network).to(getattr(torch, dtype))
    adapter = drawn(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = {name: state[name].clone() for name in adapter.targets}
    case, notes = f"{short(network)}, {dtype}", []
    exact, fast = (fold(adapter, weights, exact=is_exact) for is_exact in (True, False))
    merged = loraio.merge(state, adapter)
    report = loraio.verify_weights(state, adapter, {**state, **exact})
    require(report.ok, f"{case}: {'; '.join(report.problems)}")
    require(all(merged[name].equal(exact[name]) for name in exact), f"{case}: merge and fold differ")
    require_near(fast, exact, what=f"{case}, exact=False")
    over = {name: tensor.clone() for name, tensor in state.items()}
    loraio.merge(over, adapter, in_place=True)
    require(all(over[name].equal(merged[name]) for name in merged), f"{case}: in place it is another merge")
    wrong = {"loraio": report.not_correctly_rounded / report.values, FAST: not_correct(state, adapter, fast)}
    require(wrong["loraio"] == 0, f"{case}: {wrong['loraio']:.2g} of the weights are not rounded correctly")
    works: dict[str, Callable[..., Any]] = {
        BASELINE: lambda: [weight.add_(0) for weight in weights.values()],
        "loraio": in_place(adapter, state, exact=True),
        FAST: in_place(adapter, state, exact=False),
        NEW: lambda: fold(adapter, weights, exact=True),
        NEW_FAST: lambda: fold(adapter, weights, exact=False),
        WHOLE: lambda _: loraio.merge(over, adapter, in_place=True),
        "bound: casts and dgemm": casts(adapter, weights),
    }
    before: dict[str, Callable[[], Any]] = {WHOLE: lambda: [over[name].copy_(state[name]) for name in weights]}
    if dtype == "float32":
        works["bound: addmm"] = addmm(adapter, weights)
        if peer("peft", notes):
            taken = ungrouped(adapter)
            wrapped = in_peft(model, {"default": taken})
            wrapped.merge_adapter()
            inner = wrapped.base_model.model
            paths = {name: inner.get_submodule(name.removesuffix(".weight")) for name in taken.targets}
            found = {name: layer.get_base_layer().weight.clone() for name, layer in paths.items()}
            require_near(found, {name: exact[name] for name in found}, what=f"{case}, PEFT")
            wrong["PEFT"] = not_correct(state, taken, found)
            wrapped.unmerge_adapter()
            works["PEFT"] = lambda _: wrapped.merge_adapter()
            before["PEFT"] = lambda: (
                wrapped.unmerge_adapter() if wrapped.get_layer_status()[0].merged_adapters else None
            )
            notes += [f"{short(network)}: {line}" for line in left_out(adapter)]
        if peer("minlora", notes):
            other = in_minlora(model, adapter)
            merge_minlora(other)
            found = {name: other.get_parameter(name).clone() for name in exact}
            require_near(found, exact, what=f"{case}, minLoRA")
            wrong["minLoRA"] = not_correct(state, adapter, found)
            works["minLoRA"], before["minLoRA"] = merge_minlora, lambda: in_minlora(model, adapter)
    times = interleaved(works, rounds=count, clock=clock, before=before)
    targets = {who: TARGETS.get((network, who)) for who in works if dtype == "float32"}
    figures = ratios(times, BASELINE, row=ROW, case=case, unit=f"x {BASELINE}", targets=targets)
    unit = "share not correctly rounded"
    figures += [
        exactly(ROW, case, who, share, unit, target=0 if who == "loraio" else None) for who, share in wrong.items()
    ]
    return figures, notes


def measure(options: argparse.Namespace) -> Measured:
    """All networks and dtypes."""
    clock = CLOCKS[options.clock]
    return gathered(
        measure_one(network, dtype, rounds(options, ROUNDS[network]), clock)
        for network in options.networks
        for dtype in options.dtypes
    )


def main() -> None:
    """Check, measure, print."""
    made = parser(__doc__)
    made.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    run_row(ROW, made.parse_args(), measure, title="merge in memory, rank 8, every layer")


if __name__ == "__main__":
    main()

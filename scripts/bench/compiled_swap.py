"""Does a compiled model swap among adapters of other ranks and targets without compiling anew, and what does it cost?

usage: python scripts/bench/compiled_swap.py [--networks NAME ...] [--rounds N] [--json]

It needs a C++ compiler. Ten adapters, lora and dora, of ranks 1 to 16 on convolutions, on linear layers, and on both;
float32, eval mode, no gradients, one thread, batch 1. First each is swapped onto a compiled network with all weights
reserved: its outputs are compared with those of the merged network, and what is compiled after the first forward pass
is counted; also for the same swaps without a reserve, where torch gives up after 8 times and goes on uncompiled. Then
in the same rounds, order rotated: forward passes, and a swap to the next adapter with the forward pass after it; the
ratio is to the plain network, compiled.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from _contestants import built
from _paired import NETWORKS, Measured, exactly, interleaved, ratios, require, run_networks, short
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import loraio

ROW = "compiled_swap"
PLAIN = "plain forward, compiled"
ROUNDS = {"digit-cnn": 200, "torchvision:mobilenet_v3_small": 40, "torchvision:resnet50": 10}

FORMS = (
    (1, 3.0, ("conv",), "alpha/r"),
    (4, 6.5, ("linear",), "alpha/sqrt(r)"),
    (8, 2.0, ("conv", "linear"), "alpha/r"),
    (16, 8.0, ("conv",), "alpha/sqrt(r)"),
    (3, 9.0, ("conv", "linear"), "alpha/r"),
)
"""Rank, alpha, targets and scale rule."""


def adapters_for(model: nn.Module) -> list[loraio.Adapter]:
    """Random factors, whose products are about a third of the weights."""
    weights = model.state_dict()
    made = []
    for seed, (kind, (rank, alpha, targets, rule)) in enumerate(itertools.product(("lora", "dora"), FORMS)):
        config = loraio.TrainConfig(
            kind=kind, rank=rank, alpha=alpha, targets=targets, scale_rule=rule, clamp_rank=True, seed=seed
        )
        fresh = loraio.new_adapter(model, config)
        generator = torch.Generator().manual_seed(seed)
        factors = dict(fresh.factors)
        for name, target in fresh.targets.items():
            size = float(weights[name].std()) / (3 * target.scale * target.rank**0.5)
            for factor, sigma in (("lora_A", 1.0), ("lora_B", size)):
                shape = target.factor_shapes[factor]
                factors[f"{name}.{factor}"] = sigma * torch.randn(shape, generator=generator)
        made.append(replace(fresh, factors=factors))
    return made


@torch.no_grad()
def measure_one(network: str, count: int, clock: Callable[[], float]) -> Measured:
    """All figures of one network."""
    plain = built(network)
    adapters = adapters_for(plain)
    x = torch.rand(1, *NETWORKS[network], generator=torch.Generator().manual_seed(1))
    unreserved = copy.deepcopy(plain)
    anew = compiled_anew(unreserved, loraio.attach(unreserved, adapters[0]), adapters, x)
    torch._dynamo.reset()
    eager, attached = copy.deepcopy(plain), copy.deepcopy(plain)
    eager_live = loraio.attach(eager, adapters[0])
    live = loraio.attach(attached, adapters[0], reserve=adapters)
    reserved = compiled_anew(attached, live, adapters, x, plain)
    torch._dynamo.reset()
    compiled, compiled_plain = torch.compile(attached, fullgraph=True), torch.compile(plain, fullgraph=True)
    works: dict[str, Callable[[], Any]] = {
        PLAIN: functools.partial(compiled_plain, x),
        "loraio": functools.partial(compiled, x),
        "loraio, uncompiled": functools.partial(eager, x),
        "loraio, swap and forward": in_turn(live.swap, adapters, functools.partial(compiled, x)),
        "loraio, swap and forward, uncompiled": in_turn(eager_live.swap, adapters, functools.partial(eager, x)),
    }
    times = interleaved(works, rounds=count, clock=clock, warmup=2)
    case, unit = short(network), f"compilations in {2 * len(adapters)} swaps"
    figures = [
        exactly(ROW, case, "loraio", reserved, unit, target=0),
        exactly(ROW, case, "loraio, nothing reserved", anew, unit),
    ]
    return figures + ratios(times, PLAIN, row=ROW, case=case, unit=f"x {PLAIN}"), []


def compiled_anew(
    model: nn.Module, live: Any, adapters: list[loraio.Adapter], x: Tensor, plain: nn.Module | None = None
) -> int:
    """How often two turns of swaps compile something after the first forward pass.

    Args:
        model: it carries an adapter.
        live: its handle.
        adapters: what to swap to.
        x: an input.
        plain: the base; with it, outputs are compared with the merged network's.
    """
    counter = CompileCounterWithBackend("inductor" if plain is not None else "eager")
    compiled: Any = torch.compile(model, fullgraph=plain is not None, backend=counter)
    compiled(x)
    first = counter.frame_count
    for adapter in adapters * 2:
        live.swap(adapter)
        found = compiled(x)
        if plain is not None:
            merged = copy.deepcopy(plain)
            merged.load_state_dict(loraio.merge(plain.state_dict(), adapter))
            expected = merged(x)
            tolerance = 1e-4 * float(expected.abs().max())
            require(float((found - expected).abs().max()) <= tolerance, "the compiled network gives other outputs")
            require(float((expected - plain(x)).abs().max()) > 10 * tolerance, "an adapter does nothing")
    return counter.frame_count - first


def in_turn(
    swap: Callable[[Any], Any], adapters: list[loraio.Adapter], forward: Callable[[], Any]
) -> Callable[[], Any]:
    """A swap to the next adapter, and the forward pass after it."""
    following = itertools.cycle(adapters)

    def work() -> None:
        swap(next(following))
        forward()

    return work


def main() -> None:
    """Check, measure, print."""
    run_networks(ROW, __doc__, measure_one, title="swaps on a compiled network", counts=ROUNDS)


if __name__ == "__main__":
    main()

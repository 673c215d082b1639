"""Does a compiled model swap among adapters of other ranks and targets without compiling anew, and what does it cost?

usage: python scripts/bench/compiled_swap.py [--networks NAME...] [--rounds N] [--json]

Ten adapters, lora and dora, of ranks 1 to 16 on convolutions, on linear layers, and on both; float32, eval mode, no
gradients, one thread, batch 1. First each is swapped onto a compiled network with all weights reserved: its outputs are
compared with those of the merged network, and what is compiled after the first forward pass is counted; also for the
same swaps without a reserve, where torch gives up after 8 times and goes on uncompiled. Then in the same rounds, order
rotated: forward passes, and a swap to the next adapter with the forward pass after it; the ratio is to the plain
network, compiled.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from _paired import machine, ratios
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import loraio

NETWORKS = {
    "digit-cnn": ((1, 28, 28), 200),
    "torchvision:mobilenet_v3_small": ((3, 224, 224), 40),
    "torchvision:resnet18": ((3, 224, 224), 20),
}
"""Input shape, and rounds."""

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
            for short, sigma in (("lora_A", 1.0), ("lora_B", size)):
                shape = target.factor_shapes[short]
                factors[f"{name}.{short}"] = sigma * torch.randn(shape, generator=generator)
        made.append(replace(fresh, factors=factors))
    return made


def measure(name: str, rounds: int | None) -> dict[str, Any]:
    """All figures of one network."""
    shape, usual = NETWORKS[name]
    plain = loraio.build_network(name, seed=1)
    adapters = adapters_for(plain)
    x = torch.rand(1, *shape, generator=torch.Generator().manual_seed(1))
    recompiles = {}
    with torch.no_grad():
        unreserved = copy.deepcopy(plain)
        recompiles["without a reserve"] = compiled_anew(unreserved, loraio.attach(unreserved, adapters[0]), adapters, x)
        torch._dynamo.reset()
        eager, attached = copy.deepcopy(plain), copy.deepcopy(plain)
        eager_live = loraio.attach(eager, adapters[0])
        live = loraio.attach(attached, adapters[0], reserve=adapters)
        recompiles["reserved"] = compiled_anew(attached, live, adapters, x, plain)
        assert recompiles["reserved"] == 0
        torch._dynamo.reset()
        compiled, compiled_plain = torch.compile(attached, fullgraph=True), torch.compile(plain, fullgraph=True)
        works: dict[str, Callable[[], Any]] = {
            "compiled plain": functools.partial(compiled_plain, x),
            "compiled": functools.partial(compiled, x),
            "uncompiled": functools.partial(eager, x),
            "compiled, swap and forward": in_turn(live.swap, adapters, functools.partial(compiled, x)),
            "uncompiled, swap and forward": in_turn(eager_live.swap, adapters, functools.partial(eager, x)),
        }
        times = ratios(works, against="compiled plain", rounds=rounds or usual)
    return {"recompiles": recompiles, "times": times}


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
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=tolerance)
            assert float((expected - plain(x)).abs().max()) > 10 * tolerance
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = {name: measure(name, options.rounds) for name in options.networks}
    if options.json:
        print(json.dumps({"machine": machine(), "rows": rows}))
        return
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    for name, row in rows.items():
        swaps = 2 * 2 * len(FORMS)
        print(
            ", ".join(
                f"{name}: {count} compilations in {swaps} swaps {how}" for how, count in row["recompiles"].items()
            )
        )
        for work, times in row["times"].items():
            figures = f"{times['ratio']:.3f} ({times['low']:.3f} to {times['high']:.3f})"
            print(f"{name:<31} {work:<29} {figures}, {times['seconds'] * 1e3:.2f} ms")


if __name__ == "__main__":
    main()

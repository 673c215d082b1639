"""Measure a swap in memory and the next forward pass, against PEFT's `set_adapter` and forward pass.

usage: python scripts/bench/swap.py [--networks NAME ...] [--rounds N] [--json]

Two adapters of rank 8 on every convolution and linear layer, float32, batch 1, eval mode, no gradients, one thread.
Each time the adapter that is on gives way to the other one, and an image goes through the network. Without PEFT there
is nothing to hold it against but a plain forward pass, whose ratio is given in any case. An adapter that was on the
model lately still has its folded weights, as far as `loraio.live.swap_cache.CACHED_BYTES` go; "a new one" is an adapter
that
the model has not had before, whose weights are folded at the forward pass.

Before any time is taken, the outputs after each swap are compared with those of the merged networks.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from _contestants import built, drawn, in_peft, left_out, merged, peer, require_outputs, ungrouped
from _paired import NETWORKS, Measured, interleaved, ratios, require, run_networks, short
from torch import nn

import loraio

ROW = "swap"
PLAIN = "plain forward"
NEW = "loraio, a new one"
TARGETS = {"digit-cnn": 0.6, "torchvision:mobilenet_v3_small": 0.75, "torchvision:resnet50": 0.95}
ROUNDS = {"digit-cnn": 400, "torchvision:mobilenet_v3_small": 60, "torchvision:resnet50": 20}


def in_turn(swap: Callable[[Any], Any], adapters: tuple[Any, ...], forward: Callable[[], Any]) -> Callable[[], Any]:
    """A swap to the next adapter, and the forward pass after it."""
    following = itertools.cycle(adapters)

    def work() -> Any:
        swap(next(following))
        return forward()

    return work


def require_swaps(work: Callable[[], Any], expected: list[nn.Module], x: torch.Tensor, **options: Any) -> None:
    """Refuse a swap that gives other outputs than the merged networks, in their order; twice around."""
    for network in expected * 2:
        require_outputs(work(), network(x), **options)


@torch.no_grad()
def measure_one(network: str, count: int, clock: Callable[[], float]) -> Measured:
    """One network."""
    plain, case, notes = built(network), short(network), []
    adapters = drawn(plain, seed=1), drawn(plain, seed=2)
    x = torch.rand(1, *NETWORKS[network], generator=torch.Generator().manual_seed(1))
    attached = copy.deepcopy(plain)
    live = loraio.attach(attached, adapters[1])
    other = copy.deepcopy(plain)
    other_live, copies = loraio.attach(other, adapters[1]), itertools.cycle(adapters)

    def put_on(adapter: loraio.Adapter) -> Any:
        other_live.swap(adapter)
        return other(x)

    works: dict[str, Callable[..., Any]] = {
        PLAIN: functools.partial(plain, x),
        NEW: put_on,
        "loraio": in_turn(live.swap, adapters, functools.partial(attached, x)),
    }
    first, second = (merged(plain, adapter)(x) for adapter in adapters)
    require(not first.equal(second), f"{case}: both adapters do the same")
    require_swaps(works["loraio"], [merged(plain, each) for each in adapters], x, what=f"{case}, loraio", tolerance=0)
    require_outputs(put_on(replace(adapters[0])), first, what=f"{case}, {NEW}", tolerance=0)
    if peer("peft", notes):
        wrapped = in_peft(plain, {"1": adapters[1], "0": adapters[0]})
        works["PEFT"] = in_turn(wrapped.set_adapter, ("0", "1"), functools.partial(wrapped, x))
        require_swaps(works["PEFT"], [merged(plain, ungrouped(each)) for each in adapters], x, what=f"{case}, PEFT")
        notes += [f"{case}: {line}" for line in left_out(adapters[0])]
    times = interleaved(works, rounds=count, clock=clock, before={NEW: lambda: replace(next(copies))})
    figures = ratios(times, PLAIN, row=ROW, case=case, unit=f"x {PLAIN}")
    if "PEFT" in works:
        unit, names = "x PEFT's swap and forward", ("loraio", NEW, "PEFT")
        targets = {"loraio": TARGETS[network]}
        figures = ratios(times, "PEFT", row=ROW, case=case, unit=unit, targets=targets, names=names) + figures
    return figures, notes


def main() -> None:
    """Check, measure, print."""
    title = "swap in memory and the next forward pass, batch 1"
    run_networks(ROW, __doc__, measure_one, title=title, counts=ROUNDS)


if __name__ == "__main__":
    main()

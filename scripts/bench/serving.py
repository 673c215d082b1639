"""Measure forward passes with an attached adapter against those of the plain network.

usage: python scripts/bench/serving.py [--networks NAME ...] [--rounds N] [--json]

Rank 8 on every convolution and linear layer, float32, eval mode, no gradients, one thread: forward passes with the
adapter on against those of the plain network, at batch 1 and 64; in the same rounds PEFT's forward pass, where it can
be imported. Before any time is taken, the outputs are compared with those of the merged network, ours bit for bit.
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from _contestants import built, drawn, in_peft, left_out, merged, peer, require_outputs, ungrouped
from _paired import CLOCKS, NETWORKS, Measured, gathered, interleaved, parser, ratios, require, rounds, run_row, short

import loraio

ROW = "serving"
PLAIN = "plain forward"
TARGETS = {
    ("digit-cnn", 1): 1.20,
    ("torchvision:mobilenet_v3_small", 1): 1.08,
    ("torchvision:resnet50", 1): 1.03,
    **{(network, 64): 1.03 for network in NETWORKS},
}
ROUNDS = {
    ("digit-cnn", 1): 400,
    ("torchvision:mobilenet_v3_small", 1): 60,
    ("torchvision:resnet50", 1): 30,
    ("digit-cnn", 64): 60,
    ("torchvision:mobilenet_v3_small", 64): 12,
    ("torchvision:resnet50", 64): 5,
}


@torch.no_grad()
def measure_one(network: str, batch: int, count: int, clock: Callable[[], float]) -> Measured:
    """One network with batches of one size."""
    case, notes = f"{short(network)}, batch {batch}", []
    plain = built(network)
    adapter = drawn(plain)
    x = torch.rand(batch, *NETWORKS[network], generator=torch.Generator().manual_seed(batch))
    attached = copy.deepcopy(plain)
    loraio.attach(attached, adapter)
    expected = merged(plain, adapter)(x)
    require_outputs(attached(x), expected, what=f"{case}, loraio", tolerance=0)
    require(not plain(x).equal(expected), f"{case}: the adapter does nothing")
    works: dict[str, Callable[[], Any]] = {
        PLAIN: functools.partial(plain, x),
        "loraio": functools.partial(attached, x),
    }
    if peer("peft", notes):
        works["PEFT"] = functools.partial(in_peft(plain, {"0": adapter}), x)
        require_outputs(works["PEFT"](), merged(plain, ungrouped(adapter))(x), what=f"{case}, PEFT")
        notes += [f"{short(network)}: {line}" for line in left_out(adapter)]
    times = interleaved(works, rounds=count, clock=clock)
    targets = {"loraio": TARGETS.get((network, batch))}
    return ratios(times, PLAIN, row=ROW, case=case, unit=f"x {PLAIN}", targets=targets), notes


def measure(options: argparse.Namespace) -> Measured:
    """All networks and batches."""
    clock = CLOCKS[options.clock]
    batches = options.batches or ([1, 4] if options.quick else [1, 64])
    return gathered(
        measure_one(network, batch, rounds(options, ROUNDS.get((network, batch), 10)), clock)
        for network in options.networks
        for batch in batches
    )


def main() -> None:
    """Check, measure, print."""
    made = parser(__doc__)
    made.add_argument("--batches", type=int, nargs="+", default=None, help="[default: 1 64; 1 4 for a quick run]")
    run_row(ROW, made.parse_args(), measure, title="forward pass with the adapter on, eval mode")


if __name__ == "__main__":
    main()

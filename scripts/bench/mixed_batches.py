"""What does a batch cost in which each image has its own adapter, against the same batch without any?

usage: python scripts/bench/mixed_batches.py [--networks NAME ...] [--size PIXELS] [--rounds N] [--json]

Ten adapters of rank 8 with random factors on every convolution and linear layer, 64 random images, adapters drawn at
random, one thread: the base on the whole batch; the bank; the bank made to take each of its routes; and PEFT's
``adapter_names``, where it can be imported, without the convolutions in groups that it refuses. Before any time is
taken, each output must be what the attached model gives for that image alone.

A batch in one piece asks the system for much fresh memory, and page faults are part of what it takes; the variables
``MALLOC_MMAP_THRESHOLD_`` and ``MALLOC_TRIM_THRESHOLD_`` of the C library make it keep its memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from _contestants import RANK, absent, built, drawn, in_peft, left_out, module, ungrouped
from _paired import (
    CLOCKS,
    NETWORKS,
    Measured,
    gathered,
    interleaved,
    parser,
    ratio_of,
    require,
    rounds,
    run_row,
    short,
)
from torch import Tensor, nn

import loraio
from loraio import bank as bank_module

ROW = "mixed_batches"
BASE = "base"
ADAPTERS, IMAGES, QUICK_IMAGES = 10, 64, 12
TARGETS = {"digit-cnn": 1.5, "torchvision:mobilenet_v3_small": 1.15, "torchvision:resnet50": 1.05}
"""At the networks' own sizes of images."""

ROUNDS = {"digit-cnn": 60, "torchvision:mobilenet_v3_small": 12, "torchvision:resnet50": 5}

TOLERANCE = 1e-5
"""Of the largest output, between a batch and its images one by one: float32 sums in another order."""


def one_by_one(model: nn.Module, bank: loraio.Bank, x: Tensor, names: list[str]) -> Tensor:
    """The outputs of each image alone."""
    rows: dict[int, Tensor] = {}
    for name in sorted(set(names)):
        with bank.attach(model, name):
            rows |= {row: model(x[row : row + 1])[0] for row, own in enumerate(names) if own == name}
    return torch.stack([rows[row] for row in range(len(names))])


def forced(layers: bool, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The bank with one of its routes wherever there is a choice."""

    def forward() -> Tensor:
        before = bank_module.takes_layers
        bank_module.takes_layers = lambda *_: layers
        try:
            return run()
        finally:
            bank_module.takes_layers = before

    return forward


def require_rows(found: Tensor, expected: Tensor, *, what: str) -> None:
    """Refuse a batch whose rows are not those of its images one by one."""
    apart = float((found - expected).abs().max() / expected.abs().max())
    require(apart <= TOLERANCE, f"{what}: off by {apart:.2g} of the largest output")


def measure_one(network: str, options: argparse.Namespace) -> Measured:
    """One network."""
    model, notes = built(network), []
    channels, height, width = NETWORKS[network]
    images = QUICK_IMAGES if options.quick else IMAGES
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(images, channels, options.size or height, options.size or width, generator=generator)
    case = f"{short(network)}, {images} of {'x'.join(map(str, x.shape[1:]))}"
    adapters = {f"adapter-{seed}": drawn(model, seed=seed) for seed in range(ADAPTERS)}
    names = [f"adapter-{int(number)}" for number in torch.randint(ADAPTERS, (images,), generator=generator)]
    bank = loraio.Bank(adapters)
    expected, base = one_by_one(model, bank, x, names), model(x)
    effect = float((expected - base).abs().max() / expected.abs().max())
    require(effect > 100 * TOLERANCE, f"{case}: the adapters do nothing")

    def mixed() -> Tensor:
        outputs: Tensor = bank.forward(model, x, names)
        return outputs

    works: dict[str, Callable[[], Tensor]] = {
        BASE: lambda: model(x),
        "loraio": mixed,
        "loraio by groups": forced(False, mixed),
        "loraio by layers": forced(True, mixed),
    }
    for who in works:
        if who != BASE:
            require_rows(works[who](), expected, what=f"{case}, {who}")
    if module("peft") is None:
        notes.append(absent("PEFT"))
    else:
        wrapped, taken = in_peft(model, adapters), {name: ungrouped(each) for name, each in adapters.items()}
        works["PEFT"] = lambda: wrapped(x, adapter_names=names)
        require_rows(works["PEFT"](), one_by_one(model, loraio.Bank(taken), x, names), what=f"{case}, PEFT")
        notes += [f"{short(network)}: {line}" for line in left_out(adapters["adapter-0"])]
    times = interleaved(works, rounds=rounds(options, ROUNDS[network]), clock=CLOCKS[options.clock])
    is_usual = images == IMAGES and x.shape[1:] == NETWORKS[network]
    targets = {"loraio": TARGETS[network] if is_usual else None}
    return [
        ratio_of(times, who, BASE, row=ROW, case=case, unit="x the base on the batch", target=targets.get(who))
        for who in works
        if who != BASE
    ], notes


@torch.no_grad()
def measure(options: argparse.Namespace) -> Measured:
    """All networks."""
    return gathered(measure_one(network, options) for network in options.networks)


def main() -> None:
    """Check, measure, print."""
    made = parser(__doc__)
    made.add_argument("--size", type=int, default=None, help="height and width of the images; default: the network's")
    run_row(ROW, made.parse_args(), measure, title=f"ten adapters of rank {RANK} in one batch")


if __name__ == "__main__":
    main()

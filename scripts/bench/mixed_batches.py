"""Measure a batch in which each image has its own adapter, against the same batch without any.

usage: python scripts/bench/mixed_batches.py [--networks NAME ...] [--size PIXELS] [--rounds N] [--json]

Ten adapters of rank 8 with random factors on every convolution and linear layer, 64 random images, adapters drawn at
random, one thread: the base on the whole batch; the bank; the bank made to take each of its routes; PEFT's
``adapter_names``, where it can be imported, without the convolutions in groups that it refuses; and where the bank goes
by layers, as a bound, what its adapted layers take by themselves. Before any time is taken, each output must be what
the attached model gives for that image alone, in float64 and then in float32.

A batch in one piece asks the system for much fresh memory, and page faults are part of what it takes; the variables
``MALLOC_MMAP_THRESHOLD_`` and ``MALLOC_TRIM_THRESHOLD_`` of the C library make it keep its memory.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from _contestants import RANK, built, drawn, in_peft, left_out, peer, ungrouped
from _paired import CLOCKS, NETWORKS, Measured, gathered, interleaved, parser, ratios, require, rounds, run_row, short
from torch import Tensor, nn

import loraio
from loraio.serving import layer_route, mixed_batches

ROW = "mixed_batches"
BASE = "base"
ADAPTERS, IMAGES, QUICK_IMAGES = 10, 64, 12
TARGETS = {"digit-cnn": 1.5, "torchvision:mobilenet_v3_small": 1.15, "torchvision:resnet50": 1.05}
"""At the networks' own sizes of images."""

ROUNDS = {"digit-cnn": 60, "torchvision:mobilenet_v3_small": 12, "torchvision:resnet50": 5}

TOLERANCE, WORSE = 1e-5, 4.0
"""Of the largest output, between a batch and its images one by one in float32: what sums in another order may make, or
so many times what float32 itself makes of an image alone, where the network enlarges its roundings."""

SAME = 1e-10
"""The same in float64, where nothing else than a mistake is larger."""


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
        before = mixed_batches.takes_layers
        mixed_batches.takes_layers = lambda *_: layers
        try:
            return run()
        finally:
            mixed_batches.takes_layers = before

    return forward


def layers_alone(run: Callable[[], Tensor]) -> Callable[[], list[Tensor]] | None:
    """The adapted layers, on the inputs that they have in a mixed batch, and nothing besides.

    Returns:
        None where the bank sends the batch by groups.
    """
    parted, calls, expected = layer_route.run_split, [], []

    def noted(*call: Any) -> Tensor:
        calls.append(call)
        expected.append(parted(*call))
        return expected[-1]

    layer_route.run_split = noted
    try:
        run()
    finally:
        layer_route.run_split = parted
    require(
        all(parted(*call).equal(out) for call, out in zip(calls, expected, strict=True)), "a layer gives other bits"
    )
    return (lambda: [parted(*call) for call in calls]) if calls else None


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference, of the largest output."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def drawn_for(model: nn.Module) -> dict[str, loraio.Adapter]:
    """The adapters by name, the same numbers whatever the model's dtype."""
    return {f"adapter-{seed}": drawn(model, seed=seed) for seed in range(ADAPTERS)}


def routes(model: nn.Module, bank: loraio.Bank, x: Tensor, names: list[str]) -> dict[str, Callable[[], Tensor]]:
    """The bank as it chooses, and made to take each of its ways."""

    def mixed() -> Tensor:
        outputs: Tensor = bank.forward(model, x, names)
        return outputs

    return {"loraio": mixed, "loraio by groups": forced(False, mixed), "loraio by layers": forced(True, mixed)}


def check(case: str, model: nn.Module, x: Tensor, names: list[str], expected: Tensor) -> float:
    """Refuse a bank whose rows in float64 are not those of the images one by one.

    Returns:
        how far a batch in float32 may be from its images one by one.
    """
    wide = copy.deepcopy(model).double()
    bank = loraio.Bank(drawn_for(wide))
    exact = one_by_one(wide, bank, x.double(), names)
    for who, work in routes(wide, bank, x.double(), names).items():
        apart = distance(work(), exact)
        require(apart <= SAME, f"{case}, {who} in float64: off by {apart:.2g} of the largest output")
    return max(TOLERANCE, WORSE * distance(expected, exact))


def measure_one(network: str, options: argparse.Namespace) -> Measured:
    """One network."""
    model, notes = built(network), []
    channels, height, width = NETWORKS[network]
    images = QUICK_IMAGES if options.quick else IMAGES
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(images, channels, options.size or height, options.size or width, generator=generator)
    case = f"{short(network)}, {images} of {'x'.join(map(str, x.shape[1:]))}"
    adapters = drawn_for(model)
    names = [f"adapter-{int(number)}" for number in torch.randint(ADAPTERS, (images,), generator=generator)]
    bank = loraio.Bank(adapters)
    expected = one_by_one(model, bank, x, names)
    tolerance = check(case, model, x, names, expected)
    effect = distance(model(x), expected)
    require(effect > 100 * tolerance, f"{case}: the adapters change outputs by {effect:.2g} only")
    works = routes(model, bank, x, names)
    rows = dict.fromkeys(works, expected)
    if peer("peft", notes):
        wrapped, taken = in_peft(model, adapters), {name: ungrouped(each) for name, each in adapters.items()}
        works["PEFT"] = lambda: wrapped(x, adapter_names=names)
        rows["PEFT"] = one_by_one(model, loraio.Bank(taken), x, names)
        notes += [f"{short(network)}: {line}" for line in left_out(adapters["adapter-0"])]
    for who, work in works.items():
        apart = distance(work(), rows[who])
        require(apart <= tolerance, f"{case}, {who}: off by {apart:.2g} of the largest output")
    timed: dict[str, Callable[[], Any]] = {BASE: lambda: model(x), **works}
    alone = layers_alone(works["loraio"])
    if alone is not None:
        timed["bound"] = alone
    times = interleaved(timed, rounds=rounds(options, ROUNDS[network]), clock=CLOCKS[options.clock])
    is_usual = images == IMAGES and x.shape[1:] == NETWORKS[network]
    targets = {"loraio": TARGETS[network] if is_usual else None}
    return ratios(times, BASE, row=ROW, case=case, unit="x the base on the batch", targets=targets), notes


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

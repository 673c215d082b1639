"""What do ten adapters cost that are trained together, against ten runs one after another?

usage: python scripts/bench/train_together.py [--steps N] [--rounds N] [--json]

Adapters of rank 4 for the ten digits on a `digit-cnn`, batches of 64 of the bundled digits, one thread, processor time.
Before any time is taken, both ways train for as many steps as are timed, and their files must have the same bytes.

- ten runs: `loraio.train` for each digit; each run counts what the base misreads by itself.
- ten runs, base counted once: the same, but what the base misreads is known to all.
- loraio: `loraio.train_each`.
- bound: of the steps of all ten only the convolutions of both passes, in the layouts in which their kernels compute
  and between no layers. No way of training can spare them, so that this is a bound.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _paired import CLOCKS, Measured, interleaved, parser, ratio_of, require, rounds, run_row
from torch import Tensor, nn

import loraio

ROW = "train_together"
APART = "ten runs"
TARGET = 0.7
BATCH = 64
QUICK_STEPS = 2

Adapters = dict[int | None, loraio.Adapter]


def bytes_of(adapters: Adapters) -> list[bytes]:
    """Of their files."""
    with tempfile.TemporaryDirectory() as folder:
        for digit, adapter in adapters.items():
            loraio.save(adapter, Path(folder) / f"{digit}")
        return [(Path(folder) / f"{digit}").read_bytes() for digit in adapters]


def kernels(model: nn.Module, rank: int) -> list[Callable[[], Any]]:
    """The convolutions of one training step: with the folded weight, with lora_A, and the gradients of both."""
    sizes: tuple[Any, ...] = ([2, 2], [1, 1], [1, 1], False, [0, 0], 1)
    works: list[Callable[[], Any]] = []

    def forward(x: Tensor, weight: Tensor) -> None:
        works.append(lambda: torch.ops.aten.mkldnn_convolution(x, weight, None, [1, 1], [2, 2], [1, 1], 1))

    def backward(grad: Tensor, x: Tensor, weight: Tensor, mask: tuple[bool, bool, bool]) -> None:
        works.append(lambda: torch.ops.aten.convolution_backward(grad, x, weight, None, *sizes, mask))

    x = torch.rand(BATCH, 1, 28, 28)
    for conv in (module for module in model.modules() if isinstance(module, nn.Conv2d)):
        weight = conv.weight.detach()
        blocks = x.to_mkldnn()
        forward(blocks, weight)
        y = torch.conv2d(x, weight, None, 2, 1)
        if x.shape[1] == 1:  # the whole weight gradient is less work here
            backward(y, blocks, weight, (False, True, False))
        else:
            down = weight[:rank].clone()
            forward(blocks, down)
            backward(y[:, :rank].contiguous(), blocks, down, (False, True, False))
            last = [tensor.contiguous(memory_format=torch.channels_last) for tensor in (y, x, weight)]
            backward(last[0], last[1], last[2], (True, False, False))
        x = torch.relu(y)
    return works


def measure(options: argparse.Namespace) -> Measured:
    """All figures."""
    steps = QUICK_STEPS if options.quick else options.steps
    train, test = (loraio.load_dataset("digits", split) for split in ("train", "test"))
    base = loraio.pretrain("digit-cnn", loraio.PretrainConfig(epochs=3), train)
    config = loraio.TrainConfig(steps=steps, batch_size=BATCH)
    before = loraio.evaluate(base, test)
    alone = kernels(base, config.rank)

    def apart(known: loraio.Evaluation | None = None) -> Adapters:
        configs = {digit: replace(config, digit=digit) for digit in range(10)}
        return {digit: loraio.train(base, one, train, held_out=test, before=known) for digit, one in configs.items()}

    def together() -> Adapters:
        return loraio.train_each(base, config, train, held_out=test)

    def convolve() -> None:
        with torch.no_grad():
            for _ in range(10 * steps):
                for work in alone:
                    work()

    require(bytes_of(apart()) == bytes_of(together()), "the files of adapters that were trained together are others")
    works = {
        APART: apart,
        "ten runs, base counted once": lambda: apart(before),
        "loraio": together,
        "bound: kernels": convolve,
    }
    times = interleaved(works, rounds=rounds(options, 7), clock=CLOCKS[options.clock])
    case = f"digit-cnn, {steps} steps"
    return [
        ratio_of(times, who, APART, row=ROW, case=case, unit=f"x {APART}", target=TARGET if who == "loraio" else None)
        for who in works
        if who != APART
    ], []


def main() -> None:
    """Check, measure, print."""
    made = parser(__doc__, networks=())
    made.add_argument("--steps", type=int, default=100, help="of each adapter")
    run_row(ROW, made.parse_args(), measure, title="ten adapters trained together")


if __name__ == "__main__":
    main()

"""What do ten adapters cost that are trained together, against ten runs one after another?

usage: python scripts/bench/train_together.py [--steps N] [--rounds N] [--json]

Adapters of rank 4 for the ten digits on a `digit-cnn`, batches of 64 of the bundled digits, one thread, processor time.
Before any time is taken, both ways train for as many steps as are timed, and their files must have the same bytes.

- apart: `loraio.train` for each digit; each run counts what the base misreads by itself.
- steps: the same, but what the base misreads is known to all: what is left is steps, and counting after them.
- together: `loraio.train_each`.
- kernels: of the steps of all ten only the convolutions of both passes, in the layouts in which their kernels compute
  and between no layers. No way of training can spare them, so that this is a bound.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _paired import machine, ratios
from torch import Tensor, nn

import loraio

BATCH = 64

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


def measure(steps: int, rounds: int) -> dict[str, Any]:
    """Figures, as plain JSON values."""
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

    assert bytes_of(apart()) == bytes_of(together()), "the files differ"
    works = {"apart": apart, "steps": lambda: apart(before), "together": together, "kernels": convolve}
    return {"steps": steps, "ratios": ratios(works, against="apart", rounds=rounds, clock=time.process_time)}


def main() -> None:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="of each adapter")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(options.steps, options.rounds)
    if options.json:
        print(json.dumps({"schema": "loraio/bench/train_together/1", "machine": machine(), **found}))
        return
    print(f"ten adapters, {found['steps']} steps each: the files have the same bytes")
    for name, row in found["ratios"].items():
        print(
            f"  {name:9} {row['seconds']:7.2f} s  {row['ratio']:5.3f} x apart ({row['low']:.3f} to {row['high']:.3f})"
        )


if __name__ == "__main__":
    main()

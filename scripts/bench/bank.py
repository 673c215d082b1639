"""Does a swap from a bank cost more with 10,000 adapters registered than with one, and does memory stay bounded?

usage: python scripts/bench/bank.py [--registered N] [--rounds N] [--json]

It writes N files of a `digit-cnn` adapter and a pack of them to a temporary folder. First it checks that the banks give
the adapters that were written, and that ten times as many as fit are swapped through without more being kept than the
bound. Then, one thread, in turn: 20 swaps between two resident adapters, out of two banks of one adapter each, out of
the folder, and out of the pack.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from _paired import CLOCKS, Measured, exactly, interleaved, parser, ratio_of, require, rounds, run_row
from torch import nn

import loraio

ROW = "bank"
ONE = "banks of one"
SWAPS, ROUNDS = 20, 60
REGISTERED, QUICK_REGISTERED = 10_000, 30
TARGET = 1.1
FIT = 10
"""How many adapters fit into the bank whose memory is watched."""


def swaps(model: nn.Module, banks: tuple[loraio.Bank, loraio.Bank]) -> None:
    """Between the adapters a0 and a1, each out of its bank."""
    for number in range(SWAPS):
        banks[number % 2].swap(model, f"a{number % 2}")


def fill(folder: Path, adapters: list[loraio.Adapter], numbers: range) -> Path:
    """Write adapters by number, even ones the first, odd ones the second."""
    folder.mkdir()
    contents: dict[int, bytes] = {}
    for number in numbers:
        file = folder / f"a{number}.safetensors"
        if number % 2 in contents:
            file.write_bytes(contents[number % 2])
        else:
            loraio.save(adapters[number % 2], file)
            contents[number % 2] = file.read_bytes()
    return folder


def measure_in(folder: Path, options: argparse.Namespace) -> Measured:
    """All figures, with files in this folder."""
    registered = options.registered or (QUICK_REGISTERED if options.quick else REGISTERED)
    model = loraio.build_network("digit-cnn", seed=1).eval()
    adapters = [
        loraio.new_adapter(model, loraio.TrainConfig(rank=4, targets=("conv", "linear"), seed=seed)) for seed in (1, 2)
    ]
    size = sum(factor.nbytes for factor in adapters[0].factors.values())
    ones = [fill(folder / f"one{number}", adapters, range(number, number + 1)) for number in range(2)]
    many = fill(folder / "many", adapters, range(registered))
    loraio.pack([many], folder / "many.pack")

    banks: dict[str, tuple[loraio.Bank, loraio.Bank]] = {ONE: (loraio.Bank(ones[0]), loraio.Bank(ones[1]))}
    notes = []
    for name, source in ((f"folder of {registered:,}", many), (f"pack of {registered:,}", folder / "many.pack")):
        start = time.perf_counter()
        bank = loraio.Bank(source)
        notes.append(f"{name}: opened in {(time.perf_counter() - start) * 1e3:.1f} ms")
        require(len(bank) == registered, f"{name}: lists {len(bank)} adapters")
        banks[name] = bank, bank
    for name, pair in banks.items():
        for number, bank in enumerate(pair):
            require(bank[f"a{number}"] == adapters[number], f"{name}: a{number} is another adapter")

    bounded, most = loraio.Bank(many, max_bytes=FIT * size), 0
    for number in range(min(10 * FIT, registered)):
        live = bounded.swap(model, f"a{number}")
        require(live.adapter == adapters[number % 2], f"a{number} is not on the model after the swap")
        most = max(most, bounded.resident_bytes)
    require((FIT - 1) * size < most, "the bank keeps less than it may")
    require(most <= FIT * size, f"the bank keeps {most:,} bytes of {FIT * size:,} allowed")

    works: dict[str, Callable[[], None]] = {name: partial(swaps, model, pair) for name, pair in banks.items()}
    times = interleaved(works, rounds=rounds(options, ROUNDS), clock=CLOCKS[options.clock])
    times = {name: [seconds / SWAPS for seconds in row] for name, row in times.items()}
    unit = "x swap out of a bank of one"
    figures = [
        ratio_of(times, name, ONE, row=ROW, case=name, unit=unit, name="loraio", target=TARGET)
        for name in works
        if name != ONE
    ]
    share = exactly(
        ROW,
        f"{FIT} fit, {min(10 * FIT, registered)} used",
        "loraio",
        most / (FIT * size),
        "x max_bytes kept",
        target=1.0,
    )
    return [*figures, share], notes


def measure(options: argparse.Namespace) -> Measured:
    """All figures."""
    with tempfile.TemporaryDirectory() as folder:
        return measure_in(Path(folder), options)


def main() -> None:
    """Check, measure, print."""
    made = parser(__doc__, networks=())
    made.add_argument("--registered", type=int, default=None, help=f"adapters  [default: {REGISTERED:,}]")
    run_row(ROW, made.parse_args(), measure, title="swap between resident adapters out of a bank")


if __name__ == "__main__":
    main()

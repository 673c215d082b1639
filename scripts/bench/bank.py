"""Does a swap from a bank cost more with 10,000 adapters registered than with one, and does memory stay bounded?

usage: python scripts/bench/bank.py [--registered N] [--rounds N] [--json]

It writes N files of a `digit-cnn` adapter and a pack of them to a temporary folder. First it checks that the banks give
the adapters that were written, and that ten times as many as fit are swapped through without more being kept than the
bound. Then, one thread, in turn, the order rotated: 20 swaps between two resident adapters from each bank. The ratio is
the median over the rounds of each round's time over that of a folder with these two alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

import loraio

SWAPS = 20


def main() -> None:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--registered", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = loraio.build_network("digit-cnn", seed=1).eval()
    adapters = [
        loraio.new_adapter(model, loraio.TrainConfig(rank=4, targets=("conv", "linear"), seed=seed)) for seed in (1, 2)
    ]
    size = sum(factor.nbytes for factor in adapters[0].factors.values())
    with tempfile.TemporaryDirectory() as temporary:
        few, many = Path(temporary) / "few", Path(temporary) / "many"
        for folder, count in ((few, 2), (many, options.registered)):
            folder.mkdir()
            contents = []
            for number, adapter in enumerate(adapters):
                loraio.save(adapter, folder / f"a{number}.safetensors")
                contents.append((folder / f"a{number}.safetensors").read_bytes())
            for number in range(2, count):
                (folder / f"a{number}.safetensors").write_bytes(contents[number % 2])
        loraio.pack([many], Path(temporary) / "many.pack")
        banks = {"folder with 2": few, f"folder with {options.registered:,}": many}
        banks[f"pack of {options.registered:,}"] = Path(temporary) / "many.pack"
        opened, opening = {}, {}
        for name, source in banks.items():
            start = time.perf_counter()
            opened[name] = loraio.Bank(source)
            opening[name] = (time.perf_counter() - start) * 1e3
            assert opened[name]["a0"] == adapters[0]
            assert opened[name]["a1"] == adapters[1]

        bounded, most = loraio.Bank(many, max_bytes=10 * size), 0
        for number in range(min(100, options.registered)):
            assert bounded.swap(model, f"a{number}").adapter == adapters[number % 2]
            most = max(most, bounded.resident_bytes)
        assert 9 * size < most <= bounded.max_bytes

        times: dict[str, list[float]] = {name: [] for name in banks}
        names = list(banks)
        for number in range(options.rounds + 1):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                bank = opened[name]
                start = time.process_time()
                for swap in range(SWAPS):
                    bank.swap(model, f"a{swap % 2}")
                if number:
                    times[name].append((time.process_time() - start) / SWAPS * 1e3)
    rows = {
        name: {
            "open_ms": opening[name],
            "swap_ms": statistics.median(own),
            "ratio": statistics.median(a / b for a, b in zip(own, times[names[0]], strict=True)),
        }
        for name, own in times.items()
    }
    memory = {"bound": bounded.max_bytes, "most_resident": most, "adapter": size}
    if options.json:
        print(json.dumps({"torch": torch.__version__, "rounds": options.rounds, "banks": rows, "memory": memory}))
        return
    print(f"torch {torch.__version__}, one thread, {options.rounds} rounds of {SWAPS} swaps, processor time")
    for name, row in rows.items():
        print(f"{name:<20} opened in {row['open_ms']:7.1f} ms, swap {row['swap_ms']:.3f} ms, ratio {row['ratio']:.3f}")
    print(f"100 swapped through: at most {most:,} bytes kept of {bounded.max_bytes:,} allowed, {size:,} each")


if __name__ == "__main__":
    main()

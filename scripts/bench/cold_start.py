"""How long does a shell wait for the commands that need no torch?

usage: python scripts/bench/cold_start.py [--runs N] [--json]

Whole processes, wall clock, one thread: `loraio --help` and `loraio inspect FILE --json` against a Python that imports
torch, in turn, the order rotated. First it checks that the answers are right and that torch was not imported.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import loraio

ROOT = Path(__file__).resolve().parents[2]
ADAPTER = ROOT / "adapters/digit-3.safetensors"
COMMANDS = {
    "loraio --help": [sys.executable, "-m", "loraio", "--help"],
    "loraio inspect --json": [sys.executable, "-m", "loraio", "inspect", str(ADAPTER), "--json"],
    "import torch": [sys.executable, "-c", "import torch"],
}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def check() -> None:
    """The answers, before any time is taken."""
    seen = json.loads(subprocess.run(COMMANDS["loraio inspect --json"], capture_output=True, check=True).stdout)
    expected = loraio.load(ADAPTER)
    assert seen["parameters"] == expected.parameters
    assert list(seen["targets"]) == sorted(expected.targets)
    code = f"import sys, loraio.cli; sys.argv[1:] = ['inspect', {str(ADAPTER)!r}, '--json']\n"
    code += "try: loraio.cli.main()\nexcept SystemExit: sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=True)


def measure(runs: int) -> dict[str, list[float]]:
    """Seconds of each command, interleaved; one round beforehand is not counted."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    names = list(COMMANDS)
    for round_number in range(runs + 1):
        for name in names[round_number % len(names) :] + names[: round_number % len(names)]:
            start = time.perf_counter()
            subprocess.run(COMMANDS[name], stdout=subprocess.DEVNULL, check=True, env=ENVIRONMENT)
            if round_number:
                times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    check()
    times = measure(options.runs)
    torch_time = statistics.median(times["import torch"])
    rows = {
        name: {
            "median": statistics.median(row),
            "min": min(row),
            "max": max(row),
            "share": statistics.median(row) / torch_time,
        }
        for name, row in times.items()
    }
    machine = {
        "python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine(),
        "cpus": os.cpu_count(), "threads": 1, "runs": options.runs,
    }  # fmt: skip
    if options.json:
        print(json.dumps({"machine": machine, "seconds": rows}))
        return
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    for name, row in rows.items():
        print(
            f"{name:<24} median {row['median']:.3f} s ({row['min']:.3f} to {row['max']:.3f}), "
            f"{row['share']:.3f} of importing torch"
        )


if __name__ == "__main__":
    main()

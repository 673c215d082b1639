"""How long does a shell wait for the commands that need no torch?

usage: python scripts/bench/cold_start.py [--rounds N] [--json]

Whole processes, wall clock, one thread: `loraio --help` and `loraio inspect FILE --json`, and for comparison a Python
that imports torch, in turn. First it checks that the answers are right and that torch was not imported.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

from _paired import CLOCKS, Figure, Measured, interleaved, parser, require, rounds, run_row, spread

import loraio

ROW = "cold_start"
ADAPTER = Path(__file__).resolve().parents[2] / "adapters/digit-3.safetensors"
COMMANDS = {
    "loraio --help": [sys.executable, "-m", "loraio", "--help"],
    "loraio inspect --json": [sys.executable, "-m", "loraio", "inspect", str(ADAPTER), "--json"],
    "import torch": [sys.executable, "-c", "import torch"],
}
ENVIRONMENT = {
    # pip compiles what it installs
    **{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
TARGET = 0.25
ROUNDS = 15


def check() -> None:
    """The answers, before any time is taken."""
    seen = json.loads(subprocess.run(COMMANDS["loraio inspect --json"], capture_output=True, check=True).stdout)
    expected = loraio.load(ADAPTER)
    require(seen["parameters"] == expected.parameters, "inspect counts other parameters")
    require(list(seen["targets"]) == sorted(expected.targets), "inspect names other targets")
    help_text = subprocess.run(COMMANDS["loraio --help"], capture_output=True, check=True, text=True).stdout
    require("inspect" in help_text, "the help does not name the commands")
    for words in (["inspect", str(ADAPTER), "--json"], ["--help"]):
        code = f"import sys, loraio.cli; sys.argv[1:] = {words!r}\n"
        code += "try: loraio.cli.main()\nexcept SystemExit: sys.exit('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False)
        require(done.returncode == 0, f"loraio {words[0]} imports torch")


def measure(options: argparse.Namespace) -> Measured:
    """Seconds of each command."""
    check()
    works = {
        name: partial(subprocess.run, words, stdout=subprocess.DEVNULL, check=True, env=ENVIRONMENT)
        for name, words in COMMANDS.items()
    }
    figures = []
    for name, seconds in interleaved(works, rounds=rounds(options, ROUNDS), clock=CLOCKS["wall"]).items():
        low, middle, high = spread(seconds)
        is_ours = name.startswith("loraio")
        figures.append(
            Figure(
                row=ROW, case=name, who="loraio" if is_ours else "Python", value=middle, low=low, high=high, unit="s",
                seconds=middle, target=TARGET if is_ours else None,
            )
        )  # fmt: skip
    return figures, []


def main() -> None:
    """Check, measure, print."""
    options = parser(__doc__, networks=(), clock="wall").parse_args()
    run_row(ROW, options, measure, title="whole processes of commands that need no torch")


if __name__ == "__main__":
    main()

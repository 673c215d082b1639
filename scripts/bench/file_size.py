"""How much larger is an adapter file than the bytes of its factors?

usage: python scripts/bench/file_size.py [--networks NAME ...] [--json]

Rank 8 on every convolution and linear layer, float32. The file that loraio writes, names, layers and the identity of
the base included, and the two files that PEFT writes for the factors that it takes, each against the bytes of the
factors in it. First the file is read again and must give the same adapter.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from _contestants import built, drawn, left_out, peer, peft_folder, ungrouped
from _paired import Measured, exactly, gathered, parser, require, run_row, short

import loraio

ROW = "file_size"
UNIT = "x the factors' bytes"
TARGETS = {"torchvision:resnet50": 1.01}


def raw_bytes(adapter: loraio.Adapter) -> int:
    """Of its factors alone."""
    return sum(factor.nbytes for factor in adapter.factors.values())


def measure_one(network: str) -> Measured:
    """One network."""
    model, case, notes = built(network), short(network), []
    adapter = drawn(model)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "adapter.safetensors")
        loraio.save(adapter, file)
        require(loraio.load(file) == adapter, f"{case}: the file holds another adapter")
        share = file.stat().st_size / raw_bytes(adapter)
        figures = [exactly(ROW, case, "loraio", share, UNIT, target=TARGETS.get(network))]
        if peer("peft", notes):
            saved = peft_folder(model, adapter, Path(folder, "peft"))
            size = sum((saved / name).stat().st_size for name in ("adapter_model.safetensors", "adapter_config.json"))
            figures.append(exactly(ROW, case, "PEFT", size / raw_bytes(ungrouped(adapter)), UNIT))
            notes += [f"{case}: {line}" for line in left_out(adapter)]
    return figures, notes


def measure(options: argparse.Namespace) -> Measured:
    """All networks."""
    return gathered(measure_one(network) for network in options.networks)


def main() -> None:
    """Check, measure, print."""
    run_row(ROW, parser(__doc__).parse_args(), measure, title="adapter file against the bytes of its factors, rank 8")


if __name__ == "__main__":
    main()

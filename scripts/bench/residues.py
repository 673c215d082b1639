"""How large is the residue of a reversible merge, and what do it and the way back take of time?

usage: python scripts/bench/residues.py [--networks NAME ...] [--rounds N] [--json]

The shipped digit-cnn with its adapter for the digit 3, and each network with random weights and factors of rank 8 on
every convolution and linear layer, in float32 and bfloat16. First the base is restored from merged file, adapter and
residue, and must have the bytes of its file. Then a merge, a reversible one and the way back take turns. Beside our
coder: what lzma and deflate make of the same differences, as byte planes.
"""

from __future__ import annotations

import argparse
import lzma
import tempfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from _contestants import built, drawn
from _paired import CLOCKS, Measured, exactly, gathered, interleaved, parser, ratios, require, rounds, run_row, short
from torch import Tensor

import loraio
from loraio.adapter.adapter import Adapter, parts_of
from loraio.adapter.kinds import KINDS
from loraio.bases.identity import base_reference, tensor_sha256
from loraio.bases.models import write_base
from loraio.files.tensors import dtype_code
from loraio.merging.residues import predicted, steps_between

ROW = "residues"
ROUNDS = 5
SHIPPED = Path(__file__).resolve().parents[2] / "adapters"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CODERS: Mapping[str, Callable[[bytes], bytes]] = {
    "lzma": lambda plane: lzma.compress(plane, preset=6),
    "deflate 9": lambda plane: zlib.compress(plane, 9),
    "Huffman alone": lambda plane: huffman(plane),
}


def huffman(plane: bytes) -> bytes:
    """Deflate without matches."""
    coder = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(plane) + coder.flush()


def fitted(adapter: Adapter, state: Mapping[str, Tensor]) -> Adapter:
    """The adapter for the same base in another dtype."""
    targets = {
        name: replace(target, dtype=dtype_code(state[name].dtype), base_sha256=tensor_sha256(state[name]), sketch=())
        for name, target in adapter.targets.items()
    }
    return replace(adapter, targets=targets, base=base_reference(state))


def planes_of(state: Mapping[str, Tensor], adapter: Adapter) -> list[bytes]:
    """The differences to the predicted weights, lowest bytes first, each plane by itself, slice by slice."""
    planes = []
    for name, target in adapter.targets.items():
        require(not KINDS[target.kind].side_numbers(1), f"{name}: a kind that keeps more than differences")
        for at, part in parts_of(adapter, name):
            base = state[name][at]
            steps = steps_between(base, predicted(part, part.fold(name, base), 1.0, None))
            digits = steps.view("u1").reshape(len(steps), -1)
            planes += [digits[:, byte].tobytes() for byte in range(digits.shape[1])]
    return planes


def measure_one(case: str, base: Path, path: Path, options: argparse.Namespace) -> Measured:
    """One base and adapter."""
    with tempfile.TemporaryDirectory() as name:
        plain, merged, again = (Path(name, word) for word in ("plain", "merged", "again"))
        works = {
            "merge": lambda: loraio.merge_file(base, path, plain, overwrite=True, workers=1),
            "reversible": lambda: loraio.merge_file(base, path, merged, overwrite=True, workers=1, reversible=True),
            "unmerge": lambda: loraio.unmerge_file(merged, again, adapter=path, overwrite=True, workers=1),
        }
        kept = works["reversible"]().residue
        works["unmerge"]()
        require(again.read_bytes() == base.read_bytes(), f"{case}: what comes back is not the base")
        assert kept is not None
        state, adapter = loraio.read_base(base).state, loraio.load(path)
        planes = planes_of(state, adapter)
        unit = "bits a folded weight"
        figures = [exactly(ROW, case, "loraio", kept.bits_per_weight, unit)]
        for coder, work in CODERS.items():
            size = sum(len(work(plane)) for plane in planes)
            figures.append(exactly(ROW, case, coder, 8 * size / kept.weights, unit))
        figures.append(exactly(ROW, case, "loraio", kept.share, "of the base's bytes"))
        times = interleaved(works, rounds=rounds(options, ROUNDS), clock=CLOCKS[options.clock])
        figures += ratios(times, "merge", row=ROW, case=case, unit="x a plain merge")
    return figures, []


def measure_network(network: str, options: argparse.Namespace) -> Measured:
    """One network in each dtype."""
    model, parts = built(network), []
    drawn_for = drawn(model)
    for dtype, cast in DTYPES.items():
        state = {name: t.to(cast) if t.is_floating_point() else t for name, t in model.state_dict().items()}
        with tempfile.TemporaryDirectory() as name:
            base, path = Path(name, "base.safetensors"), Path(name, "adapter.safetensors")
            write_base(state, base, network=None)
            loraio.save(fitted(drawn_for, state), path)
            parts.append(measure_one(f"{short(network)}, {dtype}", base, path, options))
    return gathered(parts)


def measure(options: argparse.Namespace) -> Measured:
    """The shipped pair, then all networks."""
    shipped = measure_one(
        "shipped digit-3, float32", SHIPPED / "base.safetensors", SHIPPED / "digit-3.safetensors", options
    )
    return gathered([shipped, *(measure_network(network, options) for network in options.networks)])


def main() -> None:
    """Check, measure, print."""
    run_row(ROW, parser(__doc__).parse_args(), measure, title="residue of a reversible merge, and the way back, rank 8")


if __name__ == "__main__":
    main()

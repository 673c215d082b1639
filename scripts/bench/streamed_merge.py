"""How long does a streamed merge take next to a plain copy of the base, and how much memory?

usage: python scripts/bench/streamed_merge.py [--gigabytes N] [--targets k|qv|attention|all ...] [--folder FOLDER]
       [--workers N] [--rounds N] [--json]

Writes a bfloat16 checkpoint of random weights, blocks of a transformer, and a rank 16 adapter for some of its weights;
then merges and copies it in turn, each a process of its own that ends in fsync, by the wall clock. Both outputs are
checked first: the copy by its bytes, the merge by its own evidence and by the digest of the state dict that it says it
holds. Twice the checkpoint has to fit on the disk.

``--targets`` says how much is folded: ``k`` the key projections, 0.03 of the bytes; ``qv`` the query and value
projections, 0.15; ``attention`` all four projections, 0.29; ``all`` every matrix.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import torch
from _paired import CLOCKS, Measured, Times, exactly, gathered, interleaved, parser, ratio_of, require, rounds, run_row

import loraio
from loraio.adapter import Adapter, BaseReference, Target
from loraio.bases.identity import state_sha256
from loraio.files import tensorfile
from loraio.files.tensors import tensor_bytes, tensor_sha256

ROW = "streamed_merge"
RANK = 16
TARGETS = {
    "k": ("attention.k",),
    "qv": ("attention.q", "attention.v"),
    "attention": ("attention.q", "attention.k", "attention.v", "attention.o"),
    "all": ("attention.q", "attention.k", "attention.v", "attention.o", "mlp.up", "mlp.down"),
}

TARGET = 1.3
"""Of the time of cp, where the key projections are folded."""

MAX_MEGABYTES = 400
ROUNDS = 3
QUICK_SIZE, QUICK_WIDTH = 0.002, 64
IMPORT = "import loraio; loraio.merge_file"

MERGE = """
import json, sys, time
start = time.perf_counter()
import loraio
merge_file = loraio.merge_file
imported = time.perf_counter()
base, adapter, output, workers = sys.argv[1:]
merged = merge_file(base, adapter, output, overwrite=True, workers=int(workers))
print(json.dumps({"import": imported - start, "merge": time.perf_counter() - imported, "sha256": merged.sha256}))
"""

COPY = """
import os, subprocess, sys
subprocess.run(["cp", *sys.argv[1:]], check=True)
file = os.open(sys.argv[2], os.O_RDONLY)
os.fsync(file)
"""


def make_base(path: Path, size: float, width: int) -> dict[str, str]:
    """Writes the base; gives the digests of its tensors. Each is another piece of the same random numbers."""
    square, narrow = (width, width), (width // 4, width)
    shapes = square, narrow, narrow, square, (3 * width, width), (width, 3 * width)
    matrices = dict(zip(TARGETS["all"], shapes, strict=True))
    block = sum(out * fan_in * 2 for out, fan_in in shapes)
    facts = {
        f"blocks.{k}.{name}.weight": ("BF16", shape)
        for k in range(max(round(size * 1e9 / block), 1))
        for name, shape in matrices.items()
    }
    start, placed = tensorfile.layout(facts, {}, where="the base")
    most = max(math.prod(info.shape) for info in placed.values())
    pool = (torch.randn(most + len(placed), generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    known: dict[str, str] = {}
    with path.open("wb") as file:
        file.write(start)
        for number, (name, info) in enumerate(placed.items()):
            weight = pool[number : number + math.prod(info.shape)]
            file.write(tensor_bytes(weight).numpy().data)
            known[name] = tensor_sha256(weight)
    return known


def make_adapter(base: Path, known: dict[str, str], choice: str, path: Path) -> float:
    """Writes an adapter; gives the share of the base's bytes that it folds."""
    placed = tensorfile.read_header(base).tensors
    generator = torch.Generator().manual_seed(1)
    targets: dict[str, Target] = {}
    factors: dict[str, torch.Tensor] = {}
    for name, info in placed.items():
        if name.split(".", 2)[2].removesuffix(".weight") in TARGETS[choice]:
            targets[name] = Target(
                rank=RANK, alpha=RANK, shape=info.shape, dtype="BF16", layer="Linear", base_sha256=known[name]
            )
            for short, shape in targets[name].factor_shapes.items():
                factors[f"{name}.{short}"] = torch.randn(shape, generator=generator) * 0.02
    described = {n: torch.empty(i.shape, dtype=torch.bfloat16, device="meta") for n, i in placed.items()}
    reference = BaseReference(sha256=state_sha256(described, known))
    loraio.save(Adapter(targets=targets, factors=factors, base=reference), path, overwrite=True)
    return sum(placed[name].end - placed[name].begin for name in targets) / sum(
        i.end - i.begin for i in placed.values()
    )


def run(code: str, *words: object) -> tuple[float, float, int, str]:
    """Seconds, those of processors, the most anonymous memory in bytes, sampled, and what a process printed."""
    start, before, peak = time.perf_counter(), processor_seconds(), 0
    with subprocess.Popen([sys.executable, "-c", code, *map(str, words)], stdout=subprocess.PIPE, text=True) as process:

        def watch() -> None:
            nonlocal peak
            while process.poll() is None:
                try:
                    status = Path(f"/proc/{process.pid}/status").read_text()
                except OSError:
                    return
                peak = max([peak, *(int(line.split()[1]) * 1024 for line in status.splitlines() if "RssAnon" in line)])
                time.sleep(0.01)

        watcher = threading.Thread(target=watch)
        watcher.start()
        printed = process.stdout.read() if process.stdout else ""
        watcher.join()
    seconds = time.perf_counter() - start
    require(process.returncode == 0, f"exit code {process.returncode}")
    return seconds, processor_seconds() - before, peak, printed


def processor_seconds() -> float:
    """Of all children that have ended: what a busy machine does not stretch."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def cached(path: Path) -> float:
    """The share of a file that is in the page cache, by fincore; -1 where that is not known."""
    try:
        words = ["fincore", "--bytes", "--noheadings", "--output", "RES", str(path)]
        return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout) / path.stat().st_size
    except (OSError, subprocess.CalledProcessError):
        return -1.0


def measure_one(base: Path, adapter: Path, case: str, target: float | None, options: argparse.Namespace) -> Measured:
    """Merge and copy in turn, their outputs checked in the first round, which is not counted."""
    merged, copy = base.with_name("merged.safetensors"), base.with_name("copy.safetensors")
    words = {"merge": (MERGE, base, adapter, merged, options.workers), "cp": (COPY, base, copy)}
    processors: Times = {"merge": [], "cp": []}
    peak, resident, inside = 0, 1.0, []

    def clear() -> None:
        nonlocal resident
        for old in (merged, copy):
            old.unlink(missing_ok=True)
        resident = min(resident, cached(base))

    def work(kind: str, _: None = None) -> str:
        nonlocal peak
        _, busy, memory, printed = run(*words[kind])
        processors[kind].append(busy)
        if kind == "merge":
            peak = max(peak, memory)
            inside.append(json.loads(printed)["import"])
        return printed

    clear()
    printed, _ = work("merge"), work("cp")
    require(filecmp.cmp(base, copy, shallow=False), "the copy is another file")
    sha256 = (tensorfile.read_header(merged).document() or {})["sha256"]
    require(sha256 == json.loads(printed)["sha256"], "the merged file names another digest")
    for row in (*processors.values(), inside):
        row.clear()
    works = {kind: partial(work, kind) for kind in words}
    count = rounds(options, ROUNDS)
    seconds = interleaved(works, rounds=count, clock=CLOCKS["wall"], before=dict.fromkeys(words, clear), warmup=0)
    clear()
    limit = None if options.quick else MAX_MEGABYTES
    unit = "x cp, processor time"
    return [
        ratio_of(seconds, "merge", "cp", row=ROW, case=case, unit="x cp", name="loraio", target=target),
        ratio_of(processors, "merge", "cp", row=ROW, case=case, unit=unit, name="loraio"),
        exactly(ROW, case, "loraio", peak / 1e6, "MB of anonymous memory", target=limit),
        exactly(ROW, case, "import alone", run(IMPORT)[2] / 1e6, "MB of anonymous memory"),
        exactly(ROW, case, "import alone", statistics.median(inside), "s"),
    ], [f"{case}: base in the page cache at the least {resident:.2f}"]


def measure(options: argparse.Namespace) -> Measured:
    """Each choice of targets."""
    size = options.gigabytes or (QUICK_SIZE if options.quick else 6.0)
    width = options.width or (QUICK_WIDTH if options.quick else 4096)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        base, adapter = Path(name, "base.safetensors"), Path(name, "adapter.safetensors")
        known = make_base(base, size, width)
        parts = []
        for choice in options.targets:
            share = make_adapter(base, known, choice, adapter)
            case = f"{base.stat().st_size / 1e9:.3g} GB, {share:.2f} folded"
            target = TARGET if choice == "k" and not options.quick else None
            parts.append(measure_one(base, adapter, case, target, options))
    return gathered(parts)


def main() -> None:
    """Check, measure, print."""
    made = parser(__doc__, networks=(), clock="wall")
    made.add_argument("--gigabytes", type=float, default=None, help="[default: 6]")
    made.add_argument("--targets", choices=TARGETS, nargs="+", default=["k"])
    made.add_argument("--width", type=int, default=None, help="of the blocks  [default: 4096]")
    made.add_argument("--folder", type=Path, default=None, help="where the files go  [default: a temporary one]")
    made.add_argument("--workers", type=int, default=2)
    run_row(ROW, made.parse_args(), measure, title="streamed merge of a checkpoint against cp, until it is on the disk")


if __name__ == "__main__":
    main()

"""How long does a streamed merge take next to a plain copy of the base, and how much memory?

    python scripts/bench/streamed_merge.py --gigabytes 6 --folder /tmp/big --json

Writes a bfloat16 checkpoint of random weights, blocks of a transformer, and a rank 16 adapter for some of its weights;
then merges and copies it in turn, each a process of its own that ends in fsync. Both outputs are checked first: the
copy by its bytes, the merge by its own evidence and by the digest of the state dict that it says it holds. Twice
the checkpoint has to fit on the disk.

``--targets`` says how much is folded: ``k`` the key projections, 0.03 of the bytes; ``qv`` the query and value
projections, 0.15; ``attention`` all four projections, 0.29; ``all`` every matrix.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

import loraio
from loraio import container
from loraio.adapter import Adapter, BaseReference, Target
from loraio.identity import state_sha256, tensor_sha256

RANK = 16
TARGETS = {
    "k": ("attention.k",),
    "qv": ("attention.q", "attention.v"),
    "attention": ("attention.q", "attention.k", "attention.v", "attention.o"),
    "all": ("attention.q", "attention.k", "attention.v", "attention.o", "mlp.up", "mlp.down"),
}

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

SPLIT = """
import hashlib, json, os, sys, threading, time, types
from loraio import outputs, streaming
from loraio.adapter import Adapter
import loraio

merge_file, lock, spent = loraio.merge_file, threading.Lock(), {}

def timed(name, function):
    def call(*words, **options):
        start = time.perf_counter()
        try:
            return function(*words, **options)
        finally:
            with lock:
                spent[name] = spent.get(name, 0.0) + time.perf_counter() - start
    return call

class Hash:
    def __init__(self):
        whole = hashlib.sha256()
        self.update, self.hexdigest = timed("hash", whole.update), whole.hexdigest

streaming.hashlib = types.SimpleNamespace(sha256=Hash)
for name in ("copy_range", "write_all", "_read", "check_fold"):
    setattr(streaming, name, timed(name.strip("_"), getattr(streaming, name)))
Adapter.fold = timed("fold", Adapter.fold)
os.fsync = timed("fsync", os.fsync)
base, adapter, output, workers = sys.argv[1:]
timed("merge_file", merge_file)(base, adapter, output, overwrite=True, workers=int(workers))
print(json.dumps(spent))
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
    start, placed = container.layout(facts, {}, where="the base")
    most = max(math.prod(info.shape) for info in placed.values())
    pool = (torch.randn(most + len(placed), generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    known: dict[str, str] = {}
    with path.open("wb") as file:
        file.write(start)
        for number, (name, info) in enumerate(placed.items()):
            weight = pool[number : number + math.prod(info.shape)]
            file.write(container.tensor_bytes(weight).numpy().data)
            known[name] = tensor_sha256(weight)
    return known


def make_adapter(base: Path, known: dict[str, str], choice: str, path: Path) -> float:
    """Writes an adapter; gives the share of the base's bytes that it folds."""
    placed = container.read_header(base).tensors
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
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, words)], stdout=subprocess.PIPE, text=True)

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
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}")
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


def measure(base: Path, adapter: Path, folder: Path, *, repeats: int, workers: int) -> dict[str, Any]:
    """Merge and copy in turn, their outputs checked in the first round, which is not counted."""
    merged, copy = folder / "merged.safetensors", folder / "copy.safetensors"
    words = {"merge": (MERGE, base, adapter, merged, workers), "copy": (COPY, base, copy)}
    seconds: dict[str, list[float]] = {"merge": [], "copy": []}
    processors: dict[str, list[float]] = {"merge": [], "copy": []}
    peak, resident, inside = 0, 1.0, []
    for turn in range(repeats + 1):
        for kind in ("merge", "copy") if turn % 2 else ("copy", "merge"):
            for old in (merged, copy):
                old.unlink(missing_ok=True)
            resident = min(resident, cached(base))
            taken, busy, memory, printed = run(*words[kind])
            if not turn and kind == "copy":
                subprocess.run(["cmp", base, copy], check=True)
            elif not turn:
                assert (container.read_header(merged).document() or {})["sha256"] == json.loads(printed)["sha256"]
            else:
                seconds[kind].append(taken)
                processors[kind].append(busy)
            if kind == "merge":
                peak = max(peak, memory)
                inside.append(json.loads(printed)["import"])
    for old in (merged, copy):
        old.unlink(missing_ok=True)
    *_, printed = run(SPLIT, *words["merge"][1:])
    merged.unlink()
    ratios = [m / c for m, c in zip(seconds["merge"], seconds["copy"], strict=True)]
    return {
        "merge_seconds": statistics.median(seconds["merge"]),
        "copy_seconds": statistics.median(seconds["copy"]),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "import_seconds": statistics.median(inside),
        "merge_processor_seconds": statistics.median(processors["merge"]),
        "copy_processor_seconds": statistics.median(processors["copy"]),
        "peak_anonymous_mb": peak / 1e6,
        "base_in_page_cache": resident,
        "seconds_in_all_workers": json.loads(printed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--targets", choices=TARGETS, nargs="+", default=["qv"])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--folder", type=Path, default=None, help="where the files go  [default: a temporary one]")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        base, adapter = Path(name, "base.safetensors"), Path(name, "adapter.safetensors")
        known = make_base(base, given.gigabytes, given.width)
        for choice in given.targets:
            result: dict[str, Any] = {
                "gigabytes": base.stat().st_size / 1e9,
                "targets": choice,
                "share_folded": make_adapter(base, known, choice, adapter),
                "workers": given.workers,
                **measure(base, adapter, Path(name), repeats=given.repeats, workers=given.workers),
                "import_anonymous_mb": run("import loraio; loraio.merge_file")[2] / 1e6,
                "torch": torch.__version__,
                "python": platform.python_version(),
                "processors": os.cpu_count(),
            }
            if given.json:
                print(json.dumps(result), flush=True)
                continue
            for key, value in result.items():
                print(f"{key:24} {value:.3f}" if isinstance(value, float) else f"{key:24} {value}", flush=True)


if __name__ == "__main__":
    main()

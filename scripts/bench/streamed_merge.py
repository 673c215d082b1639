"""How long does a streamed merge take next to a plain copy of the base, and how much memory?

    python scripts/bench/streamed_merge.py --gigabytes 6 --folder /tmp/big --json

Writes a bfloat16 checkpoint of random weights, blocks of a transformer, and a rank 16 adapter for some of its weights;
then merges and copies it in turn, each a process of its own that ends in fsync. Both outputs are checked first: the
copy by its bytes, the merge by its own evidence and by the digest of the state dict that it says it holds. Three times
the checkpoint has to fit on the disk.

``--targets`` says how much is folded: ``qv`` the query and value projections, a tenth of the bytes; ``attention`` all
four projections, a third; ``all`` every matrix.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
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

WIDTH, RANK = 4096, 16
MATRICES = {
    "attention.q": (WIDTH, WIDTH),
    "attention.k": (1024, WIDTH),
    "attention.v": (1024, WIDTH),
    "attention.o": (WIDTH, WIDTH),
    "mlp.up": (3 * WIDTH, WIDTH),
    "mlp.down": (WIDTH, 3 * WIDTH),
}
TARGETS = {
    "qv": ("attention.q", "attention.v"),
    "attention": ("attention.q", "attention.k", "attention.v", "attention.o"),
    "all": tuple(MATRICES),
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


def make(folder: Path, size: float, choice: str) -> tuple[Path, Path, float]:
    """Base and adapter, and the share of the base's bytes that is folded."""
    block = sum(out * fan_in * 2 for out, fan_in in MATRICES.values())
    facts = {
        f"blocks.{k}.{name}.weight": ("BF16", shape)
        for k in range(max(round(size * 1e9 / block), 1))
        for name, shape in MATRICES.items()
    }
    base, adapter = folder / "base.safetensors", folder / "adapter.safetensors"
    start, placed = container.layout(facts, {}, where="the base")
    generator = torch.Generator().manual_seed(0)
    targets: dict[str, Target] = {}
    factors: dict[str, torch.Tensor] = {}
    known: dict[str, str] = {}
    with base.open("wb") as file:
        file.write(start)
        for name, info in placed.items():
            weight = (torch.randn(info.shape, generator=generator) * 0.02).bfloat16()
            file.write(container.tensor_bytes(weight).numpy().data)
            known[name] = tensor_sha256(weight)
            if name.split(".", 2)[2].removesuffix(".weight") in TARGETS[choice]:
                targets[name] = Target(
                    rank=RANK, alpha=RANK, shape=info.shape, dtype="BF16", layer="Linear", base_sha256=known[name]
                )
                for short, shape in targets[name].factor_shapes.items():
                    factors[f"{name}.{short}"] = torch.randn(shape, generator=generator) * 0.02
    described = {n: torch.empty(i.shape, dtype=torch.bfloat16, device="meta") for n, i in placed.items()}
    reference = BaseReference(sha256=state_sha256(described, known))
    loraio.save(Adapter(targets=targets, factors=factors, base=reference), adapter, overwrite=True)
    share = sum(placed[name].end - placed[name].begin for name in targets) / sum(
        i.end - i.begin for i in placed.values()
    )
    return base, adapter, share


def run(code: str, *words: object) -> tuple[float, int, str]:
    """Seconds, the most anonymous memory in bytes, sampled, and what a process printed."""
    start, peak = time.perf_counter(), 0
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
    return seconds, peak, printed


def cached(path: Path) -> float:
    """The share of a file that is in the page cache, by fincore; -1 where that is not known."""
    try:
        words = ["fincore", "--bytes", "--noheadings", "--output", "RES", str(path)]
        return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout) / path.stat().st_size
    except (OSError, subprocess.CalledProcessError):
        return -1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--targets", choices=TARGETS, default="attention")
    parser.add_argument("--folder", type=Path, default=None, help="where the files go  [default: a temporary one]")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        base, adapter, share = make(folder, given.gigabytes, given.targets)
        merged, copy = folder / "merged.safetensors", folder / "copy.safetensors"
        words = {"merge": (MERGE, base, adapter, merged, given.workers), "copy": (COPY, base, copy)}
        seconds: dict[str, list[float]] = {"merge": [], "copy": []}
        peak, resident, inside = 0, cached(base), []
        for turn in range(given.repeats + 1):  # the first warms up
            for kind in ("merge", "copy") if turn % 2 else ("copy", "merge"):
                for old in (merged, copy):
                    old.unlink(missing_ok=True)
                resident = min(resident, cached(base))
                taken, memory, printed = run(*words[kind])
                if not turn:
                    if kind == "copy":
                        subprocess.run(["cmp", base, copy], check=True)
                    else:
                        said = container.read_header(merged).document() or {}
                        assert said["sha256"] == json.loads(printed)["sha256"]
                    continue
                seconds[kind].append(taken)
                if kind == "merge":
                    peak = max(peak, memory)
                    inside.append(json.loads(printed)["import"])
        merged.unlink()
        copy.unlink()
        _, _, printed = run(SPLIT, *words["merge"][1:])
        _, plain, _ = run("import loraio, torch, numpy; loraio.merge_file")
        result: dict[str, Any] = {
            "gigabytes": base.stat().st_size / 1e9,
            "targets": given.targets,
            "share_folded": share,
            "workers": given.workers,
            "merge_seconds": statistics.median(seconds["merge"]),
            "of_which_import": statistics.median(inside),
            "copy_seconds": statistics.median(seconds["copy"]),
            "ratio": statistics.median(m / c for m, c in zip(seconds["merge"], seconds["copy"], strict=True)),
            "ratios": [m / c for m, c in zip(seconds["merge"], seconds["copy"], strict=True)],
            "peak_anonymous_mb": peak / 1e6,
            "import_anonymous_mb": plain / 1e6,
            "base_in_page_cache": resident,
            "seconds_in_all_workers": json.loads(printed),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "processors": os.cpu_count(),
        }
    if given.json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        print(f"{key:20} {value:.3f}" if isinstance(value, float) else f"{key:20} {value}")


if __name__ == "__main__":
    main()

"""The same inputs give the same bytes, in whatever process."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "every_output.py"

ENVIRONMENTS: dict[str, dict[str, str]] = {
    "usual": {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
    "another": {
        "PYTHONHASHSEED": "4711", "OMP_NUM_THREADS": "1", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0",
        "TZ": "Asia/Tokyo",
    },
    "two threads": {"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "2", "LC_ALL": "C.UTF-8", "COLUMNS": "20"},
}  # fmt: skip

TRAINED = {"lora.safetensors", "dora.safetensors", "resumed.safetensors"}
TRAINED |= {"each-3.safetensors", "each-7.safetensors"}
"""Sums over batches come in another order with another number of threads."""


@pytest.fixture(scope="module")
def digests(files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """By environment the digest of every file that `every_output.py` makes; listings are shuffled in each."""
    folder = tmp_path_factory.mktemp("made")
    found = {}
    for seed, (name, more) in enumerate(ENVIRONMENTS.items()):
        words = [sys.executable, SCRIPT, files, folder / name.replace(" ", "-"), str(seed)]
        process = subprocess.run(words, env={**os.environ, **more}, capture_output=True, timeout=500, check=False)
        assert process.returncode == 0, process.stderr.decode()
        found[name] = json.loads(process.stdout)
    return found


def test_processes_that_differ_in_all_but_the_inputs_write_the_same_bytes(digests: dict[str, dict[str, str]]) -> None:
    usual, another, threads = digests.values()
    assert len(usual) > 30
    assert usual == another
    assert {name: usual[name] for name in usual if name not in TRAINED} == {
        name: threads[name] for name in threads if name not in TRAINED
    }


def test_ways_that_are_promised_to_agree_do_in_each_process(digests: dict[str, dict[str, str]], files: Path) -> None:
    three = hashlib.sha256((files / "three.safetensors").read_bytes()).hexdigest()
    for found in digests.values():
        assert found["lora.safetensors"] == found["resumed.safetensors"] == found["each-3.safetensors"]
        assert found["merged-1.safetensors"] == found["merged-2.safetensors"] == found["merged-5.safetensors"]
        for part in ("part-0.safetensors", "part-1.safetensors", "base.safetensors.index.json"):
            assert len({found[f"parted-{workers}/{part}"] for workers in (1, 2, 5)}) == 1
        assert {found[f"{dialect}-back"] for dialect in ("peft", "lycoris", "kohya", "diffusers")} == {three}
        assert found["kept-1"] == found["kept-2"]
        assert found["kept-1.residue"] == found["kept-2.residue"]
        assert found["unmerged"] == hashlib.sha256((files / "base.safetensors").read_bytes()).hexdigest()
        assert found["all.pack"] == found["listed.pack"]

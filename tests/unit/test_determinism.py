"""The same inputs give the same bytes, in whatever process."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
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


Made = Callable[[str], dict[str, str]]


@pytest.fixture(scope="module")
def made(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Return the digest of each file that `every_output.py` makes in an environment, where listings are shuffled."""
    folder = tmp_path_factory.mktemp("made")

    @functools.cache
    def digests(name: str) -> dict[str, str]:
        words = [sys.executable, SCRIPT, files, folder / name, str(len(name))]
        environment = {**os.environ, **ENVIRONMENTS[name]}
        process = subprocess.run(words, env=environment, capture_output=True, timeout=500, check=False)
        assert process.returncode == 0, process.stderr.decode()
        found: dict[str, str] = json.loads(process.stdout)
        return found

    return digests


def test_processes_that_differ_in_all_but_the_inputs_write_the_same_bytes(made: Made) -> None:
    assert len(made("usual")) > 30
    assert made("usual") == made("another")


@pytest.mark.slow
def test_two_threads_write_the_same_bytes_wherever_nothing_is_trained(made: Made) -> None:
    usual, threads = made("usual"), made("two threads")
    assert usual.keys() == threads.keys()
    assert {name for name in usual if usual[name] != threads[name]} <= TRAINED


def test_ways_that_are_promised_to_agree_do_in_each_process(made: Made, files: Path) -> None:
    three = hashlib.sha256((files / "three.safetensors").read_bytes()).hexdigest()
    for found in (made("usual"), made("another")):
        assert found["lora.safetensors"] == found["resumed.safetensors"] == found["each-3.safetensors"]
        assert found["merged-1.safetensors"] == found["merged-2.safetensors"] == found["merged-5.safetensors"]
        for part in ("part-0.safetensors", "part-1.safetensors", "base.safetensors.index.json"):
            assert len({found[f"parted-{workers}/{part}"] for workers in (1, 2, 5)}) == 1
        assert {found[f"{dialect}-back"] for dialect in ("peft", "lycoris", "kohya", "diffusers")} == {three}
        assert found["kept-1"] == found["kept-2"]
        assert found["kept-1.residue"] == found["kept-2.residue"]
        assert found["unmerged"] == hashlib.sha256((files / "base.safetensors").read_bytes()).hexdigest()
        assert found["all.pack"] == found["listed.pack"]

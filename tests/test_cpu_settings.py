"""Run folding, merging and verification as older and newer processors do, by the switches of torch's libraries."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

SETTINGS: dict[str, dict[str, str]] = {
    "as it is": {},
    "AVX-512": {
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "ATEN_CPU_CAPABILITY": "avx512",
    },
    "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "SSE": {"ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ATEN_CPU_CAPABILITY": "default"},
}
"""A processor without the instructions takes the next lower ones."""

FOLDS = "tests/contract", "tests/golden", "tests/property/test_merge.py", "tests/unit/adapter", "tests/unit/merging"

DIGESTS = """
import hashlib, sys
from dataclasses import replace
import numpy, torch, loraio
from loraio.files.tensors import tensor_bytes

SHAPES = (64, 3, 7), (256, 64, 1), (512, 512, 3), (2048, 512, 1), (512, 2048, 1)  # as in resnet50

class Net(torch.nn.Sequential):
    def __init__(self):
        super().__init__(*(torch.nn.Conv2d(b, a, k) for a, b, k in SHAPES), torch.nn.Linear(2048, 1000))

model = Net()
config = loraio.TrainConfig(rank=8, alpha=6, targets=("all",), clamp_rank=True)
drawn = numpy.random.default_rng(0)  # torch's own generator draws other numbers with other instructions

def random(like):
    return torch.from_numpy(drawn.standard_normal(tuple(like.shape)) * 0.02)

plain = {name: random(tensor) for name, tensor in model.state_dict().items()}
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for kind in ("lora", "dora"):
        model.to(dtype).load_state_dict(plain)
        adapter = loraio.new_adapter(model, replace(config, kind=kind))
        factors = {name: random(factor).float() for name, factor in sorted(adapter.factors.items())}
        for threads in (1, 2):
            torch.set_num_threads(threads)
            merged = loraio.merge(model.state_dict(), replace(adapter, factors=factors))
            digest = hashlib.sha256()
            for name in sorted(merged):
                digest.update(tensor_bytes(merged[name]).numpy().data)
            print(dtype, kind, digest.hexdigest())
"""


@pytest.mark.slow
def test_merged_bytes_are_the_same_on_every_processor() -> None:
    found = {}
    for name, more in SETTINGS.items():
        command = [sys.executable, "-c", DIGESTS]
        done = subprocess.run(command, env={**os.environ, **more}, capture_output=True, text=True, check=True)
        found[name] = done.stdout.splitlines()
    usual = found["as it is"]
    assert len(set(usual)) == len(usual) / 2 == 8  # one and two threads agree
    assert found == dict.fromkeys(found, usual)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_the_tests_of_folding_pass_on_every_processor(name: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *FOLDS]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **SETTINGS[name]}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr

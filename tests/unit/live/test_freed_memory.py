"""Keep the memory of a training step for the next one."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

BLOCKS = """
import ctypes, sys, torch, loraio
from torch import nn

class Info(ctypes.Structure):
    _fields_ = [(f"field{number}", ctypes.c_size_t) for number in range(10)]

look = ctypes.CDLL(None).mallinfo2
look.restype = Info
model = nn.Sequential(nn.Conv2d(1, 2, 3)).requires_grad_(False)
if sys.argv[1] == "attached":
    loraio.attach(model, loraio.new_adapter(model, loraio.TrainConfig(rank=1)), trainable=True)
before = look().field3
block = torch.empty(2**24, dtype=torch.uint8)
print(look().field3 - before)
"""
"""Prints 1 if a block of 16 MiB is mapped by itself, and so goes back to the system at once: mallinfo(3)."""


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "mallinfo2"),
    reason="of glibc's own ways",
)
@pytest.mark.parametrize(("how", "count"), [("attached", 0), ("alone", 1)])
def test_a_training_step_keeps_its_memory_for_the_next_one(how: str, count: int) -> None:
    usual = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_"))}
    done = subprocess.run([sys.executable, "-c", BLOCKS, how], env=usual, capture_output=True, check=True)
    assert int(done.stdout) == count

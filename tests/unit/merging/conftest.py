"""The state dict of the trained base, and a chain of two reversible merges."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from checkpoints import State
from torch import nn

import loraio


@pytest.fixture
def state(trained_base: nn.Module) -> State:
    """A dict of the trained base's tensors, which are shared: not to be written to."""
    return dict(trained_base.state_dict())


@pytest.fixture
def chain(files: Path, tmp_path: Path) -> Path:
    """base, once and twice, each reversible; and the adapters."""
    for name in ("base", "three", "seven"):
        shutil.copy(files / f"{name}.safetensors", tmp_path / name)
    loraio.merge_file(tmp_path / "base", tmp_path / "three", tmp_path / "once", reversible=True)
    loraio.merge_file(
        tmp_path / "once", tmp_path / "seven", tmp_path / "twice", reversible=True, force=True, strength=0.5
    )
    return tmp_path

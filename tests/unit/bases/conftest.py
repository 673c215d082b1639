"""Fixtures of the tests of base models."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from loraio.bases import identity


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every tensor of a base that is hashed from now on."""
    seen: list[Tensor] = []
    real = identity.tensor_sha256
    monkeypatch.setattr(identity, "tensor_sha256", lambda tensor: seen.append(tensor) or real(tensor))
    return seen


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Writes a module of the user's own that can be imported."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()

    return write

"""Files to write and to replace."""

from __future__ import annotations

from pathlib import Path

import pytest
from outputs import write


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "some.safetensors"


@pytest.fixture
def old(path: Path) -> Path:
    """A file with the value 1."""
    write(path)
    return path

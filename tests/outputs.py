"""Small output files, and looks at what lies where they were written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from loraio.files import tensorfile


def write(path: Path, value: float = 1.0, **options: Any) -> None:
    tensorfile.write({"w": torch.full((3,), value)}, path, document={"a": 1}, **options)


def value_in(path: Path) -> float:
    return float(tensorfile.read_tensors(tensorfile.read_header(path))["w"][0])


def only(folder: Path, *names: str) -> None:
    """Assert that nothing else lies in the folder."""
    assert sorted(entry.name for entry in folder.iterdir()) == sorted(names)


def failing(message: str) -> Callable[..., None]:
    """Return a system call that finds the disk full."""

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, message)

    return fail

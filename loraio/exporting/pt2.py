"""Networks as ``*.pt2``, for ``torch.export.load``."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraio.exporting.outputs import named_outputs
from loraio.exporting.runtimes import Run, Runtime, quiet


def write(program: Any, path: Path, names: Sequence[str], opset: int | None) -> None:
    """Write a traced program."""
    buffer = io.BytesIO()  # given a path, torch writes its name into the bytes, and raises errors of its own
    with quiet():
        torch.export.save(program, buffer)
    path.write_bytes(buffer.getbuffer())


def open_file(path: Path) -> Run:
    """Open a file with torch."""
    with quiet(), path.open("rb") as file:
        network = torch.export.load(file).module()

    def run(batch: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return list(named_outputs(network(batch)).values())

    return run


RUNTIME = Runtime(write=write, open=open_file)

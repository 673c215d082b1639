"""Shared parts of all export formats: the form of a runtime, and quiet calls of torch's exporters."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraio.errors import first_line

Run = Callable[[Tensor], list[Tensor]]
"""Computes the outputs of one batch, in their order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """A program that runs exported networks.

    Attributes:
        write: writes a traced program to a file, with these names of the outputs and this opset; returns the opset.
        open: opens that file to run it; shares nothing with the network it was made of.
        check: refuses, before any work, a network of this dtype that the runtime cannot take.
        opsets: true if the file has an opset.
    """

    write: Callable[[Any, Path, Sequence[str], int | None], int | None]
    open: Callable[[Path], Run]
    check: Callable[[nn.Module, torch.dtype], None] = lambda network, dtype: None
    opsets: bool = False


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings and log lines of the exporters; errors are raised, and faults show when the file is run."""
    before = logging.root.manager.disable
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.disable(logging.CRITICAL)
            yield
    finally:
        logging.disable(before)


def root_cause(error: BaseException) -> str:
    """Return class and first line of the error at the bottom of a chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)

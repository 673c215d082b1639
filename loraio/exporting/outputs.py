"""Outputs of a network, and the comparison of an exported file's outputs with them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loraio.errors import ConfigError
from loraio.exporting.runtimes import root_cause

RTOL = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Bound for each dtype of the network, relative to the largest output. Other programs sum in another order, and
onnxruntime folds normalisation into convolutions; weights in half precision would be further off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedOutput:
    """One output of an exported network against the same output of the network itself.

    Attributes:
        name: "output", or the key or the place among the network's outputs.
        shape: for one sample.
        max_abs: largest absolute difference; infinite where shapes or dtypes differ or a number is not finite.
        bound: its bound: ``atol + rtol * the largest output``.
        argmax_agreement: share, 0 to 1, of the places where both name the same class along the first dimension of
            ``shape``; None for outputs of one number.
    """

    name: str
    shape: tuple[int, ...]
    max_abs: float
    bound: float
    argmax_agreement: float | None

    @property
    def ok(self) -> bool:
        """True if the difference is within the bound."""
        return self.max_abs <= self.bound < math.inf

    def __str__(self) -> str:
        line = f"{self.name!r}: the largest difference is {self.max_abs:.3g}, it may be {self.bound:.2g}"
        agreement = self.argmax_agreement
        return line if agreement is None else f"{line}; the same answer: {agreement:.2%}"


def expected_outputs(network: nn.Module, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Run a network on some batches and return its outputs by name, all rows of all batches together.

    Raises:
        ConfigError: the network does not take the batches, or its outputs are not tensors with a row for each sample,
            or not finite.
    """
    answers: list[dict[str, Tensor]] = []
    for batch in inputs:
        try:
            with torch.no_grad():
                given = network(batch)
        except Exception as error:  # a network of the user's own may raise anything
            raise ConfigError(
                f"the network does not take inputs of shape {tuple(batch.shape)}: {root_cause(error)}",
                hint="--input-shape (input_shape= in Python), of one sample",
            ) from error
        answers.append(named_outputs(given))
        for name, tensor in answers[-1].items():
            if tensor.shape[:1] != batch.shape[:1] or not tensor.numel():
                found = f"{name!r} of the network is {tuple(tensor.shape)} for {len(batch)} samples"
                raise ConfigError(f"{found}, not a row of numbers for each")
    together = {name: torch.cat([answer[name] for answer in answers]) for name in answers[0]}
    for name, tensor in together.items():
        if not bool(tensor.isfinite().all()):
            raise ConfigError(f"{name!r} of the network is NaN or infinite, and cannot be compared")
    return together


def named_outputs(given: Any) -> dict[str, Tensor]:
    """Return the outputs of a network by name.

    Raises:
        ConfigError: they are not a tensor, or a flat tuple, list or dict of tensors.
    """
    if isinstance(given, Tensor):
        return {"output": given}
    named = {}
    if isinstance(given, Mapping):
        named = {str(key): value for key, value in given.items()}
    elif isinstance(given, tuple | list):
        named = {f"output_{number}": value for number, value in enumerate(given)}
    if not named or not all(isinstance(value, Tensor) for value in named.values()):
        raise ConfigError(
            f"the network gives {type(given).__name__}, not a tensor nor a flat tuple, list or dict of tensors"
        )
    return named


def compare(
    expected: Mapping[str, Tensor], found: Sequence[Sequence[Tensor]], *, atol: float, rtol: float
) -> tuple[ExportedOutput, ...]:
    """Compare each output of a network with the outputs of a file for each batch, in the same order."""
    outputs = []
    for place, (name, wanted) in enumerate(expected.items()):
        batches = [batch[place] for batch in found if place < len(batch)]
        max_abs, agreement = math.inf, 0.0 if wanted.ndim > 1 else None
        numbers = wanted.double()
        if {(batch.shape[1:], batch.dtype) for batch in batches} == {(wanted.shape[1:], wanted.dtype)}:
            values = torch.cat(batches).double()
            if values.shape == wanted.shape:
                max_abs = float((values - numbers).abs().max().nan_to_num(nan=math.inf, posinf=math.inf))
                if wanted.ndim > 1:
                    agreement = float((values.argmax(1) == numbers.argmax(1)).double().mean())
        bound = atol + rtol * float(numbers.abs().max())
        shape = tuple(wanted.shape[1:])
        outputs.append(ExportedOutput(name=name, shape=shape, max_abs=max_abs, bound=bound, argmax_agreement=agreement))
    return tuple(outputs)

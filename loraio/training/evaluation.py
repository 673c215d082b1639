"""Evaluate a model on a data set: accuracy, and errors of each class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loraio.adapter import Adapter
from loraio.errors import BaseMismatchError, DataError
from loraio.live.attachment import Attachment, attach
from loraio.live.module_classes import mode_of
from loraio.training.datasets import Dataset

BATCH = 1000
"""Images in one forward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Counts of right and wrong answers on a data set.

    Attributes:
        images: number of images.
        wrong: for each class, the number of its images that were read as another class.
        false_alarms: for each class, the number of images of other classes that were read as it.
    """

    images: int
    wrong: tuple[int, ...]
    false_alarms: tuple[int, ...]

    @property
    def accuracy(self) -> float:
        """Return the share of right answers, 0 to 1."""
        return (self.images - sum(self.wrong)) / self.images

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"accuracy": self.accuracy, "wrong": list(self.wrong), "false_alarms": list(self.false_alarms)}


def evaluate(model: nn.Module, dataset: Dataset) -> Evaluation:
    """Count the model's answers to every image, in eval mode; its mode is restored.

    Raises:
        DataError: as for `predict`.
    """
    labels = dataset.labels
    answers = predict(model, dataset.images, classes=dataset.classes).argmax(1)
    missed = answers != labels
    return Evaluation(
        images=len(labels),
        wrong=tuple(torch.bincount(labels[missed], minlength=dataset.classes).tolist()),
        false_alarms=tuple(torch.bincount(answers[missed], minlength=dataset.classes).tolist()),
    )


def predict(model: nn.Module, images: Tensor, *, classes: int | None = None) -> Tensor:
    """Return the model's outputs for images, in eval mode and without gradients.

    Args:
        model: on any device; its mode is restored.
        images: (n, channels, height, width), float32.
        classes: number of outputs that the model must have; None for any.

    Returns:
        (n, classes), in the model's dtype, on the CPU.

    Raises:
        DataError: the model does not take images of this shape, or its outputs are NaN, infinite or of another number.
    """
    first = next(model.parameters(), torch.zeros(()))  # a network may have none
    try:
        with preserved_modes(model), torch.no_grad():
            model.eval()
            parts = [model(batch.to(first.device, first.dtype)).cpu() for batch in images.split(BATCH)]
    except RuntimeError as error:
        raise DataError(f"the network does not take images of shape {tuple(images.shape[1:])}: {error}") from error
    outputs = torch.cat(parts)
    if not bool(outputs.isfinite().all()):
        raise DataError(
            "the network's outputs are NaN or infinite", hint="check its weights, and the strength of the adapter"
        )
    if classes is not None and outputs.shape[1:] != (classes,):
        raise DataError(
            f"the network gives {tuple(outputs.shape[1:])} numbers for an image, the data need ({classes},)"
        )
    return outputs


def has_outputs(model: nn.Module, dataset: Dataset) -> bool:
    """Return True if the model has one output for each class of the data set."""
    return predict(model, dataset.images[:1]).shape[1:] == (dataset.classes,)


@contextmanager
def preserved_modes(model: nn.Module) -> Iterator[None]:
    """Restore the training flag of every module after the block."""
    modes = [(module, mode_of(module)) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def evaluate_each(
    model: nn.Module,
    adapters: Mapping[str, Adapter],
    dataset: Dataset,
    *,
    strength: float = 1.0,
    allow_base_mismatch: bool = False,
) -> tuple[Evaluation | None, dict[str, Evaluation]]:
    """Evaluate the base alone, and with each adapter in turn: attached once, then swapped on the live model.

    Args:
        model: the base model; it is given back unchanged.
        adapters: by any name.
        dataset: images to evaluate on.
        strength: strength of every adapter.
        allow_base_mismatch: continue where values or dtypes of the base differ.

    Returns:
        the result of the base, and results by adapter name. The base has None if it has another number of outputs than
        the data set has classes, and an adapter brings a head of its own.

    Raises:
        BaseMismatchError: an adapter does not belong to this base.
        DataError: as for `evaluate`.
    """
    alone = None
    if not any(adapter.heads for adapter in adapters.values()) or has_outputs(model, dataset):
        alone = evaluate(model, dataset)
    results: dict[str, Evaluation] = {}
    live: Attachment | None = None
    try:
        for name, adapter in adapters.items():
            try:
                if live is None:
                    live = attach(model, adapter, strength, allow_base_mismatch=allow_base_mismatch)
                else:
                    live.swap(adapter)
            except BaseMismatchError as error:
                raise BaseMismatchError(
                    f"{name!r}: {error.message}", problems=error.problems, where=error.where, hint=error.hint
                ) from error
            results[name] = evaluate(model, dataset)
    finally:
        if live is not None:
            live.detach()
    return alone, results

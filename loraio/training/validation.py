"""Validate an adapter while it trains: loss on held-out images, early stop, best factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from loraio.errors import DataError, TrainingError
from loraio.training.datasets import Dataset
from loraio.training.evaluation import predict
from loraio.training.optimizing import Moment, Optimization


class Validation:
    """An observer that measures loss and accuracy every ``every`` steps and after the last.

    All images count alike: ``focus`` is for batches only. The model runs in eval mode and full precision.

    Attributes:
        latest: loss (mean cross-entropy in nats) and accuracy (0 to 1) after the last step; None if not measured then.
        stopped: step after which patience ended the run; None until then.
    """

    def __init__(self, model: nn.Module, dataset: Dataset, *, every: int, patience: int | None) -> None:
        self._model = model
        self._dataset = dataset
        self._every = every
        self._patience = patience
        self._best: dict[str, Any] = {"loss": math.inf, "accuracy": 0.0, "step": 0}
        self._best_values: dict[str, Tensor] = {}
        self._stale = 0
        self.latest: tuple[float, float] | None = None
        self.stopped: int | None = None

    def __call__(self, run: Optimization, moment: Moment) -> bool:
        """Measure if this step is due; return True to end the run.

        Raises:
            TrainingError: the outputs are NaN or infinite.
        """
        self.latest = None
        if moment.step % self._every and not moment.last:
            return False
        loss, accuracy = self.latest = self._measure(moment.step)
        if self._patience is None or loss < self._best["loss"]:
            self._best = {"loss": loss, "accuracy": accuracy, "step": moment.step}
            self._stale = 0
            if self._patience is not None:
                self._best_values = {name: value.clone() for name, value in run.values().items()}
            return False
        self._stale += 1
        if self._stale >= self._patience and not moment.last:
            self.stopped = moment.step
        return self.stopped is not None

    def _measure(self, step: int) -> tuple[float, float]:
        labels = self._dataset.labels
        try:
            outputs = predict(self._model, self._dataset.images, classes=self._dataset.classes).double()
        except DataError as error:
            raise TrainingError(f"validation at step {step}: {error.message}", hint="a smaller --lr") from error
        return float(F.cross_entropy(outputs, labels)), float((outputs.argmax(1) == labels).double().mean())

    def give_best(self, run: Optimization) -> None:
        """Restore the parameters of the smallest loss, if patience was set."""
        if self._best_values:
            run.restore(self._best_values)

    def to_json(self) -> dict[str, Any]:
        """Return the number of images, and loss, accuracy and step of the final factors, for the adapter file."""
        stopped = {} if self.stopped is None else {"stopped": self.stopped}
        return {"images": len(self._dataset), **self._best, **stopped}

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors for another process."""
        return {"best": self._best, "best_values": self._best_values, "stale": self._stale, "stopped": self.stopped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of another process."""
        self._best, self._best_values = dict(state["best"]), dict(state["best_values"])
        self._stale, self.stopped = state["stale"], state["stopped"]

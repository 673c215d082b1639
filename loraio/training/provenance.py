"""Records of how a file was made: data, settings, versions, results. They hold no dates and no host names."""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import Any

import torch

from loraio.training.config import PretrainConfig, TrainConfig
from loraio.training.datasets import Dataset
from loraio.training.evaluation import Evaluation
from loraio.training.validation import Validation
from loraio.version import __version__


def base_record(config: PretrainConfig, dataset: Dataset, counted_on: Dataset, result: Evaluation) -> dict[str, Any]:
    """Return the record for a base checkpoint; the ``training`` of `loraio.save_base`."""
    hyperparameters = asdict(config) | {"optimizer": "adam"}
    seed = hyperparameters.pop("seed")
    return {
        **_origin(dataset, seed),
        "hyperparameters": hyperparameters,
        "results": {**_described(counted_on), "after": result.to_json()},
    }


def adapter_record(
    config: TrainConfig,
    dataset: Dataset,
    counted_on: Dataset,
    *,
    steps: int,
    before: Evaluation | None,
    after: Evaluation,
    validation: Validation | None = None,
) -> dict[str, Any]:
    """Return the record for an adapter file.

    Args:
        config: the settings.
        dataset: training images, with those for validation.
        counted_on: images that ``before`` and ``after`` were counted on.
        steps: number of planned steps.
        before: results of the base; None if it has another number of outputs.
        after: results with the adapter.
        validation: None if no images were held out.
    """
    record = {**_origin(dataset, config.seed), "digit": config.digit}
    if config.digit is not None and dataset.class_names[config.digit] != str(config.digit):
        record["class"] = dataset.class_names[config.digit]
    if validation is not None:
        record["validation"] = validation.to_json()
    results = _described(counted_on)
    if before is not None:
        results["before"] = before.to_json()
    results["after"] = after.to_json()
    return {**record, "steps": steps, "hyperparameters": config.hyperparameters(), "results": results}


def _origin(dataset: Dataset, seed: int) -> dict[str, Any]:
    versions = {"loraio": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return {**_described(dataset), "seed": seed, "versions": versions}


def _described(dataset: Dataset) -> dict[str, Any]:
    return {"dataset": dataset.name, "split": dataset.split, "images": len(dataset)}

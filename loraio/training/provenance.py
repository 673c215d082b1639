"""What files say about how they came to be: data, settings, versions, results. No dates and no host names."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from loraio.training.config import PretrainConfig, TrainConfig
from loraio.training.datasets import Dataset
from loraio.training.evaluation import Evaluation
from loraio.version import __version__


def base_record(config: PretrainConfig, dataset: Dataset, counted_on: Dataset, result: Evaluation) -> dict[str, Any]:
    """What a base checkpoint says about its making; the ``training`` of `loraio.save_base`."""
    hyperparameters = asdict(config) | {"optimizer": "adam"}
    seed = hyperparameters.pop("seed")
    return {
        **_provenance(dataset, seed),
        "hyperparameters": hyperparameters,
        "results": {**_counted_on(counted_on), "after": result.to_json()},
    }


def adapter_record(
    config: TrainConfig,
    dataset: Dataset,
    counted_on: Dataset,
    *,
    steps: int,
    before: Evaluation | None,
    after: Evaluation,
    validation: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What an adapter file says about its making.

    Args:
        config: the settings.
        dataset: what it was trained on, validation images included.
        counted_on: what ``before`` and ``after`` were counted on.
        steps: that were planned.
        before, after: results of the base, None where it has none on these data, and with the adapter.
        validation: `Validation.to_json`, where images were held out.
    """
    results = {} if before is None else {"before": before.to_json()}
    results["after"] = after.to_json()
    named: dict[str, Any] = {}
    if config.digit is not None and dataset.class_names[config.digit] != str(config.digit):
        named["class"] = dataset.class_names[config.digit]
    if validation is not None:
        named["validation"] = dict(validation)
    return {
        **_provenance(dataset, config.seed),
        "digit": config.digit,
        **named,
        "steps": steps,
        "hyperparameters": config.hyperparameters(),
        "results": {**_counted_on(counted_on), **results},
    }


def _provenance(dataset: Dataset, seed: int) -> dict[str, Any]:
    """No dates and no host names: two runs of one training on one machine say the same."""
    versions = {"loraio": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return {"dataset": dataset.name, "split": dataset.split, "images": len(dataset), "seed": seed, "versions": versions}


def _counted_on(dataset: Dataset) -> dict[str, Any]:
    return {"dataset": dataset.name, "split": dataset.split, "images": len(dataset)}

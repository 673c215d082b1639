"""Validation images, early stop, and the choice of the final factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import loraio
from loraio.errors import ConfigError, DataError, TrainingError
from loraio.training import loop
from loraio.training.optimizing import Moment, Optimization
from loraio.training.validation import Validation

HELD = 10
"""Images of `few` that a share of 0.1 holds out."""


def test_no_batch_shows_a_validation_image(digits: loraio.Dataset) -> None:
    config = loraio.TrainConfig(digit=3, steps=50, val_share=0.2)
    rows, held = loop._drawn(config, digits)
    assert held is not None
    shown = digits.images[rows.unique()].flatten(1)
    same = torch.cdist(held.images.flatten(1), shown).min(1).values == 0
    assert not bool(same.any())
    assert len(held) + len(rows.unique()) <= len(digits)
    assert rows.shape == (50, 64)


def test_the_split_follows_the_seed(digits: loraio.Dataset) -> None:
    assert loop._drawn(loraio.TrainConfig(digit=3, steps=5), digits)[1] is None
    parts = [loop._drawn(loraio.TrainConfig(steps=2, val_share=0.1, seed=seed), digits)[1] for seed in (1, 1, 2)]
    one, again, other = (part.images for part in parts if part is not None)
    assert one.equal(again)
    assert not one.equal(other)


def test_validation_is_recorded_and_does_not_disturb_the_run(base: nn.Module, few: loraio.Dataset) -> None:
    settings: dict[str, Any] = {"digit": 3, "steps": 6, "batch_size": 8, "val_share": 0.1}
    often = loraio.train(base, loraio.TrainConfig(**settings, val_every=1), few)
    never = loraio.train(base, loraio.TrainConfig(**settings), few)
    assert all(often.factors[name].equal(factor) for name, factor in never.factors.items())
    found = never.training["validation"]
    assert found.keys() == {"images", "loss", "accuracy", "step"}
    assert found == often.training["validation"]
    assert (found["step"], found["images"]) == (6, HELD)
    assert never.training["hyperparameters"]["val_share"] == 0.1


def scripted(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> list[dict[str, torch.Tensor]]:
    """Let validation find these losses; return the factors at each of them."""
    seen: list[dict[str, torch.Tensor]] = []
    left = iter(losses)
    monkeypatch.setattr(Validation, "_measure", lambda self, step: (next(left), 0.5))
    real = Validation.__call__

    def look(self: Validation, run: Optimization, moment: Moment) -> bool:
        seen.append({name: value.detach().clone() for name, value in run.parameters.items()})
        return real(self, run, moment)

    monkeypatch.setattr(Validation, "__call__", look)
    return seen


def test_the_run_stops_when_patience_is_lost_and_keeps_the_best(
    base: nn.Module, few: loraio.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = scripted(monkeypatch, [3.0, 2.0, 2.5, 1.0, 1.5, 1.0, 9.0])
    config = loraio.TrainConfig(digit=3, steps=50, batch_size=8, val_share=0.1, val_every=1, patience=2)
    reports: list[loraio.Progress] = []
    adapter = loraio.train(base, config, few, on_progress=reports.append)
    assert len(seen) == 6
    assert adapter.training["validation"] == {"images": HELD, "loss": 1.0, "accuracy": 0.5, "step": 4, "stopped": 6}
    assert [report.step for report in reports] == [6]
    assert adapter.training["steps"] == 50
    for found, best in zip(adapter.factors.values(), seen[3].values(), strict=True):
        assert found.equal(best)


def test_the_best_factors_are_kept_at_the_planned_end_too(
    base: nn.Module, few: loraio.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = scripted(monkeypatch, [3.0, 1.0, 2.0, 2.0])
    config = loraio.TrainConfig(digit=3, steps=4, batch_size=8, val_share=0.1, val_every=1, patience=9)
    adapter = loraio.train(base, config, few)
    assert adapter.training["validation"] == {"images": HELD, "loss": 1.0, "accuracy": 0.5, "step": 2}
    assert all(a.equal(b) for a, b in zip(adapter.factors.values(), seen[1].values(), strict=True))


def test_patience_needs_validation_images_and_they_need_two_of_a_class(base: nn.Module) -> None:
    with pytest.raises(ConfigError, match="patience needs validation images"):
        loraio.TrainConfig(patience=3)
    one_each = loraio.Dataset(name="ten", split="train", images=torch.zeros(10, 1, 28, 28), labels=torch.arange(10))
    with pytest.raises(DataError, match="no class has two images"):
        loraio.train(base, loraio.TrainConfig(steps=2, val_share=0.5), one_each)


def test_outputs_that_explode_are_a_training_error(base: nn.Module, few: loraio.Dataset) -> None:
    config = loraio.TrainConfig(digit=3, steps=30, lr=1e30, batch_size=8, val_share=0.1, val_every=2)
    with pytest.raises(TrainingError, match=r"validation at step \d+: the network's outputs are NaN or infinite"):
        loraio.train(base, config, few)

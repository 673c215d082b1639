"""Planning an adapter: weights, ranks and alphas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import loraio
from loraio.errors import ConfigError, StateError, UnknownNameError


def planned(model: nn.Module, **settings: Any) -> dict[str, tuple[int, int | float]]:
    targets = loraio.plan_targets(model, loraio.TrainConfig(**settings))
    return {name.removesuffix(".weight"): (target.rank, target.alpha) for name, target in targets.items()}


def test_the_last_pattern_that_matches_counts(base: nn.Module) -> None:
    patterns = {"conv*": 2, "conv3": 8, "re:conv[12]": 3}
    assert planned(base, rank_pattern=patterns, targets=("all",)) == {
        "conv1": (3, 3), "conv2": (3, 3), "conv3": (8, 8), "fc": (4, 4),
    }  # fmt: skip
    assert planned(base, rank_pattern={"conv3": 8, "conv*": 2}) == {"conv1": (2, 2), "conv2": (2, 2), "conv3": (2, 2)}


def test_alphas_go_by_patterns_too(base: nn.Module) -> None:
    found = planned(base, alpha=6, alpha_pattern={"conv2": 1.5}, rank_pattern={"conv1": 2})
    assert found == {"conv1": (2, 6), "conv2": (4, 1.5), "conv3": (4, 6)}


def test_what_is_excluded_stays_out(base: nn.Module) -> None:
    assert list(planned(base, targets=("all",), exclude=("conv[12]",))) == ["conv3", "fc"]
    with pytest.raises(UnknownNameError, match="exclude pattern 'convo1' matches no weight"):
        planned(base, exclude=("convo1",))


def test_a_pattern_that_matches_no_target_is_refused(base: nn.Module) -> None:
    with pytest.raises(UnknownNameError, match="the rank pattern 'fc' matches no target"):
        planned(base, rank_pattern={"fc": 2})
    with pytest.raises(UnknownNameError, match="the alpha pattern 'layer4' matches no target"):
        planned(base, alpha_pattern={"layer4": 2})


def test_ranks_that_are_too_large_are_all_listed_or_clamped(base: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"rank 65 is more than 'conv1.weight' can use") as caught:
        planned(base, rank=65)
    assert caught.value.problems == ("rank 65 is more than 'conv2.weight' can use: as a matrix it is (64, 288)",)
    assert "--rank 9 or less, --clamp-rank" in str(caught.value)
    assert planned(base, rank=65, clamp_rank=True) == {"conv1": (9, 9), "conv2": (64, 64), "conv3": (65, 65)}
    assert planned(base, rank=65, alpha=3, clamp_rank=True)["conv1"] == (9, 3)


def test_planning_reads_only(base: nn.Module, three: loraio.Adapter) -> None:
    kept = {name: value.clone() for name, value in base.state_dict().items()}
    assert planned(base) == {"conv1": (4, 4), "conv2": (4, 4), "conv3": (4, 4)}
    assert all(base.state_dict()[name].equal(value) for name, value in kept.items())
    with loraio.attach(base, three), pytest.raises(StateError):
        planned(base)


def test_the_adapter_starts_as_it_was_planned(base: nn.Module, few: loraio.Dataset) -> None:
    config = loraio.TrainConfig(rank_pattern={"conv1": 2, "fc": 7}, targets=("all",), kind="dora")
    adapter = loraio.new_adapter(base, config)
    assert adapter.targets == loraio.plan_targets(base, config)
    assert adapter.factors["fc.weight.lora_A"].shape == (7, 2048)
    plain = loraio.predict(base, few.images[:20])
    with loraio.attach(base, adapter):
        torch.testing.assert_close(loraio.predict(base, few.images[:20]), plain)


def test_ranks_by_pattern_train(base: nn.Module, few: loraio.Dataset) -> None:
    config = loraio.TrainConfig(digit=3, steps=3, batch_size=8, rank=2, rank_pattern={"conv3": 6}, exclude=("conv1",))
    adapter = loraio.train(base, config, few)
    assert {name: target.rank for name, target in adapter.targets.items()} == {"conv2.weight": 2, "conv3.weight": 6}
    assert adapter.training["hyperparameters"]["rank_pattern"] == {"conv3": 6}
    assert adapter.training["hyperparameters"]["exclude"] == ["conv1"]

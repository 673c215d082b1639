"""Settings of a training run: defaults and refusals."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

import loraio
from loraio.errors import ConfigError, UnknownNameError
from loraio.training.config import MAX_SEED

NAN, INF = float("nan"), float("inf")


def test_the_defaults_are_those_of_the_command_line() -> None:
    from loraio.cli import main

    for command, config in (("train", loraio.TrainConfig(digit=3)), ("pretrain", loraio.PretrainConfig())):
        words = ["-o", "x", *(["base", "--digit", "3"] if command == "train" else [])]
        options = main.commands[command].make_context(command, words).params
        shared = (options.keys() - {"heads"}) & config.__dataclass_fields__.keys()  # pairs there, a mapping here
        assert {"lr", "batch_size", "seed"} <= shared
        assert {name: options[name] for name in shared} == {name: getattr(config, name) for name in shared}


SHARED = {"batch_size": (0, 1.5, True), "lr": (0, -1e-3, NAN, INF, "fast", None), "seed": (-1, 1.0, MAX_SEED + 1)}
OWN = {
    loraio.PretrainConfig: {"epochs": (0, -1, 1.5, True, None)},
    loraio.TrainConfig: {
        "digit": (-1, 3.0, "3"), "rank": (0, 2.0, None), "alpha": (0, -1, NAN, INF, 10**400, True, "4"),
        "focus": (0, 1.01, NAN, "half"), "steps": (0, 1.5), "targets": ("conv", ()), "exclude": ("conv1",),
        "warmup": (-1, 1.5), "weight_decay": (-0.1, True, INF), "lora_plus": (0,), "clip_norm": (0,),
        "accumulate": (0,), "val_share": (-0.1, 1), "val_every": (0,), "patience": (0,), "compile": (1,),
        "clamp_rank": ("yes",), "device": ("gpu", "cuda:x", 0),
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [
        (config, name, value)
        for config, own in OWN.items()
        for name, values in {**SHARED, **own}.items()
        for value in values
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(config: type, name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{name} is "):
        config(**{name: value})


@pytest.mark.parametrize(
    ("setting", "near"),
    [
        ({"init": "kaimin"}, "kaiming"),
        ({"kind": "lorra"}, "lora"),
        ({"scale_rule": "alpha/R"}, "alpha/r"),
        ({"amp": "bf61"}, "bf16"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(setting: dict[str, Any], near: str) -> None:
    with pytest.raises(UnknownNameError, match=f"did you mean '{near}'"):
        loraio.TrainConfig(**setting)


def test_the_edges_of_the_ranges_are_allowed_and_targets_become_a_tuple() -> None:
    config = loraio.TrainConfig(digit=0, rank=1, alpha=0.5, focus=1, steps=1, batch_size=1, seed=MAX_SEED)
    assert replace(config, seed=0, focus=1e-9).seed == 0
    assert loraio.TrainConfig(targets=["conv1", "fc"]).targets == ("conv1", "fc")  # type: ignore[arg-type]
    with pytest.raises(FrozenInstanceError):
        config.seed = 2  # type: ignore[misc]


def test_a_rank_or_alpha_of_a_pattern_is_checked_and_named() -> None:
    with pytest.raises(ConfigError, match=r"rank_pattern\['conv1'\] is 0"):
        loraio.TrainConfig(rank_pattern={"conv1": 0})
    with pytest.raises(ConfigError, match=r"alpha_pattern\['fc'\] is nan"):
        loraio.TrainConfig(alpha_pattern={"fc": float("nan")})
    assert hash(loraio.TrainConfig(rank_pattern={"conv1": 2})) == hash(loraio.TrainConfig())


def test_what_came_later_is_recorded_only_where_it_differs() -> None:
    plain = loraio.TrainConfig().hyperparameters()
    assert plain.keys() == {"init", "focus", "lr", "schedule", "batch_size", "targets", "optimizer"}
    changed = loraio.TrainConfig(
        weight_decay=0.1, warmup=3, exclude=("fc",), rank_pattern={"conv1": 2}, val_share=0.1, patience=4
    ).hyperparameters()
    assert changed == plain | {
        "optimizer": "adamw", "weight_decay": 0.1, "warmup": 3, "exclude": ["fc"], "rank_pattern": {"conv1": 2},
        "val_share": 0.1, "patience": 4,
    }  # fmt: skip

"""Settings of a training run: the defaults, and everything that is refused."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

import loraio
from loraio.errors import ConfigError, UnknownNameError
from loraio.training.config import MAX_SEED

BOTH = (loraio.TrainConfig, loraio.PretrainConfig)


def test_the_defaults_are_those_of_the_command_line() -> None:
    from loraio.cli import main

    for command, config in (("train", loraio.TrainConfig(digit=3)), ("pretrain", loraio.PretrainConfig())):
        words = ["-o", "x", *(["base", "--digit", "3"] if command == "train" else [])]
        options = main.commands[command].make_context(command, words).params
        shared = (options.keys() - {"heads"}) & config.__dataclass_fields__.keys()  # pairs there, a mapping here
        assert {"lr", "batch_size", "seed"} <= shared
        assert {name: options[name] for name in shared} == {name: getattr(config, name) for name in shared}


@pytest.mark.parametrize("config", BOTH)
@pytest.mark.parametrize(
    "setting",
    [
        {"batch_size": 0},
        {"batch_size": 1.5},
        {"batch_size": True},
        {"lr": 0},
        {"lr": -1e-3},
        {"lr": float("nan")},
        {"lr": float("inf")},
        {"lr": "fast"},
        {"lr": None},
        {"seed": -1},
        {"seed": 1.0},
        {"seed": MAX_SEED + 1},
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(config: type, setting: dict[str, Any]) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(ConfigError, match=rf"^{name} is {value!r}"):
        config(**setting)


@pytest.mark.parametrize(
    "setting",
    [
        {"digit": -1},
        {"digit": 3.0},
        {"digit": "3"},
        {"rank": 0},
        {"rank": 2.0},
        {"alpha": 0},
        {"alpha": -1},
        {"alpha": float("nan")},
        {"alpha": float("inf")},
        {"alpha": 10**400},
        {"alpha": True},
        {"alpha": "4"},
        {"focus": 0},
        {"focus": 1.01},
        {"focus": float("nan")},
        {"focus": "half"},
        {"steps": 0},
        {"steps": 1.5},
        {"targets": "conv"},
        {"targets": ()},
        {"exclude": "conv1"},
        {"warmup": -1},
        {"warmup": 1.5},
        {"weight_decay": -0.1},
        {"weight_decay": True},
        {"weight_decay": float("inf")},
        {"lora_plus": 0},
        {"clip_norm": 0},
        {"accumulate": 0},
        {"val_share": -0.1},
        {"val_share": 1},
        {"val_every": 0},
        {"patience": 0},
        {"compile": 1},
        {"clamp_rank": "yes"},
        {"device": "gpu"},
        {"device": "cuda:x"},
        {"device": 0},
    ],
)
def test_a_setting_of_an_adapter_out_of_range_is_refused_by_name(setting: dict[str, Any]) -> None:
    (name,) = setting
    with pytest.raises(ConfigError, match=f"^{name} is "):
        loraio.TrainConfig(**setting)


@pytest.mark.parametrize("epochs", [0, -1, 1.5, True, None])
def test_epochs_are_a_whole_number_of_at_least_one(epochs: Any) -> None:
    with pytest.raises(ConfigError, match=r"^epochs is "):
        loraio.PretrainConfig(epochs=epochs)


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


def test_the_edges_of_the_ranges_are_allowed() -> None:
    config = loraio.TrainConfig(digit=0, rank=1, alpha=0.5, focus=1, steps=1, batch_size=1, seed=MAX_SEED)
    assert replace(config, seed=0, focus=1e-9).seed == 0


def test_targets_become_a_tuple() -> None:
    assert loraio.TrainConfig(targets=["conv1", "fc"]).targets == ("conv1", "fc")  # type: ignore[arg-type]


@pytest.mark.parametrize("config", BOTH)
def test_a_config_does_not_change(config: type) -> None:
    with pytest.raises(FrozenInstanceError):
        config().seed = 2
    assert config() == config()
    assert config(seed=2) != config()


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

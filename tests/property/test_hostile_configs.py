"""Any configuration and keys of another tool's file give an adapter or one of our errors, nothing else."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from strategies import json_values
from torch import nn

import loraio
from loraio.errors import LoraioError

HOSTILE = settings(max_examples=200, deadline=None)

CONFIG: dict[str, Any] = {
    "alpha_pattern": {},
    "bias": "none",
    "exclude_modules": None,
    "init_lora_weights": True,
    "lora_alpha": 4,
    "lora_bias": False,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 2,
    "rank_pattern": {},
    "target_modules": ["0"],
    "use_dora": False,
    "use_rslora": False,
}

PARTS = ("base_model", "model", "0", "1", "base_layer", "lora_A", "lora_B", "lora_magnitude_vector", "weight", "bias")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Conv2d(1, 2, 1))


def read(folder: Path, base: nn.Module, config: Any, names: tuple[str, ...] = ()) -> bool:
    """Return True if it is read; any error but ours goes through."""
    tensors = {
        "base_model.model.0.lora_A.weight": torch.ones(2, 3),
        "base_model.model.0.lora_B.weight": torch.ones(4, 2),
    }
    save_file(tensors | {name: torch.ones(2, 3) for name in names}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    try:
        loraio.load(folder, base=base)
    except LoraioError:
        return False
    return True


def test_the_configuration_that_is_changed_is_valid(folder: Path, base: nn.Module) -> None:
    assert read(folder, base, CONFIG)


@HOSTILE
@given(st.sampled_from(sorted(CONFIG)), json_values)
def test_any_value_of_a_setting_is_read_or_refused(folder: Path, base: nn.Module, key: str, value: Any) -> None:
    read(folder, base, CONFIG | {key: value})


@HOSTILE
@given(st.lists(st.sampled_from(PARTS), min_size=1, max_size=6).map(".".join))
def test_any_further_key_is_read_or_refused(folder: Path, base: nn.Module, name: str) -> None:
    read(folder, base, CONFIG, (name,))


STATE_PARTS = (
    "0",
    "1",
    "conv",
    "lora_A",
    "lora_B",
    "lora_a",
    "lora_b",
    "lora_up_a",
    "magnitude",
    "weight",
    "bias",
    "original",
    "parametrizations",
    "lora_dropout_mask",
)

SHAPES = ((), (2,), (2, 3), (4, 2), (1, 1), (2, 1), (1, 2), (0, 2), (2, 1, 1, 1), (2, 2, 3))

tensors_of_any_name = st.dictionaries(
    st.lists(st.sampled_from(STATE_PARTS), min_size=1, max_size=6).map(".".join), st.sampled_from(SHAPES), max_size=4
)


@HOSTILE
@given(
    st.sampled_from(["{}.lora_{}", "{}.parametrizations.weight.0.lora_{}", "{}.lora_{}.weight"]),
    st.sampled_from("01"),
    st.tuples(st.sampled_from(SHAPES), st.sampled_from(SHAPES)),
    tensors_of_any_name,
)
def test_any_state_dict_is_read_or_refused(
    folder: Path, base: nn.Module, form: str, layer: str, pair: tuple[tuple[int, ...], ...], more: dict[str, Any]
) -> None:
    slots = "ab" if form.endswith("weight") else "AB"
    shapes = {form.format(layer, slot): shape for slot, shape in zip(slots, pair, strict=True)}
    torch.save({name: torch.ones(shape) for name, shape in (more | shapes).items()}, folder / "state.pt")
    with contextlib.suppress(LoraioError):
        loraio.load(folder / "state.pt", base=base, alpha=3, enable_lora=(True, False))

"""Merge: a state dict and an adapter give a new state dict."""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from checkpoints import State
from torch import nn

import loraio
from loraio.errors import AdapterError, BaseMismatchError, ConfigError


def test_the_formula_is_weight_plus_strength_times_scale_times_product(state: State, three: loraio.Adapter) -> None:
    merged = loraio.merge(state, three, strength=0.3)
    for name, target in three.targets.items():
        factors = three.factors_of(name)
        delta = factors["lora_B"].double() @ factors["lora_A"].double()
        exact = state[name].double() + 0.3 * (6 / 4) * delta.reshape(target.shape)
        assert merged[name].equal(exact.float())


def test_a_merged_state_loads_into_the_model(base: nn.Module, three: loraio.Adapter) -> None:
    state = base.state_dict()
    merged = loraio.merge(state, three)
    assert isinstance(merged, OrderedDict)
    assert merged._metadata == state._metadata  # type: ignore[attr-defined]
    assert not hasattr(loraio.merge(dict(state.items()), three), "_metadata")
    base.load_state_dict(merged)
    assert base.state_dict()["conv1.weight"].equal(merged["conv1.weight"])


def test_parameters_with_gradients_can_be_merged(base: nn.Module, three: loraio.Adapter) -> None:
    merged = loraio.merge(dict(base.named_parameters()), three)
    assert not merged["conv1.weight"].requires_grad


def test_a_fast_merge_is_wrong_only_by_what_float32_sums_are_unsure_of(state: State, three: loraio.Adapter) -> None:
    fast = loraio.merge(state, three, exact=False)
    assert not loraio.verify_weights(state, three, fast).ok
    assert loraio.verify_weights(state, three, fast, exact=False).ok
    assert loraio.verify(state, three, fast, exact=False).ok
    assert not loraio.verify(state, three, fast).ok
    broken = {name: tensor.clone() for name, tensor in fast.items()}
    broken["conv2.weight"][0, 0, 0, 0] *= 1 + 2**-18
    assert not loraio.verify_weights(state, three, broken, exact=False).ok


def test_bad_strengths_and_overflow_are_refused(state: State, three: loraio.Adapter) -> None:
    with pytest.raises(ConfigError, match="strength is nan"):
        loraio.merge(state, three, float("nan"))
    with pytest.raises(AdapterError, match="overflows"):
        loraio.merge(state, three, 1e42)


def test_every_target_that_differs_is_listed(state: State, three: loraio.Adapter) -> None:
    state["conv1.weight"] = state["conv1.weight"].half()
    state["conv2.weight"] = state["conv2.weight"][:, :, :1]
    state["conv9.weight"] = state.pop("conv3.weight")
    with pytest.raises(BaseMismatchError, match="3 of 3") as caught:
        loraio.merge(state, three)
    one, two, missing = caught.value.problems
    assert re.fullmatch(r"'conv1\.weight': same weights cast to float16 \(relative distance 0\.000\d+\)", one)
    assert "(64, 32, 1, 3)" in two
    assert "did you mean 'conv9.weight'" in missing
    assert three.base.sha256[:12] in str(caught.value)


def test_an_adapter_of_another_dtype_merges(state: State, three: loraio.Adapter) -> None:
    half = replace(three, factors={name: factor.bfloat16() for name, factor in three.factors.items()})
    merged = loraio.merge(state, half)
    assert merged["conv1.weight"].dtype == torch.float32
    assert loraio.verify_weights(state, half, merged).ok

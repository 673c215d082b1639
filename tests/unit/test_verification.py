"""Verification says yes to what merge makes, and no to every way of getting it wrong."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loraio
from loraio.errors import BaseMismatchError, ConfigError, UnknownNameError

State = dict[str, Tensor]


def fold_by_hand(state: State, adapter: loraio.Adapter, change: Callable[[Tensor, Tensor, float], Tensor]) -> State:
    """A merge in which ``change(lora_A, lora_B, scale)`` gives each delta."""
    merged = dict(state)
    for name, target in adapter.targets.items():
        factors = adapter.factors_of(name)
        delta = change(factors["lora_A"].double(), factors["lora_B"].double(), target.scale)
        merged[name] = (state[name].double() + delta.reshape(target.shape)).float()
    return merged


def right(state: State, adapter: loraio.Adapter) -> State:
    return fold_by_hand(state, adapter, lambda A, B, scale: scale * (B @ A))


def not_folded(state: State, adapter: loraio.Adapter) -> State:
    return dict(state)


def folded_twice(state: State, adapter: loraio.Adapter) -> State:
    return fold_by_hand(state, adapter, lambda A, B, scale: 2 * scale * (B @ A))


def strength_dropped(state: State, adapter: loraio.Adapter) -> State:
    """Right at strength 1; the test asks for another."""
    return right(state, adapter)


def alpha_ignored(state: State, adapter: loraio.Adapter) -> State:
    return fold_by_hand(state, adapter, lambda A, B, scale: B @ A)


def factors_transposed(state: State, adapter: loraio.Adapter) -> State:
    """The (fan_in, r) x (r, out) layout, reshaped into the weight: right numbers in wrong places."""
    return fold_by_hand(state, adapter, lambda A, B, scale: scale * (A.T @ B.T))


def one_layer_skipped(state: State, adapter: loraio.Adapter) -> State:
    return {**right(state, adapter), "conv2.weight": state["conv2.weight"]}


def untouched_changed(state: State, adapter: loraio.Adapter) -> State:
    bias = state["fc.bias"].clone()
    bias[0] = torch.nextafter(bias[0], torch.tensor(9.0))
    return {**right(state, adapter), "fc.bias": bias}


def test_a_right_merge_is_verified(
    trained_base: nn.Module, three: loraio.Adapter, seven: loraio.Adapter, digits_test: loraio.Dataset
) -> None:
    state = trained_base.state_dict()
    for adapter in (three, seven):
        for merged in (loraio.merge(state, adapter), right(state, adapter)):
            report = loraio.verify(state, adapter, merged, inputs=digits_test.images)
            assert report.ok, report
            assert report.weights.folded == 3
            assert report.weights.untouched == 5
            assert report.weights.values == sum(state[name].numel() for name in adapter.targets)
            assert 0.4 < report.weights.max_ulp <= 0.5
            assert report.weights.not_correctly_rounded == 0
            assert report.outputs is not None
            assert report.outputs.max_abs == report.outputs.max_rel == report.outputs.relative_to_effect == 0
            assert report.outputs.argmax_agreement == 1
            assert report.outputs.effect > 1
            assert report.outputs.samples == 899


@pytest.mark.parametrize(
    ("mutant", "strength", "caught_by_outputs"),
    [
        (not_folded, 1.0, True),
        (folded_twice, 1.0, True),
        (strength_dropped, 0.5, True),
        (alpha_ignored, 1.0, True),
        (factors_transposed, 1.0, True),
        (one_layer_skipped, 1.0, True),
        (untouched_changed, 1.0, False),  # one ulp in one bias is for the weights' check alone
    ],
)
def test_a_mutant_is_caught(
    trained_base: nn.Module,
    three: loraio.Adapter,
    mutant: Callable[[State, loraio.Adapter], State],
    strength: float,
    caught_by_outputs: bool,
) -> None:
    state = trained_base.state_dict()
    report = loraio.verify(state, three, mutant(state, three), strength)
    assert not report.ok
    assert not report.weights.ok
    assert report.weights.problems
    assert report.outputs is not None
    assert report.outputs.ok != caught_by_outputs
    if caught_by_outputs:
        assert report.weights.not_correctly_rounded > 0
        assert report.weights.max_ulp > 100
        relative = report.outputs.relative_to_effect
        assert relative is not None
        assert relative > 0.01


def test_one_weight_off_by_one_ulp_is_caught_and_named(trained_base: nn.Module, three: loraio.Adapter) -> None:
    state = trained_base.state_dict()
    merged = loraio.merge(state, three)
    merged["conv3.weight"].view(-1)[5] = torch.nextafter(merged["conv3.weight"].view(-1)[5], torch.tensor(9.0))
    report = loraio.verify_weights(state, three, merged)
    assert report.not_correctly_rounded == 1
    assert 0.5 < report.max_ulp <= 1.5
    assert "'conv3.weight': 1 of 73728 weights" in report.problems[0]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda merged: merged.pop("fc.bias"), "'fc.bias' is missing"),
        (lambda merged: merged.update(extra=torch.zeros(1)), "'extra' is not in the base"),
        (lambda merged: merged.update({"fc.bias": torch.zeros(11)}), r"'fc.bias' is torch.float32 \(11,\)"),
        (lambda merged: merged.update({"conv1.weight": merged["conv1.weight"].double()}), "float64"),
        (lambda merged: merged["conv1.weight"].view(-1)[0].fill_(float("nan")), "1 of 288 weights"),
        (lambda merged: merged["conv1.weight"].view(-1)[0].fill_(float("inf")), "1 of 288 weights"),
        (lambda merged: merged.update({"fc.bias": merged["fc.bias"] * float("nan")}), "'fc.bias' is no target"),
    ],
)
def test_names_shapes_dtypes_and_nan_are_looked_at(
    trained_base: nn.Module, three: loraio.Adapter, change: Callable[[State], Any], problem: str
) -> None:
    state = trained_base.state_dict()
    merged = loraio.merge(state, three)
    change(merged)
    report = loraio.verify_weights(state, three, merged)
    assert not report.ok
    assert any(re.search(problem, line) for line in report.problems), report.problems


def test_a_zero_whose_sign_flipped_in_an_untouched_tensor_is_caught(three: loraio.Adapter, base: nn.Module) -> None:
    with torch.no_grad():
        base.fc.bias[0] = 0.0  # type: ignore[union-attr, index]
    state = base.state_dict()
    adapter = replace(three, base=replace(three.base, sha256=loraio.identity.state_sha256(state)))
    merged = loraio.merge(state, adapter)
    merged["fc.bias"] = merged["fc.bias"].clone()
    merged["fc.bias"][0] = -0.0
    assert loraio.verify_weights(state, adapter, merged).problems == ("'fc.bias' is no target and was changed",)


def test_outputs_that_are_nan_are_not_verified(trained_base: nn.Module, three: loraio.Adapter) -> None:
    state = trained_base.state_dict()
    inputs = torch.full((2, 1, 28, 28), float("nan"))
    report = loraio.verify(state, three, loraio.merge(state, three), inputs=inputs)
    assert report.weights.ok
    assert not report.ok


def test_merged_weights_that_do_not_fit_the_network_are_a_report_not_an_error(
    trained_base: nn.Module, three: loraio.Adapter
) -> None:
    state = trained_base.state_dict()
    for change, problem in [
        (lambda merged: merged.pop("fc.bias"), "'fc.bias' is missing"),
        (lambda merged: merged.update({"fc.bias": merged["fc.bias"].half()}), "'fc.bias' is torch.float16"),
        (lambda merged: merged.update({"fc.bias": merged["fc.bias"].long()}), "'fc.bias' is torch.int64"),
    ]:
        merged = loraio.merge(state, three)
        change(merged)  # type: ignore[no-untyped-call]
        report = loraio.verify(state, three, merged)
        assert not report.ok
        assert report.outputs is None
        assert report.weights.problems[0].startswith(problem)


def test_a_base_that_holds_infinities_is_merged_and_verified(three: loraio.Adapter, base: nn.Module) -> None:
    with torch.no_grad():
        base.conv1.weight[0, 0, 0] = torch.tensor([float("inf"), float("nan"), 1.0])  # type: ignore[union-attr, index, operator]
    state = base.state_dict()
    fresh = loraio.new_adapter(base, loraio.TrainConfig(rank=4, alpha=6))
    adapter = replace(fresh, factors=three.factors)
    merged = loraio.merge(state, adapter)
    assert loraio.verify_weights(state, adapter, merged).ok
    merged["conv1.weight"][0, 0, 0, 1] = 0.0
    assert loraio.verify_weights(state, adapter, merged).not_correctly_rounded == 1


def test_the_outputs_check_says_no_to_an_unfolded_network_in_bfloat16_too(trained_base: nn.Module) -> None:
    model = copy.deepcopy(trained_base).bfloat16()
    adapter = loraio.new_adapter(model, loraio.TrainConfig(rank=3, alpha=2))
    adapter = replace(adapter, factors={name: factor + 0.01 for name, factor in adapter.factors.items()})
    state = model.state_dict()
    report = loraio.verify(state, adapter, state)
    assert report.outputs is not None
    assert not report.outputs.ok


def test_verify_leaves_the_given_model_and_states_alone(trained_base: nn.Module, three: loraio.Adapter) -> None:
    model = copy.deepcopy(trained_base)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.rand(4, 1, 28, 28)
    report = loraio.verify(model.state_dict(), three, loraio.merge(state, three), model=model, inputs=images)
    assert report.ok
    assert all(model.state_dict()[name].equal(state[name]) for name in state)


def test_random_inputs_follow_the_seed(trained_base: nn.Module, three: loraio.Adapter) -> None:
    state = trained_base.state_dict()
    reports = [loraio.verify(state, three, state, samples=8, seed=seed, model="digit-cnn") for seed in (1, 1, 2)]
    effects = [report.outputs.effect for report in reports if report.outputs is not None]
    assert effects[0] == effects[1] != effects[2]


def test_an_adapter_without_effect_is_verified_too(trained_base: nn.Module) -> None:
    model = copy.deepcopy(trained_base)
    adapter = loraio.new_adapter(model, loraio.TrainConfig())
    state = model.state_dict()
    report = loraio.verify(state, adapter, loraio.merge(state, adapter))
    assert report.ok
    assert report.outputs is not None
    assert report.outputs.effect == 0
    assert report.outputs.relative_to_effect is None


def test_what_cannot_be_checked_is_an_error(trained_base: nn.Module, three: loraio.Adapter) -> None:
    state = trained_base.state_dict()
    merged = loraio.merge(state, three)
    nameless = replace(three, base=replace(three.base, network=None))
    with pytest.raises(UnknownNameError, match="does not say which network"):
        loraio.verify(state, nameless, merged)
    assert loraio.verify(state, nameless, merged, model="digit-cnn").ok
    with pytest.raises(ConfigError, match="pass inputs="):
        loraio.verify(state, three, merged, model=nn.Sequential(nn.Flatten()))
    with pytest.raises(ConfigError, match="0 samples"):
        loraio.verify(state, three, merged, samples=0)
    with pytest.raises(ConfigError, match="no inputs"):
        loraio.verify(state, three, merged, inputs=torch.rand(0, 1, 28, 28))
    with pytest.raises(ConfigError, match="does not take inputs"):
        loraio.verify(state, three, merged, inputs=torch.rand(2, 3, 28, 28))
    with pytest.raises(ConfigError, match="strength"):
        loraio.verify(state, three, merged, float("nan"))
    with pytest.raises(BaseMismatchError):
        loraio.verify(merged, three, merged)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_are_verified_too(trained_base: nn.Module, dtype: torch.dtype) -> None:
    model = copy.deepcopy(trained_base).to(dtype)
    adapter = loraio.new_adapter(model, loraio.TrainConfig(rank=3, alpha=2))
    adapter = replace(adapter, factors={name: factor + 0.01 for name, factor in adapter.factors.items()})
    state = model.state_dict()
    report = loraio.verify(state, adapter, loraio.merge(state, adapter))
    assert report.ok, report
    assert not loraio.verify(state, adapter, state).ok

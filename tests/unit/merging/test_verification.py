"""Verification says yes to what merge makes, and no to every way of getting it wrong."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from checkpoints import State
from torch import Tensor, nn

import loraio
from loraio.adapter import folding
from loraio.bases import networks
from loraio.errors import BaseMismatchError, ConfigError, StateError, UnknownNameError


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


def one_layer_skipped(state: State, adapter: loraio.Adapter) -> State:
    return {**right(state, adapter), "conv2.weight": state["conv2.weight"]}


def one_ulp(values: Tensor) -> Tensor:
    """Move values up by one step, in place."""
    return values.copy_(torch.nextafter(values, torch.full_like(values, 9.0)))


def untouched_changed(state: State, adapter: loraio.Adapter) -> State:
    bias = state["fc.bias"].clone()
    one_ulp(bias[:1])
    return {**right(state, adapter), "fc.bias": bias}


MUTANTS: dict[str, Callable[[State, loraio.Adapter], State]] = {
    "not folded": lambda state, adapter: dict(state),
    "folded twice": lambda state, adapter: fold_by_hand(state, adapter, lambda A, B, scale: 2 * scale * (B @ A)),
    "strength dropped": right,  # the test asks for another strength
    "alpha ignored": lambda state, adapter: fold_by_hand(state, adapter, lambda A, B, scale: B @ A),
    # the (fan_in, r) x (r, out) layout, reshaped into the weight: right numbers in wrong places
    "factors transposed": lambda state, adapter: fold_by_hand(state, adapter, lambda A, B, scale: scale * (A.T @ B.T)),
    "one layer skipped": one_layer_skipped,
    "untouched changed": untouched_changed,
}
"""Wrong merges, made from the base and the adapter."""


def test_a_right_merge_is_verified(
    state: State, three: loraio.Adapter, seven: loraio.Adapter, digits_test: loraio.Dataset
) -> None:
    for adapter in (three, seven):
        for merged in (loraio.merge(state, adapter), right(state, adapter)):
            report = loraio.verify(state, adapter, merged, inputs=digits_test.images)
            weights, outputs = report.weights, report.outputs
            assert report.ok, report
            assert (weights.folded, weights.untouched, weights.not_correctly_rounded) == (3, 5, 0)
            assert weights.values == sum(state[name].numel() for name in adapter.targets)
            assert 0.4 < weights.max_ulp <= 0.5
            assert outputs is not None
            assert outputs.max_abs == outputs.max_rel == outputs.relative_to_effect == 0
            assert (outputs.argmax_agreement, outputs.samples) == (1, 899)
            assert outputs.effect > 1


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(state: State, three: loraio.Adapter, name: str) -> None:
    strength = 0.5 if name == "strength dropped" else 1.0
    report = loraio.verify(state, three, MUTANTS[name](state, three), strength)
    assert not report.ok
    assert report.weights.problems
    assert report.outputs is not None
    caught_by_outputs = name != "untouched changed"  # one ulp in one bias is for the weights' check alone
    assert report.outputs.ok != caught_by_outputs
    if caught_by_outputs:
        assert report.weights.not_correctly_rounded > 0
        assert report.weights.max_ulp > 100
        assert (report.outputs.relative_to_effect or 0) > 0.01


def test_all_that_is_wrong_is_told(state: State, three: loraio.Adapter) -> None:
    merged = {**one_layer_skipped(state, three), "fc.bias": state["fc.bias"] + 1, "extra": torch.zeros(1)}
    merged["conv3.weight"] = state["conv3.weight"]
    del merged["conv1.bias"]
    problems = loraio.verify_weights(state, three, merged).problems
    names = [problem.split("'")[1] for problem in problems]
    assert names == ["conv1.bias", "extra", "conv2.weight", "conv3.weight", "fc.bias"]


def test_a_weight_that_is_folded_in_slices_is_checked_in_all_of_them(
    state: State, three: loraio.Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = loraio.merge(state, three)
    weight = merged["conv3.weight"]
    for row, steps in ((0, 3), (-1, 1)):
        for _ in range(steps):
            one_ulp(weight[row])
    whole = loraio.verify_weights(state, three, merged)
    monkeypatch.setattr(folding, "BLOCK", 1000)
    assert len(three.targets["conv3.weight"].slices()) > 2
    assert loraio.verify_weights(state, three, merged) == whole
    assert whole.not_correctly_rounded == 2 * weight[0].numel()
    assert 2.5 < whole.max_ulp < 7  # the ulp is smaller where a power of two was passed


def test_the_figures_of_the_outputs_are_those_of_the_two_networks(
    base: nn.Module, three: loraio.Adapter, digits_test: loraio.Dataset
) -> None:
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    images = digits_test.images[:100]
    merged = one_layer_skipped(state, three)
    runs = [{"strength": 3.0}, {"strength": 3.0, "exact": False}, {"strength": 1e-5}]
    reports = [loraio.verify(state, three, merged, inputs=images, **options) for options in runs]  # type: ignore[arg-type]
    found, fast, faint = (report.outputs for report in reports if report.outputs is not None)
    with torch.no_grad():
        plain = base(images)
        with loraio.attach(base, three, 3.0):
            attached = base(images)
        base.load_state_dict(merged)
        after = base(images)
    difference = (after - attached).abs()
    effect = float((attached - plain).abs().max())
    roundings = torch.finfo(torch.float32).eps * float(attached.abs().max())
    near = {"rel": 1e-3}  # other batches, other roundings
    assert found.samples == 100
    assert found.max_abs == pytest.approx(float(difference.max()), **near)
    largest = torch.maximum(after.abs(), attached.abs())
    assert found.max_rel == pytest.approx(float((difference / largest).max()), **near)
    assert found.effect == pytest.approx(effect, **near)
    assert found.relative_to_effect == pytest.approx(float(difference.max()) / effect, **near)
    assert found.argmax_agreement == float((after.argmax(1) == attached.argmax(1)).double().mean()) < 1
    assert found.bound == pytest.approx(16 * roundings, **near)
    assert fast.bound == pytest.approx(256 * roundings, **near)
    assert faint.bound == 0.05 * faint.effect < 16 * roundings


def test_outputs_are_right_up_to_their_bound_unless_it_is_infinite(trained_base: nn.Module) -> None:
    idle = loraio.new_adapter(copy.deepcopy(trained_base), loraio.TrainConfig())
    report = loraio.verify(trained_base.state_dict(), idle, trained_base.state_dict())
    assert report.ok
    assert report.outputs is not None
    assert (report.outputs.effect, report.outputs.relative_to_effect) == (0, None)
    for figures, ok in [
        ({"max_abs": report.outputs.bound}, True),
        ({"max_abs": 1.01 * report.outputs.bound}, False),
        ({"max_abs": float("nan")}, False),
        ({"bound": float("nan")}, False),
        ({"bound": float("inf")}, False),
    ]:
        outputs = replace(report.outputs, **figures)
        assert outputs.ok == ok, figures
        assert replace(report, outputs=outputs).ok == ok
    assert not replace(report, outputs=None).ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_that_overflows_is_a_weight_that_is_wrong(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False)).to(dtype)
    with torch.no_grad():
        model[0].weight.fill_(3e38)
    fresh, state = loraio.new_adapter(model, loraio.TrainConfig(rank=1, targets=("all",))), model.state_dict()
    adapter = replace(fresh, factors={name: torch.full_like(old, 3e19) for name, old in fresh.factors.items()})
    assert loraio.verify_weights(state, adapter, state).not_correctly_rounded == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_another_strength_in_a_later_slice_is_caught_in_half_precision_too(
    trained_base: nn.Module, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a slice before it has a weight as far off as any may be, a slice that seems near gets no second look."""
    monkeypatch.setattr(folding, "BLOCK", 1000)
    model = copy.deepcopy(trained_base).to(dtype)
    adapter = loraio.new_adapter(model, loraio.TrainConfig(rank=3, alpha=2))
    adapter = replace(adapter, factors={name: factor + 0.05 for name, factor in adapter.factors.items()})
    state = model.state_dict()
    merged, other = loraio.merge(state, adapter, 0.5), loraio.merge(state, adapter)
    assert loraio.verify_weights(state, adapter, merged, 0.5).ok
    for name, weight in merged.items():
        if name in adapter.targets:
            weight[len(weight) // 2 :] = other[name][len(weight) // 2 :]
            assert len(loraio.verify_weights(state, adapter, merged, 0.5).problems) == 1
            weight[:] = loraio.merge(state, adapter, 0.5)[name]


def test_outputs_that_are_zero_on_both_sides_differ_by_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    model.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()})
    adapter, state = loraio.new_adapter(model, loraio.TrainConfig(rank=1, targets=("all",))), model.state_dict()
    outputs = loraio.verify(state, adapter, state, model=model, inputs=torch.ones(2, 1, 4, 4)).outputs
    assert outputs is not None
    assert outputs.max_rel == 0


def test_a_network_with_options_and_another_head_is_built_from_what_the_adapter_says(digits: loraio.Dataset) -> None:
    model = loraio.build_network("timm:resnet18", args={"num_classes": 4, "in_chans": 1}, seed=0)
    networks.resize_heads(model, {"fc": 6})
    adapter = loraio.new_adapter(model, loraio.TrainConfig(rank=1, targets=("layer1.0.conv1",)))
    assert dict(adapter.base.heads) == {"fc": 6}
    state = model.state_dict()
    report = loraio.verify(state, adapter, loraio.merge(state, adapter), samples=1)
    assert report.ok
    with pytest.raises(BaseMismatchError, match=r"\(64, 3, 7, 7\)"):  # the options are not for this name
        loraio.verify(state, adapter, state, model="timm:resnet18.a1_in1k", samples=1)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda merged: merged.pop("fc.bias"), "'fc.bias' is missing"),
        (lambda merged: merged.update(extra=torch.zeros(1)), "'extra' is not in the base"),
        (lambda merged: merged.update({"fc.bias": torch.zeros(11)}), r"'fc.bias' is torch.float32 \(11,\)"),
        (lambda merged: merged.update({"fc.bias": merged["fc.bias"].half()}), "'fc.bias' is torch.float16"),
        (lambda merged: merged.update({"fc.bias": merged["fc.bias"].long()}), "'fc.bias' is torch.int64"),
        (lambda merged: merged.update({"conv1.weight": merged["conv1.weight"].double()}), "float64"),
        (lambda merged: one_ulp(merged["conv3.weight"].view(-1)[5:6]), "'conv3.weight': 1 of 73728 weights"),
        (lambda merged: merged["conv1.weight"].view(-1)[0].fill_(float("nan")), "1 of 288 weights"),
        (lambda merged: merged["conv1.weight"].view(-1)[0].fill_(float("inf")), "1 of 288 weights.* by inf ulp"),
        (lambda merged: merged.update({"fc.bias": merged["fc.bias"] * float("nan")}), "'fc.bias' is no target"),
    ],
)
def test_names_shapes_dtypes_and_nan_are_looked_at(
    state: State, three: loraio.Adapter, change: Callable[[State], Any], problem: str
) -> None:
    merged = loraio.merge(state, three)
    change(merged)
    report = loraio.verify(state, three, merged)
    assert not report.ok
    assert any(re.search(problem, line) for line in report.weights.problems), report.weights.problems
    assert (report.outputs is None) == bool(re.search("missing|in the base|is torch|float64", problem))  # does not fit


def test_outputs_that_are_nan_are_not_verified(state: State, three: loraio.Adapter) -> None:
    inputs = torch.full((2, 1, 28, 28), float("nan"))
    report = loraio.verify(state, three, loraio.merge(state, three), inputs=inputs)
    assert report.weights.ok
    assert not report.ok


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


def test_a_zero_whose_sign_flipped_in_an_untouched_tensor_is_caught() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    adapter, state = loraio.new_adapter(model, loraio.TrainConfig(rank=1, targets=("all",))), model.state_dict()
    problems = loraio.verify_weights(state, adapter, {**state, "1.bias": -state["1.bias"]}).problems
    assert problems == ("'1.bias' is no target and was changed",)


def test_verify_leaves_the_given_model_and_states_alone(trained_base: nn.Module, three: loraio.Adapter) -> None:
    model = copy.deepcopy(trained_base)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.rand(4, 1, 28, 28)
    report = loraio.verify(model.state_dict(), three, loraio.merge(state, three), model=model, inputs=images)
    assert report.ok
    assert all(model.state_dict()[name].equal(state[name]) for name in state)
    model.train()
    assert loraio.verify(state, three, loraio.merge(state, three), model=model, inputs=images).ok
    assert all(module.training for module in model.modules())
    with loraio.attach(model, three), pytest.raises(StateError, match="carries an adapter already"):
        loraio.verify(state, three, loraio.merge(state, three), model=model, inputs=images)


def test_random_inputs_follow_the_seed(state: State, three: loraio.Adapter) -> None:
    reports = [loraio.verify(state, three, state, samples=8, seed=seed, model="digit-cnn") for seed in (1, 1, 2)]
    effects = [report.outputs.effect for report in reports if report.outputs is not None]
    assert effects[0] == effects[1] != effects[2]
    before = torch.get_rng_state()
    usual = loraio.verify(state, three, state).outputs
    assert torch.get_rng_state().equal(before)
    assert usual == loraio.verify(state, three, state, samples=256, seed=1).outputs
    assert usual is not None
    assert usual.samples == 256
    assert loraio.verify(state, three, loraio.merge(state, three), samples=1).ok


def test_what_cannot_be_checked_is_an_error(state: State, three: loraio.Adapter) -> None:
    merged = loraio.merge(state, three)
    nameless = replace(three, base=replace(three.base, network=None))
    with pytest.raises(UnknownNameError, match="does not say which network") as caught:
        loraio.verify(state, nameless, merged)
    assert "--model NAME" in str(caught.value)
    assert "digit-cnn" in str(caught.value)
    assert loraio.verify(state, nameless, merged, model="digit-cnn").ok
    with pytest.raises(ConfigError, match=r"a network with a name\n.*pass inputs="):
        loraio.verify(state, three, merged, model=nn.Sequential(nn.Flatten()))
    for options, message in [
        ({"samples": 0}, "0 samples"),
        ({"inputs": torch.rand(0, 1, 28, 28)}, "no inputs"),
        ({"inputs": torch.rand(2, 3, 28, 28)}, r"does not take inputs of shape \(2, 3, 28, 28\)"),
        ({"strength": float("nan")}, "strength"),
    ]:
        with pytest.raises(ConfigError, match=message):
            loraio.verify(state, three, merged, **options)  # type: ignore[arg-type]
    for verify in (loraio.verify, loraio.verify_weights):
        with pytest.raises(BaseMismatchError):
            verify(merged, three, merged)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_are_verified_too(trained_base: nn.Module, dtype: torch.dtype) -> None:
    model = copy.deepcopy(trained_base).to(dtype)
    adapter = loraio.new_adapter(model, loraio.TrainConfig(rank=3, alpha=2))
    adapter = replace(adapter, factors={name: factor + 0.01 for name, factor in adapter.factors.items()})
    state = model.state_dict()
    report = loraio.verify(state, adapter, loraio.merge(state, adapter))
    assert report.ok, report
    unfolded = loraio.verify(state, adapter, state)
    assert not unfolded.weights.ok
    assert unfolded.outputs is not None
    assert not unfolded.outputs.ok

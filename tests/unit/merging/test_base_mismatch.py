"""On the base that it was made for, or not at all: how a difference is named, allowed and recorded."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import State
from torch import Tensor, nn

import loraio
from loraio.bases.sketches import distance, sketch
from loraio.errors import BaseMismatchError


def changed(state: State, name: str, change: Callable[[Tensor], Tensor]) -> State:
    return {**state, name: change(state[name].clone())}


def one_ulp(weight: Tensor) -> Tensor:
    weight.view(-1)[7] = torch.nextafter(weight.view(-1)[7], torch.tensor(9.0))
    return weight


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (one_ulp, r"other values, though hardly \(relative distance below 1e-05\)"),
        (lambda weight: weight.bfloat16(), r"same weights cast to bfloat16 \(relative distance 0\.00[12]\d*\)"),
        (lambda weight: weight.half(), r"same weights cast to float16 \(relative distance 0\.000\d+\)"),
        (lambda weight: weight.double(), r"same weights cast to float64 \(relative distance below 1e-05\)"),
        (
            lambda weight: weight.bfloat16().float(),
            r"same weights rounded to bfloat16 \(relative distance 0\.00[12]\d*\)",
        ),
        (lambda weight: weight * 1.1, r"changed weights \(relative distance 0\.\d+\)"),
        (lambda weight: weight.flip(0), r"other weights \(relative distance [0-9.]+\)"),
        (lambda weight: weight.flip(0).bfloat16(), r"other weights, cast to bfloat16 \(relative distance [0-9.]+\)"),
    ],
)
def test_a_difference_is_named_by_what_it_is(
    state: State, three: loraio.Adapter, change: Callable[[Tensor], Tensor], told: str
) -> None:
    with pytest.raises(BaseMismatchError, match="1 of 3 targets differ") as caught:
        loraio.merge(changed(state, "conv2.weight", change), three)
    (line,) = caught.value.problems
    assert re.fullmatch(rf"'conv2\.weight': {told}", line), line


def test_the_distance_is_told_to_about_a_third() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        a = torch.randn(40, 30, generator=generator)
        b = a + 0.1 * torch.randn(40, 30, generator=generator)
        true = float((b - a).norm() / a.norm())
        assert 0.4 * true < distance(sketch(a), sketch(b)) < 2 * true
        assert distance(sketch(a), sketch(a.clone())) == 0


def test_a_sketch_is_the_same_on_every_machine() -> None:
    assert sketch(torch.arange(12.0).reshape(3, 4)) == (22.4944, -16.0, 10.0, -18.0, 2.0, 12.0, 0.0, 8.0, -4.0)


def test_an_adapter_without_sketches_still_says_which_weight_differs(state: State, three: loraio.Adapter) -> None:
    bare = replace(three, targets={name: replace(target, sketch=()) for name, target in three.targets.items()})
    for change, told in [(one_ulp, "other values"), (lambda w: w.half(), "a tensor of dtype F16, not F32")]:
        with pytest.raises(BaseMismatchError) as caught:
            loraio.merge(changed(state, "conv2.weight", change), bare)
        assert caught.value.problems == (f"'conv2.weight': {told}",)


def test_running_statistics_alone_are_named(digits: loraio.Dataset) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(676, 10)).eval()
    adapter = loraio.train(model, loraio.TrainConfig(digit=3, rank=2, steps=3), digits)
    moved = copy.deepcopy(model)
    moved.train()(digits.images[:8])
    with pytest.raises(BaseMismatchError, match="only the running statistics of its normalisation layers differ"):
        loraio.attach(moved.eval(), adapter)
    with loraio.attach(moved, adapter, allow_base_mismatch=True):
        pass
    with torch.no_grad():
        moved[3].bias += 1
    with pytest.raises(BaseMismatchError, match="other tensors of the network differ"):
        loraio.attach(moved, adapter)


def test_a_mismatch_that_is_allowed_is_merged_verified_and_recorded(
    trained_base: nn.Module, three: loraio.Adapter, files: Path, tmp_path: Path
) -> None:
    model = copy.deepcopy(trained_base).bfloat16()
    loraio.save_base(model, tmp_path / "half.safetensors")
    half, adapter, output = tmp_path / "half.safetensors", files / "three.safetensors", tmp_path / "m.safetensors"
    with pytest.raises(BaseMismatchError, match="cast to bfloat16"):
        loraio.merge_file(half, adapter, output)
    result = loraio.merge_file(half, adapter, output, allow_base_mismatch=True)
    assert len(result.mismatch) == 3
    receipt = loraio.read_base(output).document["merged"][0]
    assert receipt["base_mismatch"] == list(result.mismatch)
    state = model.state_dict()
    merged = loraio.merge(state, three, allow_base_mismatch=True)
    assert loraio.verify(state, three, merged, allow_base_mismatch=True).ok
    with loraio.attach(model, three, allow_base_mismatch=True), torch.no_grad():
        assert model.conv1.weight.equal(merged["conv1.weight"])  # type: ignore[union-attr, operator]


def test_names_and_shapes_must_fit_even_where_a_mismatch_is_allowed(state: State, three: loraio.Adapter) -> None:
    for broken in (
        {name: tensor for name, tensor in state.items() if name != "conv1.weight"},
        changed(state, "conv1.weight", lambda weight: weight[:, :, 1:]),
        changed(state, "conv1.weight", lambda weight: weight.int()),
    ):
        with pytest.raises(BaseMismatchError, match="1 of 3"):
            loraio.merge(broken, three, allow_base_mismatch=True)


def test_the_merge_effect_says_how_much_each_weight_changes(state: State, three: loraio.Adapter) -> None:
    merged = loraio.merge(state, three)
    found = loraio.merge_effect(state, merged, three)
    changes = sorted(float((merged[name] - state[name]).norm() / state[name].norm()) for name in three.targets)
    assert (found.smallest, found.median, found.largest) == pytest.approx(changes, rel=1e-6)
    told = r"changes 3 weights \(4,388 parameters\) by a relative 0\.\d+ / 0\.\d+ / 0\.\d+"
    assert re.fullmatch(told, str(found))
    assert not found.is_noop


def test_a_weight_of_zeros_changes_infinitely_or_not_at_all(state: State, three: loraio.Adapter) -> None:
    state = changed(state, "conv1.weight", torch.zeros_like)
    still = loraio.merge_effect(state, state, three)
    assert (still.smallest, still.largest, still.is_noop) == (0, 0, True)
    moved = loraio.merge_effect(state, changed(state, "conv1.weight", torch.ones_like), three)
    assert (moved.smallest, moved.median, moved.largest) == (0, 0, float("inf"))
    assert not moved.is_noop


def test_a_no_op_is_called_so(base: nn.Module, state: State) -> None:
    idle = loraio.new_adapter(base, loraio.TrainConfig())
    found = loraio.merge_effect(state, loraio.merge(state, idle), idle)
    assert found.is_noop
    assert str(found) == "changes none of 3 weights: a no-op"

"""Compute each adapted weight once and never use a stale one: after any change model and merged model agree."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from live_models import (
    WRITES,
    assert_threads_see_one_strength_or_the_other,
    base_weight,
    merged_outputs,
    outputs,
    same_bits,
    write,
)
from torch import Tensor, nn

import loraio
from loraio.adapter import Target
from loraio.bases import identity
from loraio.errors import BaseMismatchError


class Counter:
    """Counts the calls of a function."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        self.calls = 0
        real = getattr(owner, name)

        def counted(*args: Any, **options: Any) -> Any:
            self.calls += 1
            return real(*args, **options)

        monkeypatch.setattr(owner, name, counted)

    def since(self) -> int:
        """Return the number of calls since the last time."""
        calls, self.calls = self.calls, 0
        return calls


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> Counter:
    return Counter(monkeypatch, Target, "fold")


def assert_fresh(model: nn.Module, x: Tensor) -> None:
    assert same_bits(outputs(model, x), merged_outputs(loraio.attachment_of(model), x))


def test_a_weight_is_folded_once(base: nn.Module, three: loraio.Adapter, images: Tensor, folds: Counter) -> None:
    with loraio.attach(base, three) as live:
        for _ in range(3):
            outputs(base, images)
        with torch.inference_mode():
            base(images)
        assert folds.since() == 3
        live.disable()
        outputs(base, images)
        live.enable()
        outputs(base, images)
        assert folds.since() == 0
        with torch.no_grad():
            assert base.conv1.weight is base.conv1.weight


@torch.no_grad()  # with gradients it is computed anew
def write_to_given(model: nn.Module) -> None:
    model.conv2.weight.mul_(1.5)  # type: ignore[operator,union-attr]


CHANGES: dict[str, Callable[[nn.Module, loraio.Attachment, loraio.Adapter], Any]] = {
    "strength": lambda model, live, seven: setattr(live, "strength", -0.5),
    "swap": lambda model, live, seven: live.swap(seven),
    "disable": lambda model, live, seven: live.disable(),
    "write to what was given out": lambda model, live, seven: write_to_given(model),
    "other strides": lambda model, live, seven: model.to(memory_format=torch.channels_last),
    "a cast": lambda model, live, seven: model.double(),
    **{name: lambda model, live, seven, change=change: change(model) for name, change in WRITES.items()},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_no_change_leaves_a_stale_weight(
    base: nn.Module,
    three: loraio.Adapter,
    seven: loraio.Adapter,
    images: Tensor,
    change: Callable[[nn.Module, loraio.Attachment, loraio.Adapter], Any],
) -> None:
    with loraio.attach(base, three) as live:
        for _ in range(3):  # a cached weight is read another way than one just computed
            before = outputs(base, images)
        change(base, live, seven)
        assert_fresh(base, images)
        again = outputs(base, images)
        if change not in (CHANGES["write to what was given out"], CHANGES["other strides"]):
            assert not same_bits(again, before)
        assert same_bits(outputs(base, images), again)


def test_a_swap_inside_of_autocast_is_seen(
    base: nn.Module, three: loraio.Adapter, seven: loraio.Adapter, images: Tensor
) -> None:
    live = loraio.attach(base, three)
    outputs(base, images)
    outputs(base, images)  # from here on it is cached
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = base(images)
        live.swap(seven)
        after = base(images)
        live.swap(three)
        again = base(images)
    assert same_bits(again, before)
    assert not same_bits(after, before)


def test_random_changes_in_a_row_never_leave_a_stale_weight(
    base: nn.Module, three: loraio.Adapter, seven: loraio.Adapter, images: Tensor
) -> None:
    dice = random.Random(1)
    names = [name for name in CHANGES if "cast" not in name and name != "swap"]
    live = loraio.attach(base, three, allow_base_mismatch=True)
    for _ in range(60):
        name = dice.choice(names)
        CHANGES[name](base, live, seven)
        live.enable()
        live.strength = dice.choice([0.5, 1.0, live.strength])
        assert_fresh(base, images)
        with torch.no_grad():  # keep the numbers small
            for parameter in base.parameters():
                parameter.div_(parameter.abs().max() + 1)
        assert_fresh(base, images)


def test_writes_that_torch_does_not_count_need_a_refresh(
    base: nn.Module, three: loraio.Adapter, images: Tensor
) -> None:
    with loraio.attach(base, three) as live:
        before = outputs(base, images)
        base_weight(base).data.mul_(1.5)
        assert same_bits(outputs(base, images), before)  # as the documentation says
        live.refresh()
        assert_fresh(base, images)


def test_gradients_are_never_taken_through_a_cached_weight(
    base: nn.Module, three: loraio.Adapter, images: Tensor
) -> None:
    with loraio.attach(base, three):
        with torch.inference_mode():
            base(images)
        outputs(base, images)
        base(images).sum().backward()
        assert all(parameter.grad is not None for parameter in base.parameters())
        base.requires_grad_(False)
        x = images.clone().requires_grad_()
        with torch.inference_mode():
            base(images)
        base(x).sum().backward()  # a weight made under inference_mode could not be used here
        assert x.grad is not None


def test_a_copy_computes_its_own(base: nn.Module, three: loraio.Adapter, images: Tensor, folds: Counter) -> None:
    with loraio.attach(base, three):
        expected = outputs(base, images)
        twin = copy.deepcopy(base)
        folds.since()
        assert same_bits(outputs(twin, images), expected)
        assert folds.since() == 3
        write(base_weight(twin))
        assert_fresh(twin, images)
        assert same_bits(outputs(base, images), expected)


def test_inside_torchs_own_cache_a_weight_stays_as_it_was_read(
    base: nn.Module, three: loraio.Adapter, images: Tensor
) -> None:
    with loraio.attach(base, three) as live, torch.nn.utils.parametrize.cached():
        first = outputs(base, images)
        live.strength = 0.5
        assert same_bits(outputs(base, images), first)


def test_threads_see_one_strength_or_the_other(base: nn.Module, three: loraio.Adapter, images: Tensor) -> None:
    targets = {"conv2.weight": three.targets["conv2.weight"]}
    factors = {name: factor for name, factor in three.factors.items() if name.startswith("conv2")}
    one = loraio.Adapter(targets=targets, factors=factors, base=three.base)
    assert_threads_see_one_strength_or_the_other(base, loraio.attach(base, one), images)


def test_swapping_back_computes_nothing_unless_something_changed(
    base: nn.Module, three: loraio.Adapter, seven: loraio.Adapter, images: Tensor, folds: Counter
) -> None:
    seven = copy.deepcopy(seven)  # it is written to
    live = loraio.attach(base, three)
    first = outputs(base, images)
    live.swap(seven)
    outputs(base, images)
    assert folds.since() == 6
    live.swap(three)
    assert same_bits(outputs(base, images), first)
    assert folds.since() == 0
    write(next(base.conv2.parametrizations.buffers()))  # to a factor on the model: it is gone after a swap
    live.swap(seven)
    live.swap(three)
    assert same_bits(outputs(base, images), first)
    live.swap(seven)
    live.strength = 0.5
    live.swap(three)
    assert_fresh(base, images)
    live.disable()
    live.swap(seven)
    assert_fresh(base, images)
    live.enable()
    assert_fresh(base, images)
    write(seven.factors["conv2.weight.lora_B"])
    live.swap(three)
    live.swap(seven)
    assert_fresh(base, images)
    write(base_weight(base))
    with pytest.raises(BaseMismatchError):
        live.swap(three)
    live.detach()


def test_adapters_that_were_on_a_model_are_held_within_a_bound(
    base: nn.Module, three: loraio.Adapter, seven: loraio.Adapter, images: Tensor, folds: Counter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    size = sum(4 * base.get_parameter(name).numel() for name in three.targets)
    monkeypatch.setattr(loraio.live.swap_cache, "CACHED_BYTES", 2 * size)  # with their factors two are more
    with loraio.attach(base, three) as live:
        for adapter in (three, seven, three, seven):
            live.swap(adapter)
            outputs(base, images)
        assert folds.since() == 12
        other = copy.deepcopy(base)
        assert same_bits(outputs(other, images), outputs(base, images))
        loraio.attachment_of(other).swap(three)
        assert_fresh(other, images)


def test_swapping_reads_the_base_once_and_notices_what_was_written_to_it(
    base: nn.Module, three: loraio.Adapter, seven: loraio.Adapter, monkeypatch: pytest.MonkeyPatch, images: Tensor
) -> None:
    hashed = Counter(monkeypatch, identity, "tensor_sha256")
    live = loraio.attach(base, three)
    assert hashed.since() == 8
    for adapter in (seven, three, seven):
        live.swap(adapter)
        assert hashed.since() == 0
    write(base.get_parameter("fc.bias"))
    expected = outputs(base, images)
    with pytest.raises(BaseMismatchError, match="other tensors of the network differ"):
        live.swap(three)
    assert hashed.since() == 1
    assert live.adapter is seven
    assert same_bits(outputs(base, images), expected)
    live.detach()
    with pytest.raises(BaseMismatchError):
        loraio.attach(base, three)
    assert hashed.since() == 0


def test_a_write_to_a_later_weight_from_within_a_pass_is_seen_in_that_pass(
    base: nn.Module, three: loraio.Adapter, images: Tensor
) -> None:
    names = list(three.targets)
    first, last = (base.get_submodule(name.rpartition(".")[0]) for name in (names[0], names[-1]))
    assert first is not last
    with loraio.attach(base, three):
        outputs(base, images)
        before = outputs(base, images)  # reads cached weights
        stack: Any = last.parametrizations

        def write(*_: Any) -> None:
            stack.weight.original.mul_(1.5)

        hook = first.register_forward_hook(write)
        within = outputs(base, images)
        hook.remove()
        after = outputs(base, images)
    assert not within.equal(before)
    assert within.equal(after)


def test_a_write_to_factors_from_within_a_pass_is_seen_by_the_next_one(
    base: nn.Module, three: loraio.Adapter, images: Tensor
) -> None:
    name = list(three.targets)[-1]
    last: Any = base.get_submodule(name.rpartition(".")[0])
    with loraio.attach(base, three) as live:
        outputs(base, images)
        before = outputs(base, images)

        def write(*_: Any) -> None:
            last.parametrizations.weight[0].lora_B.mul_(2)

        hook = last.register_forward_pre_hook(write)
        outputs(base, images)
        hook.remove()
        after = outputs(base, images)
        merged = loraio.merge(loraio.base_state_dict(base), live.adapter)
    assert not after.equal(before)
    base.load_state_dict(merged)
    assert outputs(base, images).equal(after)


def test_a_weight_that_was_read_and_written_to_is_computed_anew(
    base: nn.Module, three: loraio.Adapter, images: Tensor
) -> None:
    layer: Any = base.get_submodule(next(iter(three.targets)).rpartition(".")[0])
    with loraio.attach(base, three), torch.no_grad():
        expected = outputs(base, images)
        outputs(base, images)
        layer.weight.zero_()
        assert outputs(base, images).equal(expected)


def test_a_replica_does_not_read_its_models_cached_weights(
    base: nn.Module, three: loraio.Adapter, images: Tensor
) -> None:
    layer: Any = base.get_submodule(next(iter(three.targets)).rpartition(".")[0])
    with loraio.attach(base, three), torch.no_grad():
        outputs(base, images)
        outputs(base, images)
        cached = layer.weight
        replica = layer._replicate_for_data_parallel()
        stacks = layer.parametrizations._replicate_for_data_parallel()
        stack = layer.parametrizations.weight._replicate_for_data_parallel()
        stack.original = layer.parametrizations.weight.original.detach() + 1
        stacks._modules["weight"] = stack
        replica._modules["parametrizations"] = stacks
        assert not replica.weight.equal(cached)
        assert layer.weight.equal(cached)

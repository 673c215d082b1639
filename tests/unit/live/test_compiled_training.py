"""Train adapters of other ranks and targets in a compiled step without compiling it again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from live_models import (
    INDUCTOR,
    adapter_for,
    adapters_of_every_form,
    assert_fresh,
    compiled_once,
    outputs,
    places,
    same_bits,
)
from torch import Tensor, nn

import loraio
from loraio.errors import ConfigError, StateError
from loraio.live.parametrization import FoldedWeight

pytestmark = pytest.mark.usefixtures("compiler")


@pytest.fixture
def trained(base: nn.Module) -> list[loraio.Adapter]:
    """Make start values that differ in rank, alpha, scale rule and targets."""
    base.requires_grad_(False)
    adapters = adapters_of_every_form(base)[:4]
    return [replace(each, factors={name: 0.25 * f for name, f in each.factors.items()}) for each in adapters]


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
}


def train(
    model: Any, live: loraio.Attachment, data: loraio.Dataset, optimizer: Callable[[Any], torch.optim.Optimizer]
) -> loraio.Adapter:
    steps = optimizer(list(live.parameters()))
    for _ in range(3):
        steps.zero_grad()
        nn.functional.cross_entropy(model(data.images[:32]), data.labels[:32]).backward()
        steps.step()
    return live.adapter


def padding(live: loraio.Attachment) -> list[Tensor]:
    """Return the padding of all factors."""
    found: list[Tensor] = []
    for place in places(live).values():
        assert isinstance(place.part, FoldedWeight)
        rank = place.part.target.rank if place.part.target else 0
        found += [place.part.lora_A[rank:], place.part.lora_B[:, rank:]]  # type: ignore[index]
    return found


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
def test_a_compiled_step_trains_adapters_of_other_ranks_and_targets(
    base: nn.Module, trained: list[loraio.Adapter], digits: loraio.Dataset, backend: str, optimizer: str
) -> None:
    twin = copy.deepcopy(base)
    compiled, counter = compiled_once(base, backend)
    live = loraio.attach(base, trained[-1], trainable=True, reserve="all", max_rank=8)
    train(compiled, live, digits, OPTIMIZERS[optimizer])
    outputs(compiled, digits.images[:32])
    count = counter.frame_count
    for adapter in trained:
        with torch._dynamo.config.patch(error_on_recompile=True):
            live.swap(adapter)
            found = train(compiled, live, digits, OPTIMIZERS[optimizer])
            assert_fresh(compiled, live, digits.images[:32])
        with loraio.attach(twin, adapter, trainable=True) as other:
            expected = train(twin, other, digits, OPTIMIZERS[optimizer])
        assert found.targets == adapter.targets
        for name, factor in expected.factors.items():
            assert found.factors[name].shape == factor.shape
            assert not found.factors[name].equal(adapter.factors[name])
            torch.testing.assert_close(found.factors[name], factor, rtol=1e-2, atol=1e-3)
        assert not any(bool(zeros.any()) for zeros in padding(live))
    assert counter.frame_count == count
    live.detach()
    torch.testing.assert_close(outputs(base, digits.images[:4]), outputs(twin, digits.images[:4]), rtol=0, atol=0)


def test_gradients_of_the_padding_are_zero_because_both_factors_are_padded_with_zeros(
    base: nn.Module, trained: list[loraio.Adapter], digits: loraio.Dataset
) -> None:
    live = loraio.attach(base, trained[0], trainable=True, max_rank=8)
    part: Any = places(live)["conv1.weight"].part
    compiled, _ = compiled_once(base, "aot_eager")

    def gradients() -> tuple[Tensor, Tensor]:
        base.zero_grad()
        nn.functional.cross_entropy(compiled(digits.images[:32]), digits.labels[:32]).backward()
        return part.lora_A.grad, part.lora_B.grad

    down, up = gradients()
    assert down[:1].any()
    assert up[:, :1].any()
    assert not down[1:].any()
    assert not up[:, 1:].any()
    with torch.no_grad():
        part.lora_A[1:] = 1
    assert gradients()[1][:, 1:].any(), "zeros in one of them alone would move"


@pytest.mark.parametrize("kind", loraio.adapter.kinds.KINDS)
def test_an_eager_step_takes_padded_factors_too(
    base: nn.Module, trained: list[loraio.Adapter], digits: loraio.Dataset, kind: str
) -> None:
    twin = copy.deepcopy(base)
    adapter = adapter_for(twin, "conv2", "fc", kind=kind, rank=2, alpha=1)
    live = loraio.attach(base, trained[3], trainable=True, reserve="all", max_rank=4)  # whose layers step on their own
    live.swap(adapter)
    assert live.adapter is adapter
    other = loraio.attach(twin, adapter, trainable=True)
    assert same_bits(outputs(base, digits.images[:4]), outputs(twin, digits.images[:4]))
    found, expected = (train(m, on, digits, OPTIMIZERS["SGD"]) for m, on in ((base, live), (twin, other)))
    for name, factor in expected.factors.items():
        torch.testing.assert_close(found.factors[name], factor, rtol=1e-3, atol=1e-5)
    assert found.factors["fc.weight.lora_A"].shape == (2, 2048)
    assert len(list(live.parameters())) == len(adapter.factors)
    assert not any(bool(zeros.any()) for zeros in padding(live))


def test_a_rank_above_the_largest_is_refused_before_anything_changes(
    base: nn.Module, trained: list[loraio.Adapter]
) -> None:
    with pytest.raises(StateError, match="rank 4, the attached model has a place for 3"):
        loraio.attach(base, trained[1], trainable=True, max_rank=3)
    live = loraio.attach(base, trained[0], trainable=True, reserve="all", max_rank=4)
    parameters = list(live.parameters())
    with pytest.raises(StateError, match=r"rank 8, .*\n.*max_rank=8"):
        live.swap(trained[2])
    assert all(a is b for a, b in zip(live.parameters(), parameters, strict=True))
    assert live.adapter is trained[0]


@pytest.mark.parametrize("max_rank", [0, -1, 2.0, True, "4"])
def test_a_largest_rank_is_a_whole_number(base: nn.Module, one_conv: loraio.Adapter, max_rank: Any) -> None:
    with pytest.raises(ConfigError, match="max_rank is"):
        loraio.attach(base, one_conv, trainable=True, max_rank=max_rank)


def test_a_largest_rank_is_for_training(base: nn.Module, one_conv: loraio.Adapter) -> None:
    with pytest.raises(ConfigError, match="for adapters that are trained"):
        loraio.attach(base, one_conv, max_rank=4)
    live = loraio.attach(base, one_conv, trainable=True, reserve="all")
    with pytest.raises(StateError, match="being trained cannot be swapped"):
        live.swap(one_conv)

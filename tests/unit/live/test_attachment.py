"""Attach adapters to a live model, compare with the merged model, and leave no trace."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from live_models import Everything, outputs, same_bits
from torch import nn
from torch.nn.utils import parametrize

import loraio
from loraio.errors import BaseMismatchError, StateError


@pytest.fixture
def before(base: nn.Module) -> Iterator[Everything]:
    """Record the base, and compare it again after the test."""
    base.conv2.weight.requires_grad_(False)  # type: ignore[union-attr]
    snapshot = Everything(base)
    yield snapshot
    snapshot.assert_same()


@pytest.mark.parametrize("strength", [1.0, 0.5, -2.0, 0.0, 3])
def test_attached_computes_what_merged_computes_to_the_bit(
    base: nn.Module, three: loraio.Adapter, digits_test: loraio.Dataset, before: Everything, strength: float
) -> None:
    images, other = digits_test.images[:64], copy.deepcopy(base)
    other.load_state_dict(loraio.merge(base.state_dict(), three, strength))
    expected = outputs(other, images)
    with loraio.attach(base, three, strength):
        assert same_bits(outputs(base, images), expected)
    assert (strength == 0) == same_bits(outputs(base, images), expected)


def test_detach_gives_the_model_back_after_an_exception(
    base: nn.Module, three: loraio.Adapter, before: Everything
) -> None:
    with pytest.raises(KeyError), loraio.attach(base, three):
        raise KeyError
    before.assert_same()


def test_a_model_goes_without_the_garbage_collector_once_detached(base: nn.Module, three: loraio.Adapter) -> None:
    model = copy.deepcopy(base)
    with loraio.attach(model, three) as live:
        outputs(model, torch.ones(1, 1, 28, 28))
    gone = weakref.ref(model)
    del model, live
    assert gone() is None


def test_a_detached_handle_refuses_everything_but_reading(
    base: nn.Module, three: loraio.Adapter, before: Everything
) -> None:
    live = loraio.attach(base, three)
    live.detach()
    assert live.adapter is three
    assert "detached" in repr(live)
    with pytest.raises(StateError, match="detached"):
        live.enable()


def test_another_base_is_refused_and_every_target_named(base: nn.Module, three: loraio.Adapter) -> None:
    with torch.no_grad():
        weight: torch.Tensor = base.conv1.weight  # type: ignore[union-attr, assignment]
        weight[0, 0, 0, 0] = torch.nextafter(weight[0, 0, 0, 0], torch.tensor(9.0))  # one ulp
        base.conv3.weight.mul_(2)  # type: ignore[union-attr, operator]
    snapshot = Everything(base)
    with pytest.raises(BaseMismatchError, match="2 of 3 targets differ") as caught:
        loraio.attach(base, three)
    assert ["conv1.weight" in line or "conv3.weight" in line for line in caught.value.problems] == [True, True]
    snapshot.assert_same()


class Odd(nn.Module):
    """A module of a type that adapters do not know."""

    def __init__(self, conv: Any) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias


MISFITS: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "no target": (lambda base: base.__delattr__("conv1"), BaseMismatchError, "no such tensor"),
    "other groups": (
        lambda base: setattr(base.conv2, "groups", 2),
        BaseMismatchError,
        r"'conv2.weight': the layer is a Conv2d with groups=2",
    ),
    "unknown layer": (
        lambda base: setattr(base, "conv1", Odd(base.conv1)),
        BaseMismatchError,
        r"'conv1.weight': its module is not of a layer type",
    ),
    "parametrized": (
        lambda base: parametrize.register_parametrization(base.conv1, "weight", nn.Identity()),
        StateError,
        "another parametrization",
    ),
}


@pytest.mark.parametrize(("spoil", "error", "told"), MISFITS.values(), ids=MISFITS)
def test_a_layer_that_does_not_fit_is_refused(
    base: nn.Module, three: loraio.Adapter, spoil: Callable[[Any], Any], error: type[Exception], told: str
) -> None:
    spoil(base)
    with pytest.raises(error, match=told):
        loraio.attach(base, three)


def test_a_shared_weight_is_refused(base: nn.Module, three: loraio.Adapter) -> None:
    base.twin = nn.Conv2d(1, 32, 3)
    base.twin.weight = base.conv1.weight  # type: ignore[union-attr, assignment]
    state = base.state_dict()
    adapter = replace(three, base=replace(three.base, sha256=loraio.bases.identity.state_sha256(state)))
    with pytest.raises(StateError, match=r"shared: conv1\.weight, twin\.weight"):
        loraio.attach(base, adapter)


def test_a_parametrization_put_on_top_must_come_off_first(
    base: nn.Module, three: loraio.Adapter, before: Everything
) -> None:
    live = loraio.attach(base, three)
    parametrize.register_parametrization(base.conv1, "weight", nn.Identity())  # type: ignore[arg-type]
    for call in (live.detach, lambda: live.swap(three)):
        with pytest.raises(StateError, match="on top"):
            call()
    del base.conv1.parametrizations.weight[1]  # type: ignore[union-attr, operator, arg-type]
    live.detach()


def test_gradients_reach_exactly_the_factors_when_trainable(
    base: nn.Module, three: loraio.Adapter, digits: loraio.Dataset
) -> None:
    base.requires_grad_(False)
    with loraio.attach(base, three, trainable=True) as live:
        factors = list(live.parameters())
        assert len(factors) == 6
        nn.functional.cross_entropy(base(digits.images[:32]), digits.labels[:32]).backward()
        assert all(factor.grad is not None and bool(factor.grad.abs().sum() > 0) for factor in factors)
        with torch.no_grad():
            factors[0].add_(1)
        assert live.adapter != three
        assert three.factors["conv1.weight.lora_A"] is not factors[0]
        with pytest.raises(StateError, match="being trained"):
            live.swap(three)
    assert live.adapter.factors["conv1.weight.lora_A"].equal(three.factors["conv1.weight.lora_A"] + 1)
    assert all(parameter.grad is None for parameter in base.parameters())


def test_a_graph_made_before_attach_can_go_backward_after_detach(
    base: nn.Module, three: loraio.Adapter, digits: loraio.Dataset
) -> None:
    loss = base(digits.images[:4]).sum()
    loraio.attach(base, three).detach()
    loss.backward()


def test_autocast_does_not_round_the_base_weight(base: nn.Module) -> None:
    adapter = loraio.new_adapter(base, loraio.TrainConfig())  # B is zero
    with loraio.attach(base, adapter, trainable=True) as live, torch.autocast("cpu", torch.bfloat16):
        assert next(live.parameters()).requires_grad
        weight: torch.Tensor = base.conv2.weight  # type: ignore[union-attr, assignment]
        assert weight.grad_fn is not None
        assert weight.equal(loraio.base_state_dict(base)["conv2.weight"])


def test_detach_survives_what_others_do_to_the_modules_parameters(base: nn.Module, three: loraio.Adapter) -> None:
    weights = {name: dict(base.named_parameters())[name] for name in three.targets}
    live = loraio.attach(base, three)
    nn.utils.parametrizations.weight_norm(base.conv2, "bias", dim=0)
    base.conv1.extra = nn.Parameter(torch.zeros(1))  # type: ignore[union-attr]
    parametrize.remove_parametrizations(base.conv3, "weight", leave_parametrized=False)  # type: ignore[arg-type]
    for call in (live.disable, lambda: live.swap(three), lambda: setattr(live, "strength", 2.0)):
        with pytest.raises(StateError, match="has lost its parametrization"):
            call()
    live.detach()
    now = dict(base.named_parameters())
    assert all(now[name] is weight for name, weight in weights.items())
    assert list(base.conv1._parameters) == ["weight", "bias", "extra"]  # type: ignore[union-attr]


def test_the_adapter_does_not_change_through_the_model(base: nn.Module, three: loraio.Adapter) -> None:
    kept = copy.deepcopy(three)
    with loraio.attach(base, three):
        for buffer in base.buffers():
            buffer.zero_()
    assert three == kept
    with pytest.raises(TypeError):
        three.training["digit"] = 7  # type: ignore[index]


def test_weights_without_values_of_their_own_are_refused(base: nn.Module, three: loraio.Adapter) -> None:
    with torch.inference_mode():
        inference = nn.Conv2d(1, 4, 3)
    normed = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 4, 3))
    for conv, message in [
        (normed, "another parametrization"),
        (nn.LazyConv2d(4, 3), "no values yet"),
        (nn.Conv2d(1, 4, 3, device="meta"), "no values yet"),
        (inference, "inference_mode"),
    ]:
        with pytest.raises(StateError, match=message):
            loraio.new_adapter(nn.Sequential(conv), loraio.TrainConfig(rank=1))
    with pytest.raises(StateError, match="meta device"):
        loraio.merge({name: tensor.to("meta") for name, tensor in base.state_dict().items()}, three)

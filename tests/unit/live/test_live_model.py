"""Copy, cast, save and train a model with an adapter like any other model."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from live_models import adapter_for, outputs, same_bits
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

import loraio
from loraio.errors import BaseMismatchError, StateError

CHECKPOINTED = {"rtol": 1e-4, "atol": 1e-6}
"""The forward pass of a reentrant checkpoint has no gradients and rounds the weight once; the one that is repeated for
the gradients computes it in float32."""

HALF = {"rtol": 0.1, "atol": 0.05}
"""bfloat16 has eight bits, and a convolution network four layers."""


def loaded(base: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    other = copy.deepcopy(base)
    other.load_state_dict(state)
    return other


# copies


def test_a_deep_copy_has_a_handle_of_its_own(base: nn.Module, three: loraio.Adapter, images: Tensor) -> None:
    plain = outputs(base, images)
    live = loraio.attach(base, three)
    adapted = outputs(base, images)
    twin = copy.deepcopy(base)
    other = loraio.attachment_of(twin)
    assert loraio.attachment_of(base) is live
    assert other is not live
    assert other.model is twin
    assert other.adapter == three
    assert same_bits(outputs(twin, images), adapted)
    other.strength = 0.0
    assert same_bits(outputs(twin, images), plain)
    assert same_bits(outputs(base, images), adapted)
    with torch.no_grad():
        twin.conv1.parametrizations.weight[0].lora_B.zero_()  # type: ignore[union-attr, index, operator]
    assert same_bits(outputs(base, images), adapted)


@pytest.mark.parametrize("first", ["original", "copy"])
def test_original_and_copy_are_detached_one_without_the_other(
    base: nn.Module, three: loraio.Adapter, images: Tensor, first: str
) -> None:
    plain, keys = outputs(base, images), list(base.state_dict())
    loraio.attach(base, three)
    adapted = outputs(base, images)
    models = {"original": base, "copy": copy.deepcopy(base)}
    before = models.pop(first)
    (after,) = models.values()
    for model, other in ((before, after), (after, None)):
        loraio.attachment_of(model).detach()
        assert type(model.conv1) is nn.Conv2d
        assert list(model.state_dict()) == keys
        assert same_bits(outputs(model, images), plain)
        assert other is None or same_bits(outputs(other, images), adapted)


def test_a_copy_can_be_swapped_to_more_targets_in_the_same_module(attentive: nn.Module) -> None:
    nn.init.ones_(attentive.attention.in_proj_bias)  # type: ignore[union-attr, arg-type]
    weight_norm(attentive.attention, "in_proj_bias", dim=0)  # keeps the module parametrized all the time
    few, more = adapter_for(attentive, "*.out_proj", "head"), adapter_for(attentive)
    x = torch.randn(2, 3, 8)
    plain = outputs(attentive, x)
    loraio.attach(attentive, few)
    adapted = outputs(attentive, x)
    twin = copy.deepcopy(attentive)
    loraio.attachment_of(twin).swap(more)
    assert same_bits(outputs(attentive, x), adapted)
    assert not same_bits(outputs(twin, x), adapted)
    for model in (attentive, twin):
        loraio.attachment_of(model).detach()
        assert same_bits(outputs(model, x), plain)


def test_a_copy_of_a_part_computes_the_same(base: nn.Module, three: loraio.Adapter, images: Tensor) -> None:
    with loraio.attach(base, three):
        part = copy.deepcopy(base.conv1)
        adapted = outputs(base.conv1, images)
    assert same_bits(outputs(part, images), adapted)
    loraio.attachment_of(part).detach()
    assert same_bits(outputs(part, images), outputs(base.conv1, images))


def test_a_copy_made_for_training_has_factors_of_its_own(base: nn.Module, three: loraio.Adapter) -> None:
    base.requires_grad_(False)
    with loraio.attach(base, three, trainable=True):
        twin = copy.deepcopy(base)
    other = loraio.attachment_of(twin)
    with torch.no_grad():
        for factor in other.parameters():
            assert factor.requires_grad
            factor.add_(1)
    assert loraio.adapter_from(twin).factors["conv1.weight.lora_A"].equal(three.factors["conv1.weight.lora_A"] + 1)


def test_a_model_without_an_adapter_or_with_two_is_told(base: nn.Module, three: loraio.Adapter) -> None:
    for function in (loraio.attachment_of, loraio.adapter_from):
        with pytest.raises(StateError, match="carries no adapter"):
            function(base)
    pair = nn.ModuleList([base, copy.deepcopy(base)])
    for part in pair:
        loraio.attach(part, three)
    with pytest.raises(StateError, match="2 parts of the model carry an adapter"):
        loraio.attachment_of(pair)
    assert loraio.attachment_of(pair[1]).model is pair[1]


# saving


def test_the_state_dict_of_an_attached_model_can_be_saved_and_loaded(
    base: nn.Module, three: loraio.Adapter, images: Tensor, tmp_path: Path
) -> None:
    other = copy.deepcopy(base)
    with loraio.attach(base, three):
        adapted = outputs(base, images)
        torch.save(base.state_dict(), tmp_path / "state.pt")
    changed = replace(three, factors={name: factor + 1 for name, factor in three.factors.items()})
    with loraio.attach(other, changed) as live:
        assert not same_bits(outputs(other, images), adapted)
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert same_bits(outputs(other, images), adapted)
        assert live.adapter == three, "the handle says what is on the model"
    assert live.adapter == three


@pytest.mark.parametrize(
    "save",
    [pickle.dumps, lambda model: torch.save(model, io.BytesIO()), lambda model: copy.copy(model.conv1)],
    ids=["pickle", "torch.save", "copy.copy"],
)
def test_pickling_a_whole_model_is_refused_with_what_to_do(
    base: nn.Module, three: loraio.Adapter, save: Callable[[nn.Module], Any]
) -> None:
    with (
        loraio.attach(base, three),
        pytest.raises(StateError, match=r"cannot be pickled\n  try: live\.detach\(\) first, or save"),
    ):
        save(base)
    save(base)


def test_a_module_that_stays_parametrized_by_others_is_not_blamed_on_the_adapter(
    base: nn.Module, three: loraio.Adapter
) -> None:
    live = loraio.attach(base, three)
    weight_norm(base.conv1, "bias", dim=0)
    live.detach()
    with pytest.raises(StateError, match="parametrized module cannot be pickled\n  try: save its state dict"):
        pickle.dumps(base)


# casts and layouts


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_a_cast_changes_the_base_and_not_the_adapter(
    base: nn.Module, three: loraio.Adapter, images: Tensor, dtype: torch.dtype, trainable: bool
) -> None:
    cast = copy.deepcopy(base).to(dtype)
    merged = loaded(cast, loraio.merge(cast.state_dict(), three, allow_base_mismatch=True))
    parameters = list(base.parameters())
    with loraio.attach(base, three, trainable=trainable) as live:
        base.to(dtype)
        assert same_bits(outputs(base, images.to(dtype)), outputs(merged, images.to(dtype)))
        assert live.adapter == three
        with pytest.raises(StateError if trainable else BaseMismatchError, match=r"trained|same weights cast to"):
            live.swap(three)
    assert all(a is b for a, b in zip(base.parameters(), parameters, strict=True))
    assert all(same_bits(a, b) for a, b in zip(base.parameters(), cast.parameters(), strict=True))


def test_factors_follow_the_model_to_another_device(base: nn.Module, three: loraio.Adapter) -> None:
    with loraio.attach(base, three) as live:
        base.to("meta")
        assert {tensor.device.type for tensor in base.state_dict().values()} == {"meta"}
    assert live.adapter == three


def test_channels_last_can_come_after_attach(base: nn.Module, three: loraio.Adapter, images: Tensor) -> None:
    merged = loaded(base, loraio.merge(base.state_dict(), three))
    merged.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    plain = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with loraio.attach(base, three):
        base.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for x in (images, images.to(memory_format=torch.channels_last)):
            assert same_bits(outputs(base, x), outputs(merged, x))
    assert base.conv2.weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[union-attr, operator]
    assert all(same_bits(tensor, plain[name]) for name, tensor in base.state_dict().items())


# training aids


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_under_checkpointing_are_those_without(
    base: nn.Module, three: loraio.Adapter, digits: loraio.Dataset, use_reentrant: bool
) -> None:
    base.requires_grad_(False)
    images = digits.images[:16].clone().requires_grad_()  # torch asks for it where use_reentrant is true

    def gradients(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        with loraio.attach(base, three, trainable=True) as live:
            nn.functional.cross_entropy(run(images), digits.labels[:16]).backward()
            return [factor.grad for factor in live.parameters() if factor.grad is not None]

    expected = gradients(base)
    assert len(expected) == 6
    found = gradients(lambda x: checkpoint(base, x, use_reentrant=use_reentrant))
    torch.testing.assert_close(found, expected, **CHECKPOINTED)


def test_autocast_computes_what_the_merged_model_computes(
    base: nn.Module, three: loraio.Adapter, images: Tensor
) -> None:
    merged = loaded(base, loraio.merge(base.state_dict(), three))
    with torch.autocast("cpu", torch.bfloat16), loraio.attach(base, three):
        assert base.conv1.weight.requires_grad  # type: ignore[union-attr]
        assert outputs(base, images).dtype == torch.bfloat16
        assert same_bits(outputs(base, images), outputs(merged, images))


def test_autocast_keeps_no_casts_of_folded_weights(base: nn.Module, three: loraio.Adapter) -> None:
    """Autocast caches one cast of each weight that requires gradients, for every pass, until its block ends."""
    with torch.no_grad(), loraio.attach(base, three):
        assert base.conv1.weight.requires_grad  # type: ignore[union-attr]
        with torch.autocast("cpu", torch.bfloat16):
            assert not base.conv1.weight.requires_grad  # type: ignore[union-attr]


def test_training_under_autocast_has_the_gradients_of_float32_but_for_rounding(
    base: nn.Module, three: loraio.Adapter, digits: loraio.Dataset
) -> None:
    base.requires_grad_(False)

    def gradients(*, amp: bool) -> list[Tensor]:
        with loraio.attach(base, three, trainable=True) as live:
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                loss = nn.functional.cross_entropy(base(digits.images[:64]), digits.labels[:64])
            loss.backward()
            return [factor.grad for factor in live.parameters() if factor.grad is not None]

    found, expected = gradients(amp=True), gradients(amp=False)
    assert len(found) == 6
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        assert not a.equal(b)
        torch.testing.assert_close(a / b.abs().max(), b / b.abs().max(), **HALF)

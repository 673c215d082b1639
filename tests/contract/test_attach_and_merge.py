"""Every adapter kind on every layer type: attached equals merged, to the bit, and detach leaves nothing behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import loraio
from loraio.kinds import KINDS
from loraio.layers import LAYER_TYPES

CONVOLUTIONS: list[dict[str, Any]] = [
    {},
    {"stride": 2, "padding": 1},
    {"dilation": 2, "padding": "same"},
    {"groups": 2},
    {"groups": 4, "bias": False},
    {"padding": 1, "padding_mode": "circular"},
    {"padding": 1, "padding_mode": "reflect", "dilation": 2},
    {"padding": 2, "padding_mode": "replicate", "groups": 2, "stride": 2},
]
"""Settings of a convolution that an adapter must not notice."""


def layers() -> list[Any]:
    """Each layer type, convolutions with each of the settings; as (name, settings)."""
    cases: list[Any] = []
    for name, layer in LAYER_TYPES.items():
        for settings in CONVOLUTIONS if layer.group == "conv" else [{}, {"bias": False}]:
            label = "-".join([name, *(f"{key}={value}" for key, value in settings.items())])
            cases.append(pytest.param(name, settings, id=label))
    return cases


def build(name: str, settings: dict[str, Any]) -> tuple[nn.Module, torch.Tensor]:
    """A small network around one such layer, and an input for it."""
    torch.manual_seed(0)
    dims = LAYER_TYPES[name].dims - 2
    if dims > 0:
        layer = getattr(nn, name)(4, 8, kernel_size=3, **settings)
        return nn.Sequential(layer, nn.ReLU()).eval(), torch.randn(2, 4, *[9] * dims)
    return nn.Sequential(getattr(nn, name)(6, 8, **settings), nn.ReLU()).eval(), torch.randn(2, 6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "settings"), layers())
def test_attached_equals_merged_and_detach_restores(kind: str, name: str, settings: dict[str, Any]) -> None:
    model, x = build(name, settings)
    keys = list(model.state_dict())
    kept = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    adapter = loraio.new_adapter(model, loraio.TrainConfig(kind=kind, rank=2, alpha=3, targets=("all",)))
    generator = torch.Generator().manual_seed(1)
    factors = {key: torch.randn(t.shape, generator=generator) for key, t in adapter.factors.items()}
    adapter = replace(adapter, factors=factors)
    assert adapter.targets["0.weight"].groups == settings.get("groups", 1)
    merged = loraio.merge(model.state_dict(), adapter)
    assert loraio.verify_weights(model.state_dict(), adapter, merged).ok
    with torch.no_grad():
        plain = model(x)
        with loraio.attach(model, adapter):
            attached = model(x)
        assert model(x).equal(plain)
        model.load_state_dict(merged)
        assert model(x).equal(attached)
        assert not attached.equal(plain)
        model.load_state_dict(kept)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "settings"), layers())
def test_gradients_are_those_of_the_weight_by_hand(kind: str, name: str, settings: dict[str, Any]) -> None:
    if kind != "lora":
        pytest.fail("write the plain reference of this kind here")
    model, x = build(name, settings)
    model.double()
    x = x.double()
    adapter = loraio.new_adapter(model, loraio.TrainConfig(kind=kind, rank=2, alpha=3, targets=("all",)))
    factors = {key: tensor.double() + 0.1 for key, tensor in adapter.factors.items()}
    adapter = replace(adapter, factors=factors)
    with loraio.attach(model, adapter, trainable=True) as live:
        model(x).square().sum().backward()
        found = [parameter.grad for parameter in live.parameters()]
    A, B = (factors[f"0.weight.{short}"].clone().requires_grad_() for short in ("lora_A", "lora_B"))
    weight = model[0].weight.detach()
    delta = 1.5 * (B @ A).reshape(weight.shape)
    output = torch.func.functional_call(model, {"0.weight": weight + delta}, (x,))
    expected = torch.autograd.grad(output.square().sum(), [A, B])
    for gradient, other in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-9)

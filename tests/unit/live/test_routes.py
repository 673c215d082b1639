"""Find the route of a layer's training step once for each form of its inputs and settings."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import live_models
import torch
from live_models import is_cheap, one_layer
from torch import Tensor

import loraio
from loraio.live import routes
from loraio.live.routes import Route

adapter_for = functools.partial(live_models.adapter_for, alpha=3, clamp_rank=True)


def test_a_route_is_found_once_and_anew_where_anything_it_goes_by_is_another(monkeypatch: Any) -> None:
    model, x = one_layer()
    layer: Any = model[0]
    found: list[Any] = []
    real = Route.of
    monkeypatch.setattr(Route, "of", lambda *given: found.append(given) or real(*given))
    adapter = adapter_for(model)
    with loraio.attach(model, adapter, trainable=True) as live:
        changes: list[Callable[[], Any]] = [
            lambda: None,
            lambda: setattr(layer, "padding", (1, 1)),
            lambda: setattr(layer, "padding_mode", "circular"),
            lambda: setattr(layer, "stride", (2, 2)),
            lambda: setattr(layer, "dilation", (2, 2)),
        ]
        for change in changes:
            change()
            for given in (x, x[:1], x[..., :5], x.to(memory_format=torch.channels_last)):
                leaves = {name: factor.clone().requires_grad_() for name, factor in adapter.factors.items()}
                expected = torch.autograd.grad(plain_layer(layer, given, adapter, leaves), list(leaves.values()))
                for _ in range(2):
                    result = model(given)
                    assert is_cheap(result)
                    gradients = torch.autograd.grad(result.square().sum(), list(live.parameters()))
                    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-4)
    assert len(found) == 4 * len(changes)


def plain_layer(layer: Any, x: Tensor, adapter: loraio.Adapter, leaves: dict[str, Tensor]) -> Tensor:
    """Return the sum of squares of the layer's outputs, with a weight folded in tensor arithmetic."""
    delta = adapter.targets["0.weight"].scale * leaves["0.weight.lora_B"] @ leaves["0.weight.lora_A"]
    weight = layer.parametrizations.weight.original
    result: Tensor = layer._conv_forward(x, weight + delta.view(weight.shape), layer.bias)
    return result.square().sum()


def test_a_layer_that_meets_ever_new_sizes_forgets_routes(monkeypatch: Any) -> None:
    model, _ = one_layer()
    monkeypatch.setattr(routes, "MAX_ROUTES", 2)
    with loraio.attach(model, adapter_for(model), trainable=True):
        part: Any = model[0].parametrizations.weight[0]  # type: ignore[union-attr, index]
        for size in (4, 5, 6, 4):
            assert model(torch.randn(1, 4, size, size)).shape[2] == size - 2
            assert 1 <= len(part.routes) <= 2

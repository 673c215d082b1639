"""A network of three layers, and adapters for it of every form: for tests that change a live model very often."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import loraio


class Small(nn.Module):
    """A convolution, normalisation with statistics, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))
        return logits


INPUT = torch.linspace(-1, 1, 50).reshape(2, 1, 5, 5)


def small_base() -> Small:
    """The base, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Small()
        model(torch.randn(8, 1, 5, 5))  # for statistics that are not those of a new layer
    model.norm.weight.requires_grad_(False)
    return model.eval()


def small_adapter(model: nn.Module, seed: int, *targets: str, **options: Any) -> loraio.Adapter:
    """An adapter with random values, large enough to change every answer."""
    fresh = loraio.new_adapter(model, loraio.TrainConfig(targets=targets, **options))
    generator = torch.Generator().manual_seed(seed)
    return replace(
        fresh,
        factors={
            name: factor * 1.25 if name.endswith("magnitude") else 0.5 * torch.randn(factor.shape, generator=generator)
            for name, factor in fresh.factors.items()
        },
        tensors={
            name: tensor + torch.rand(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor
            for name, tensor in fresh.tensors.items()
        },
    )


def small_adapters(model: nn.Module) -> dict[str, loraio.Adapter]:
    """Adapters that differ in kind, rank, targets and what they replace whole."""
    return {
        "lora": small_adapter(model, 1, "conv", "fc", rank=2, alpha=3),
        "other": small_adapter(model, 2, "conv", "fc", rank=1, alpha=1),
        "dora": small_adapter(model, 3, "fc", rank=1, kind="dora"),
        "head": small_adapter(model, 4, "conv", rank=1, heads={"fc": 5}, norm="affine"),
    }


def outputs(model: nn.Module, x: Tensor = INPUT) -> Tensor:
    """Return the model's outputs for a batch, without gradients."""
    with torch.no_grad():
        result: Tensor = model(x)
    return result


def given(state: Mapping[str, Tensor], x: Tensor = INPUT) -> Tensor:
    """Return the outputs of a plain network with this state dict."""
    model = Small().eval()
    model.fc = nn.Linear(4, len(state["fc.weight"]))
    model.load_state_dict(state)
    model.norm.weight.requires_grad_(False)
    return outputs(model, x)

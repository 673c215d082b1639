"""A network leaves torch as ONNX with the adapter in it: merged, or while it is attached."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import loraio
from loraio.adapter.kinds import KINDS

EXPORTED = {"rtol": 1e-5, "atol": 1e-5}
"""onnxruntime sums float32 in another order than torch; logits are about 10."""


@pytest.fixture
def x(digits_test: loraio.Dataset) -> Tensor:
    """Digits that no network was trained on."""
    return digits_test.images[:5]


def export(model: nn.Module, path: Path) -> dict[str, Tensor]:
    """Write the network for batches of any size; the tensors that the file holds, by name."""
    example = torch.zeros(2, 1, 28, 28)
    shapes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(model, (example,), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    stored = onnx.load(path).graph.initializer
    return {tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()) for tensor in stored}


def run(path: Path, x: Tensor) -> Tensor:
    """Run the file by an engine that shares nothing with torch."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(result)


def test_a_merged_network_is_exported_with_the_merged_weights(
    base: nn.Module, three: loraio.Adapter, x: Tensor, tmp_path: Path
) -> None:
    path, before = tmp_path / "merged.onnx", base(x).detach()
    merged = loraio.merge(base.state_dict(), three)
    base.load_state_dict(merged)
    stored = export(base, path)
    assert all(stored[name].equal(merged[name]) for name in three.targets)
    assert not any("lora" in name for name in stored)
    for images in (x, x[:1]):
        with torch.no_grad():
            expected = base(images)
        torch.testing.assert_close(run(path, images), expected, **EXPORTED)
    assert not torch.allclose(run(path, x), before, atol=1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_an_attached_network_is_exported_with_base_and_factors(
    base: nn.Module, kind: str, x: Tensor, tmp_path: Path
) -> None:
    path, original = tmp_path / "attached.onnx", copy.deepcopy(base.state_dict())
    fresh = loraio.new_adapter(base, loraio.TrainConfig(rank=2, alpha=3, kind=kind))
    generator = torch.Generator().manual_seed(1)
    factors = {
        name: factor + torch.randn(factor.shape, generator=generator).to(factor.dtype) / 10
        for name, factor in fresh.factors.items()
    }
    with loraio.attach(base, replace(fresh, factors=factors)):
        stored = export(base, path)
        with torch.no_grad():
            expected = base(x)
    torch.testing.assert_close(run(path, x), expected, **EXPORTED)
    assert any(name.endswith("lora_A") for name in stored)  # it folds at every run
    assert not torch.allclose(expected, base(x), atol=1.0)
    assert all(tensor.equal(original[name]) for name, tensor in base.state_dict().items())

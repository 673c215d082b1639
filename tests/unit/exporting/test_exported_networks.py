"""A network with an adapter attached leaves torch as ONNX, with base and factors in the file."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import loraio
from loraio.adapter.kinds import KINDS

EXPORTED = {"rtol": 1e-5, "atol": 1e-5}
"""onnxruntime sums float32 in another order than torch; logits are about 10."""


@pytest.mark.parametrize("kind", KINDS)
def test_an_attached_network_is_exported_with_base_and_factors(
    base: nn.Module, kind: str, digits_test: loraio.Dataset, tmp_path: Path
) -> None:
    path, original, x = tmp_path / "attached.onnx", copy.deepcopy(base.state_dict()), digits_test.images[:5]
    fresh = loraio.new_adapter(base, loraio.TrainConfig(rank=2, alpha=3, kind=kind))
    generator = torch.Generator().manual_seed(1)
    factors = {
        name: factor + torch.randn(factor.shape, generator=generator).to(factor.dtype) / 10
        for name, factor in fresh.factors.items()
    }
    with loraio.attach(base, replace(fresh, factors=factors)):
        shapes = ({0: torch.export.Dim("batch")},)
        torch.onnx.export(base, (torch.zeros(2, 1, 28, 28),), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
        with torch.no_grad():
            expected = base(x)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, **EXPORTED)
    assert any(tensor.name.endswith("lora_A") for tensor in onnx.load(path).graph.initializer)  # it folds at every run
    assert not torch.allclose(expected, base(x), atol=1.0)
    assert all(tensor.equal(original[name]) for name, tensor in base.state_dict().items())

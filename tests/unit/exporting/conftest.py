"""Leave ONNX out where torch cannot write it."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _torch_writes_onnx(request: pytest.FixtureRequest) -> None:
    """Skip tests of ONNX on torch 2.6, whose converter fails with every version of onnxscript that loraio takes."""
    asks = any(word in request.node.name for word in ("onnx", "opset", "attached_network"))
    if asks and torch.__version__.startswith("2.6."):
        pytest.skip("torch 2.6 does not convert a network to ONNX")

"""Share models and adapters among the tests of live models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from live_models import Attentive, adapter_for
from small import small_adapters, small_base
from torch import Tensor, nn

import loraio


@pytest.fixture
def images(digits_test: loraio.Dataset) -> Tensor:
    return digits_test.images[:4]


@pytest.fixture
def compiler() -> Iterator[None]:
    from torch._inductor import config

    torch._dynamo.reset()
    with config.patch(compile_threads=1):  # the workers of a pool would import torch first
        yield
    torch._dynamo.reset()


@pytest.fixture
def model() -> nn.Module:
    return small_base()


@pytest.fixture
def adapters(model: nn.Module) -> dict[str, loraio.Adapter]:
    return small_adapters(model)


@pytest.fixture
def one_conv(base: nn.Module) -> loraio.Adapter:
    return adapter_for(base, "conv1", rank=1)


@pytest.fixture
def attentive() -> nn.Module:
    torch.manual_seed(0)
    return Attentive().eval()

"""What many tests share: a small trained base, an adapter for it, and both as files. All on the embedded digits."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import loraio


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Two cores, and possibly two test processes on them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def digits() -> loraio.Dataset:
    """The embedded digits that train."""
    return loraio.load_dataset("digits", "train")


@pytest.fixture(scope="session")
def digits_test() -> loraio.Dataset:
    """The embedded digits that test."""
    return loraio.load_dataset("digits", "test")


@pytest.fixture(scope="session")
def trained_base(digits: loraio.Dataset) -> nn.Module:
    """A digit-cnn after three epochs; shared, not to be changed."""
    return loraio.pretrain("digit-cnn", loraio.PretrainConfig(epochs=3), digits)


@pytest.fixture
def base(trained_base: nn.Module) -> nn.Module:
    """A copy of the trained base that a test may do anything with."""
    return copy.deepcopy(trained_base)


@pytest.fixture(scope="session")
def three(trained_base: nn.Module, digits: loraio.Dataset) -> loraio.Adapter:
    """A trained adapter for the digit 3; its alpha is not its rank, so that a scale that gets lost shows."""
    config = loraio.TrainConfig(digit=3, rank=4, alpha=6, steps=40)
    return loraio.train(copy.deepcopy(trained_base), config, digits)


@pytest.fixture(scope="session")
def seven(trained_base: nn.Module, digits: loraio.Dataset) -> loraio.Adapter:
    """Another adapter, with other targets, rank and scale rule."""
    config = loraio.TrainConfig(
        digit=7, rank=2, targets=("conv2", "conv3", "fc"), scale_rule="alpha/sqrt(r)", steps=40, seed=7
    )
    return loraio.train(copy.deepcopy(trained_base), config, digits)


@pytest.fixture(scope="session")
def files(
    tmp_path_factory: pytest.TempPathFactory, trained_base: nn.Module, three: loraio.Adapter, seven: loraio.Adapter
) -> Path:
    """A folder with base.safetensors, three.safetensors, seven.safetensors and merged.safetensors; only for reading."""
    folder = tmp_path_factory.mktemp("files")
    loraio.save_base(trained_base, folder / "base.safetensors")
    loraio.save(three, folder / "three.safetensors")
    loraio.save(seven, folder / "seven.safetensors")
    loraio.merge_file(folder / "base.safetensors", folder / "three.safetensors", folder / "merged.safetensors")
    return folder

"""Share a small trained base, adapters for it, and all as files, on the embedded digits; sample and mark tests."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sampling import AGAIN, LEFT_OUT
from torch import Tensor, nn

import loraio
from loraio.files.sharded import INDEX_SUFFIX


def pytest_report_header() -> str:
    """Say how to repeat the samples."""
    return AGAIN


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Say with a failed test how to repeat its sample."""
    report = yield
    if report.failed and item.get_closest_marker("sampled"):
        report.sections.append(("sample", AGAIN))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name and count the cases that tests left out."""
    reports = (each for key in ("passed", "failed") for each in terminalreporter.getreports(key))
    cases = sorted(str(case) for each in reports for key, case in each.user_properties if key == LEFT_OUT)
    if cases:
        terminalreporter.section(f"{len(cases)} cases left out, where torch itself is wrong on this machine")
        for case in cases:
            terminalreporter.write_line(case)


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


@pytest.fixture(scope="session")
def write_parts() -> Callable[..., Path]:
    """Writes a state dict as a checkpoint in two files and returns the index."""

    def write(state: Mapping[str, Tensor], folder: Path, **places: Any) -> Path:
        """``places`` replaces entries of the index."""
        names = list(state)
        parts = {"a-1-of-2.safetensors": names[:3], "a-2-of-2.safetensors": names[3:]}
        folder.mkdir(exist_ok=True)
        for file, inside in parts.items():
            save_file({name: state[name] for name in inside}, folder / file)
        index = folder / f"a{INDEX_SUFFIX}"
        mapping = {name: file for file, inside in parts.items() for name in inside} | places
        index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": mapping}))
        return index

    return write

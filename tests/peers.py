"""Share the steps of tests against other tools: adapters with values, files in their dialects, outputs compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loraio
from loraio.adapter import Adapter
from loraio.errors import AdapterError, LoraioError
from loraio.formats import loading
from loraio.formats.foreign import Context, Dialect, Options
from loraio.formats.report import Report

ULP = 32
"""Other tools multiply, scale and add in float32, ours is rounded once: at most so many eps of the largest number."""

EPS = torch.finfo(torch.float32).eps


def base_of(make: Callable[[], nn.Module]) -> Any:
    """Return the fixture of a base with weights that are always the same."""

    def base() -> nn.Module:
        torch.manual_seed(0)
        return make().eval()

    return pytest.fixture(base)


def close(found: Tensor, expected: Tensor, *, ulp: int = ULP) -> bool:
    return bool((found - expected).abs().max() <= ulp * EPS * expected.abs().max())


def random(shape: Iterable[int], seed: int = 1) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def moved(tensors: Mapping[str, Tensor], seed: int = 3, size: float = 0.3) -> dict[str, Tensor]:
    """Return the tensors with random values added."""
    generator = torch.Generator().manual_seed(seed)
    return {name: one + size * torch.randn(one.shape, generator=generator) for name, one in tensors.items()}


def move_(parameters: Iterable[nn.Parameter], seed: int = 2, size: float = 0.2) -> None:
    """Add random values to the parameters that would be trained."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.data += size * torch.randn(parameter.shape, generator=generator)


def in_sixteenths_(model: nn.Module) -> nn.Module:
    """Round the weights to sixteenths, with which no sum of either tool is rounded; norms keep theirs."""
    for name, parameter in model.named_parameters():
        if not name.startswith("norm"):
            parameter.data = (parameter.data * 16).round() / 16
    return model


def adapter_for(base: nn.Module, *targets: str, size: float = 0.3, **settings: Any) -> Adapter:
    """Return an adapter with random values in every factor."""
    settings = {"digit": 0, "targets": targets or ("all",), "rank": 2, "alpha": 3, **settings}
    fresh = loraio.new_adapter(base, loraio.TrainConfig(**settings))
    return replace(fresh, factors=moved(fresh.factors, size=size))


def write(dialect: Dialect, adapter: Adapter, base: nn.Module | None, path: Path, **options: Any) -> Report:
    """Write an adapter in a dialect."""
    state = base.state_dict() if base is not None else None
    encoded = dialect.encode(adapter, Context(network=base, state=state, options=Options(**options)))
    loading.write(dialect, encoded, path)
    return encoded.report


def read(path: Path, base: nn.Module, **options: Any) -> tuple[Adapter, Report]:
    """Load an adapter of another tool, with its report."""
    adapter, report = loading.load_reported(path, base=base, options=Options(**options))
    assert report is not None
    return adapter, report


def refused(path: Path, base: nn.Module, says: str, *errors: type[LoraioError], **options: Any) -> str:
    """Return the text of the error with which a file is refused; it is an AdapterError, or one of those named."""
    with pytest.raises(errors or AdapterError) as caught:
        loading.load_reported(path, base=base, options=Options(**options))
    assert says in str(caught.value)
    return str(caught.value)


def assert_attached_is(base: nn.Module, adapter: Adapter, theirs: nn.Module | Tensor, x: Tensor, **ulp: int) -> None:
    """Assert that the base with the adapter gives the other tool's outputs, which differ, and detached its own."""
    before = base(x)
    expected = theirs if isinstance(theirs, Tensor) else theirs.eval()(x)
    with loraio.attach(base, adapter):
        assert close(base(x), expected, **ulp)
        assert not close(before, base(x), **ulp)
    assert base(x).equal(before)


def assert_merged_alike(base: nn.Module, first: Adapter, second: Adapter) -> None:
    """Assert that two adapters merge to the same bits."""
    one, two = (loraio.merge(base.state_dict(), adapter) for adapter in (first, second))
    assert one.keys() == two.keys()
    assert all(two[name].equal(tensor) for name, tensor in one.items())


def assert_all_loaded(net: nn.Module, path: Path) -> None:
    """Assert that a network of the other tool finds all of its pairs in a state dict, and nothing else."""
    found = net.load_state_dict(torch.load(path, weights_only=True), strict=False)
    assert not found.unexpected_keys
    assert not [name for name in found.missing_keys if "lora_" in name and "dropout" not in name]


def assert_merged_close(base: nn.Module, adapter: Adapter, theirs: Mapping[str, Tensor], **ulp: int) -> None:
    """Assert that our merged weights are the other tool's."""
    merged = loraio.merge(base.state_dict(), adapter)
    for name, tensor in theirs.items():
        assert close(merged[name].double(), tensor.double(), **ulp), name


def assert_same_files(first: Path, second: Path) -> None:
    """Assert that two files, or the files of two folders, have the same bytes."""
    if first.is_dir():
        assert {file.name for file in first.iterdir()} == {file.name for file in second.iterdir()}
        for file in first.iterdir():
            assert_same_files(file, second / file.name)
    else:
        assert first.read_bytes() == second.read_bytes()


def assert_written_twice_alike(dialect: Dialect, adapter: Adapter, base: nn.Module | None, path: Path) -> None:
    """Write an adapter, and assert that writing it again gives the same bytes."""
    for name in (path, path.with_name(f"again-{path.name}")):
        write(dialect, adapter, base, name)
    assert_same_files(path, path.with_name(f"again-{path.name}"))

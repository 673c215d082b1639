"""Every dialect, on every layer type and kind: it keeps the folded weights' bits, or says why it cannot."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import loraio
from loraio.adapter import Adapter
from loraio.adapter.kinds import KINDS
from loraio.adapter.layers import LAYER_TYPES
from loraio.errors import AdapterError, ConfigError
from loraio.formats import dialects, loading
from loraio.formats.dialects import DIALECTS
from loraio.formats.foreign import Context, Dialect, Options
from loraio.formats.report import FATES

LAYERS: dict[str, nn.Module] = {
    "Conv1d": nn.Conv1d(4, 6, 3),
    "Conv2d": nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "Conv3d": nn.Conv3d(4, 6, (2, 3, 1)),
    "ConvTranspose1d": nn.ConvTranspose1d(4, 6, 3),
    "ConvTranspose2d": nn.ConvTranspose2d(4, 6, 2),
    "ConvTranspose3d": nn.ConvTranspose3d(4, 6, 2),
    "Linear": nn.Linear(5, 6, bias=False),  # with one torchtune has no DoRA that is a change of weights
    "Bilinear": nn.Bilinear(3, 4, 5),
    "MultiheadAttention": nn.MultiheadAttention(6, 2),
    "Embedding": nn.Embedding(9, 5),
    "Conv1d, grouped": nn.Conv1d(4, 6, 3, groups=2),
    "Conv2d, grouped": nn.Conv2d(4, 6, 3, groups=2),
    "Conv3d, grouped": nn.Conv3d(4, 6, 2, groups=2),
}

OPTIONS = Options(alpha=3, lossy=True)

cases = [
    pytest.param(dialect, layer, kind, id=f"{dialect.name}-{layer}-{kind}")
    for dialect in DIALECTS.values()
    for layer in LAYERS
    for kind in KINDS
]


def network(layer: str) -> nn.Module:
    return nn.Sequential(nn.ReLU(), nn.ModuleDict({"inner": copy.deepcopy(LAYERS[layer])}))


def adapter_for(model: nn.Module, kind: str) -> Adapter:
    """An adapter on all targets, with random values in every factor."""
    fresh = loraio.new_adapter(model, loraio.TrainConfig(digit=0, targets=("all",), rank=2, alpha=3, kind=kind))
    generator = torch.Generator().manual_seed(1)
    factors = {
        name: factor.float() * 1.25 if name.endswith("magnitude") else torch.randn(factor.shape, generator=generator)
        for name, factor in fresh.factors.items()
    }
    return replace(fresh, factors=factors)


def refused(dialect: Dialect, layer: str, kind: str) -> str | None:
    name, _, grouped = layer.partition(", ")
    return dialect.refusal(name, kind, grouped=bool(grouped))


def written(dialect: Dialect, adapter: Adapter, model: nn.Module, path: Path) -> Path:
    """The file or folder of that name; what ``torch.save`` makes is only read under a name of its own."""
    path = path.with_suffix(".pt") if dialect.container == "pickle" else path
    encoded = dialect.encode(adapter, Context(network=model, state=model.state_dict(), options=OPTIONS))
    loading.write(dialect, encoded, path)
    return path


def files_in(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in ([path] if path.is_file() else sorted(path.iterdir()))}


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_kind_that_a_dialect_does_not_know_is_refused(dialect: Dialect, layer: str) -> None:
    name, _, grouped = layer.partition(", ")
    assert dialect.refusal(name, "new", grouped=bool(grouped))


def test_every_layer_type_is_tried() -> None:
    assert {layer.partition(", ")[0] for layer in LAYERS} == set(LAYER_TYPES)


@pytest.mark.parametrize(("dialect", "layer", "kind"), cases)
def test_what_a_dialect_holds_comes_back_to_the_bit(dialect: Dialect, layer: str, kind: str, tmp_path: Path) -> None:
    model = network(layer)
    adapter = adapter_for(model, kind)
    reason = refused(dialect, layer, kind)
    if reason is not None:
        with pytest.raises(AdapterError) as caught:
            written(dialect, adapter, model, tmp_path / "out")
        assert reason in str(caught.value)
        return
    path = written(dialect, adapter, model, tmp_path / "out")
    found = dialects.identify(path)
    assert found.dialect is dialect
    assert found.reason
    again, report = loading.load_reported(path, base=model, options=OPTIONS)
    expected, merged = (loraio.merge(model.state_dict(), one) for one in (adapter, again))
    assert any(not merged[name].equal(tensor) for name, tensor in model.state_dict().items())
    assert all(merged[name].equal(tensor) for name, tensor in expected.items())
    assert report is not None
    assert {line.name for line in report.lines if line.what == "tensor"} == set(found.source.tensors)
    assert not report.lost


@pytest.mark.parametrize(("dialect", "layer", "kind"), cases)
def test_two_conversions_of_one_adapter_have_the_same_bytes(
    dialect: Dialect, layer: str, kind: str, tmp_path: Path
) -> None:
    if refused(dialect, layer, kind) is not None:
        return
    model = network(layer)
    adapter = adapter_for(model, kind)
    path = written(dialect, adapter, model, tmp_path / "out")
    first = files_in(path)
    (tmp_path / "other").mkdir()
    again, _ = loading.load_reported(path, base=model, options=OPTIONS)
    assert files_in(written(dialect, adapter, model, tmp_path / "other/out")) == first
    third = written(dialect, again, model, tmp_path / "third")
    loading.load_reported(third, base=model, options=OPTIONS)
    assert {name.replace("third", "out") for name in files_in(third)} == set(first)


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
def test_the_report_names_every_factor_and_has_known_fates(dialect: Dialect) -> None:
    model = network("Linear")
    adapter = adapter_for(model, "lora")
    report = dialect.encode(adapter, Context(network=model, state=model.state_dict(), options=OPTIONS)).report
    assert {line.name for line in report.lines if line.what == "tensor"} == set(adapter.factors)
    assert {line.fate for line in report.lines} <= set(FATES)


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
def test_a_file_of_another_tool_needs_a_base(dialect: Dialect, tmp_path: Path) -> None:
    model = network("Linear")
    path = written(dialect, adapter_for(model, "lora"), model, tmp_path / "out")
    with pytest.raises(ConfigError, match="does not say what it is for") as caught:
        loraio.load(path)
    assert "--base" in str(caught.value)


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
def test_names_and_containers_are_known(dialect: Dialect) -> None:
    assert DIALECTS[dialect.name] is dialect
    assert dialect.container in ("folder", "safetensors", "pickle")

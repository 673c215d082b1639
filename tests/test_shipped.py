"""Test that the shipped adapters fit the shipped base and are as their card describes them."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

import loraio
from loraio.files import tensorfile

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "adapters"
DIGITS = range(10)


def file(digit: int) -> Path:
    return FOLDER / f"digit-{digit}.safetensors"


def test_the_card_describes_the_files() -> None:
    card = runpy.run_path(str(ROOT / "scripts/adapter_card.py"))["card"]
    assert (FOLDER / "README.md").read_text() == card(FOLDER)


def test_nothing_else_is_shipped() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert names == {"README.md", "base.safetensors", *(file(digit).name for digit in DIGITS)}


def test_together_they_make_a_third_of_the_errors_of_the_base_and_none_does_harm() -> None:
    before, own = [], []
    for digit in DIGITS:
        training = loraio.load(file(digit)).training
        assert (training["digit"], training["dataset"]) == (digit, "mnist")
        results = training["results"]
        assert (results["split"], results["images"]) == ("test", 10_000)
        before.append(results["before"]["wrong"][digit])
        own.append(results["after"]["wrong"][digit])
        assert own[-1] <= before[-1], digit
        assert results["after"]["accuracy"] >= results["before"]["accuracy"], digit
    assert sum(own) <= 0.35 * sum(before)


@pytest.mark.parametrize("digit", DIGITS)
def test_a_file_is_a_few_kilobytes_and_little_more_than_its_factors(digit: int) -> None:
    adapter = loraio.load(file(digit))
    factor_bytes = sum(factor.numel() * factor.element_size() for factor in adapter.factors.values())
    assert file(digit).stat().st_size - factor_bytes <= 4096
    assert file(digit).stat().st_size < 20_000


@pytest.mark.parametrize("digit", DIGITS)
def test_it_attaches_to_the_shipped_base_merges_and_verifies(digit: int) -> None:
    model = loraio.load_base(FOLDER / "base.safetensors")
    adapter = loraio.load(file(digit))
    images = torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(digit))
    plain = loraio.predict(model, images)
    with loraio.attach(model, adapter):
        assert not loraio.predict(model, images).equal(plain)
    state = model.state_dict()
    report = loraio.verify(state, adapter, loraio.merge(state, adapter))
    assert report.ok
    assert report.weights.max_ulp <= 0.5
    assert report.outputs is not None
    assert report.outputs.max_abs == 0
    assert report.outputs.argmax_agreement == 1


@pytest.mark.parametrize("digit", DIGITS)
def test_saving_it_again_gives_the_same_bytes(digit: int, tmp_path: Path) -> None:
    loraio.save(loraio.load(file(digit)), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == file(digit).read_bytes()


def test_nothing_personal_is_in_the_files() -> None:
    for path in FOLDER.glob("*.safetensors"):
        text = str(tensorfile.read_header(path).metadata).lower()
        for word in ("/home", "/root", "date", "time", "host", "user"):
            assert word not in text, (path.name, word)

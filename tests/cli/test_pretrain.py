"""Test ``loraio pretrain``."""

from __future__ import annotations

from pathlib import Path

import pytest
from running import Run, RunJson

import loraio

BASICS = ("--dataset", "digits", "--batch-size", "300")


def test_the_base_is_written_and_named(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    path.write_bytes(b"old")
    result = run("pretrain", "-o", path, *BASICS, "--force")
    assert result.stdout.startswith(f"{path}: digit-cnn, 113,162 parameters, ")
    assert "899 test images right" in result.stdout
    assert result.stderr.startswith("digit-cnn: step 3/3, loss ")
    assert loraio.read_base(path).network == "digit-cnn"


def test_json_has_the_documented_keys_and_the_facts_of_the_file(run_json: RunJson, tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    found = run_json("pretrain", "-o", path, *BASICS, "--epochs", 2, "--seed", 5)
    assert found.keys() == {"schema", "file", "bytes", "network", "parameters", "test"}
    assert (found["bytes"], found["parameters"]) == (path.stat().st_size, 113_162)
    test = loraio.load_dataset("digits", "test")
    assert found["test"] == loraio.evaluate(loraio.load_base(path), test).to_json()
    training = loraio.read_base(path).document["training"]
    assert (training["seed"], training["hyperparameters"]["epochs"]) == (5, 2)


def test_an_existing_output_is_refused_before_any_work(
    run: Run, run_json: RunJson, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "base.safetensors"
    path.write_bytes(b"mine")
    monkeypatch.setattr("loraio.training.datasets.load_dataset", None)
    monkeypatch.setattr(loraio, "load_dataset", None, raising=False)
    monkeypatch.setattr(loraio, "pretrain", None, raising=False)
    assert "--force" in run("pretrain", "-o", path, *BASICS, code=1).stderr
    assert run_json("pretrain", "-o", path, *BASICS, code=1)["error"] == "OutputExistsError"
    assert path.read_bytes() == b"mine"

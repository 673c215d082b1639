"""Test ``loraio evaluate``, and the base files that every command takes."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from running import Run, RunJson
from torch import nn

import loraio

DIGITS = ("--dataset", "digits")


def test_json_is_the_contract(
    run_json: RunJson,
    files: Path,
    base: nn.Module,
    three: loraio.Adapter,
    seven: loraio.Adapter,
    digits_test: loraio.Dataset,
) -> None:
    adapters = ("--adapter", files / "three.safetensors", "--adapter", files / "seven.safetensors")
    found = run_json("evaluate", files / "base.safetensors", *adapters, *DIGITS)
    assert found.keys() == {"schema", "dataset", "split", "images", "stripped", "base", "adapters"}
    assert (found["dataset"], found["split"], found["images"]) == ("digits", "test", 899)
    assert list(found["adapters"]) == ["three", "seven"]
    for result in (found["base"], *found["adapters"].values()):
        assert result.keys() == {"accuracy", "wrong", "false_alarms"}
        assert isinstance(result["accuracy"], float)
        assert [len(result[key]) for key in ("wrong", "false_alarms")] == [10, 10]
        assert all(isinstance(count, int) for count in result["wrong"] + result["false_alarms"])
        assert sum(result["wrong"]) == sum(result["false_alarms"])
        assert result["accuracy"] == (899 - sum(result["wrong"])) / 899
    assert found["base"] == loraio.evaluate(base, digits_test).to_json()
    for name, adapter in (("three", three), ("seven", seven)):
        with loraio.attach(base, adapter):
            assert found["adapters"][name] == loraio.evaluate(base, digits_test).to_json()
    assert found["adapters"]["three"] != found["base"]


def test_the_base_alone_can_be_evaluated_on_training_images(run: Run, run_json: RunJson, files: Path) -> None:
    words = ("evaluate", files / "base.safetensors", *DIGITS, "--split")
    found = run_json(*words, "train")
    assert (found["split"], found["images"], found["adapters"]) == ("train", 898, {})
    run(*words, "tset", code=2)


def test_the_tables_hold_the_counts(run: Run, run_json: RunJson, files: Path) -> None:
    words = ("evaluate", files / "base.safetensors", "--adapter", files / "three.safetensors", *DIGITS)
    text, found = run(*words).stdout, run_json(*words)
    rows = [line.split() for line in text.splitlines() if line.split()[:1] == ["three"]]
    result = found["adapters"]["three"]
    for row, key in zip(rows, ("wrong", "false_alarms"), strict=True):
        assert row[1:11] == [str(count) for count in result[key]]
        assert row[11:] == [str(sum(result[key])), f"{result['accuracy']:.2%}"]
    assert text.startswith("899 test images of digits\n")
    assert "\x1b" not in text


def test_strength_zero_is_the_base(run_json: RunJson, files: Path) -> None:
    words = ("evaluate", files / "base.safetensors", "--adapter", files / "three.safetensors", *DIGITS)
    found = run_json(*words, "--strength", 0)
    assert found["adapters"]["three"] == found["base"]


def test_a_folder_gives_its_adapters_once_and_passes_over_the_rest(run_json: RunJson, files: Path) -> None:
    adapters = ("--adapter", files, "--adapter", files / "three.safetensors")
    found = run_json("evaluate", files / "base.safetensors", *adapters, *DIGITS)
    assert list(found["adapters"]) == ["seven", "three"]


def test_files_of_one_name_are_told_apart_by_their_folders(run_json: RunJson, files: Path, tmp_path: Path) -> None:
    other = Path(shutil.copy(files / "seven.safetensors", tmp_path / "three.safetensors"))
    adapters = ("--adapter", files / "three.safetensors", "--adapter", other)
    found = run_json("evaluate", files / "base.safetensors", *adapters, *DIGITS)
    assert list(found["adapters"]) == [str(files / "three.safetensors"), str(other)]


def test_a_folder_without_adapters_is_refused(run: Run, run_json: RunJson, files: Path, tmp_path: Path) -> None:
    shutil.copy(files / "base.safetensors", tmp_path)
    words = ("evaluate", files / "base.safetensors", "--adapter", tmp_path, *DIGITS)
    assert f"there is no adapter in the folder {str(tmp_path)!r}" in run(*words, code=1).stderr
    assert run_json(*words, code=1)["error"] == "MissingFileError"


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_a_plain_state_dict_works_with_a_model_name(
    run: Run, run_json: RunJson, files: Path, tmp_path: Path, trained_base: nn.Module, suffix: str
) -> None:
    from safetensors.torch import save_file

    path = tmp_path / f"plain{suffix}"
    state = trained_base.state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    known = run_json("evaluate", files / "base.safetensors", *DIGITS)
    assert run_json("evaluate", path, "--model", "digit-cnn", *DIGITS)["base"] == known["base"]
    assert "--model NAME" in run("evaluate", path, *DIGITS, code=1).stderr


def test_the_error_without_data_and_network_has_a_hint(
    run: Run, run_json: RunJson, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no network here")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", refuse)
    words = ("evaluate", files / "base.safetensors", "--data-root", tmp_path)
    found = run_json(*words, code=1)
    assert found["error"] == "DataError"
    assert found["where"] == repr(str(tmp_path))
    assert str(tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte") in found["message"]
    assert "--dataset digits" in found["hint"]
    monkeypatch.setenv("LORAIO_DATA", str(tmp_path))
    assert str(tmp_path) in run(*words[:2], code=1).stderr


def test_an_allowed_mismatch_is_noted_for_each_adapter(
    run: Run, files: Path, trained_base: nn.Module, tmp_path: Path
) -> None:
    half = copy.deepcopy(trained_base).bfloat16()
    loraio.save_base(half, tmp_path / "half.safetensors")
    words = ("evaluate", tmp_path / "half.safetensors", "--adapter", files / "three.safetensors", "--dataset", "digits")
    assert "same weights cast to bfloat16" in run(*words, code=1).stderr
    found = run(*words, "--allow-base-mismatch")
    assert found.stderr.count("note: three: another base: ") == 3
    assert "note: three changes 3 weights" in found.stderr

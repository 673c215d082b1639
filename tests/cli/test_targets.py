"""Test ``loraio targets``."""

from __future__ import annotations

from pathlib import Path

import pytest
from running import Run, RunJson

import loraio


def test_the_table_has_a_row_for_each_weight(run: Run, files: Path) -> None:
    out = run("targets", files / "base.safetensors").stdout
    (row,) = [line.split() for line in out.splitlines() if line.startswith(" conv2.weight")]
    assert row == ["conv2.weight", "Conv2d", "64x32x3x3", "4", "4", "1,408", "7.64"]
    assert "fc.weight" not in out
    assert out.splitlines()[-1] == "3 weights with 92,448 numbers, 4,388 added: 4.746 %"


def test_json_has_the_documented_keys(run_json: RunJson, files: Path) -> None:
    words = ("--targets", "all", "--exclude", "conv3", "--rank", 2, "--rank", "fc=5", "--alpha", "fc=2.5")
    found = run_json("targets", files / "base.safetensors", *words)
    assert found.keys() == {"schema", "base", "stripped", "targets", "whole", "total"}
    assert found["total"].keys() == {"weights", "added", "percent"}
    rows = {row.pop("name"): row for row in found["targets"]}
    assert list(rows) == ["conv1.weight", "conv2.weight", "fc.weight"]
    assert rows["fc.weight"] == {
        "layer": "Linear", "groups": 1, "shape": [10, 2048], "kind": "lora", "rank": 5, "alpha": 2.5,
        "parameters": 10_290, "percent": pytest.approx(100 * 10_290 / 20_480),
    }  # fmt: skip
    assert rows["conv1.weight"]["rank"] == 2


def test_it_shows_the_targets_of_the_training(run: Run, run_json: RunJson, files: Path, tmp_path: Path) -> None:
    words = ("--targets", "re:conv[23],fc", "--rank", "conv3=6", "--rank", 2, "--kind", "dora")
    found = run_json("targets", files / "base.safetensors", *words)
    path = tmp_path / "a.safetensors"
    options = ("--dataset", "digits", "--steps", 3, "--batch-size", 16, "-o", path)
    run("train", files / "base.safetensors", "--digit", 3, *options, *words)
    adapter = loraio.load(path)
    assert {row["name"]: (row["rank"], row["kind"], row["parameters"]) for row in found["targets"]} == {
        name: (target.rank, target.kind, target.parameters) for name, target in adapter.targets.items()
    }


def test_a_network_that_the_file_does_not_name_can_be_named(run: Run, files: Path, tmp_path: Path) -> None:
    import torch

    torch.save(loraio.build_network("torchvision:resnet18", seed=0).state_dict(), tmp_path / "r.pt")
    out = run(
        "targets", tmp_path / "r.pt", "--model", "torchvision:resnet18", "--rank", "layer4.*=16", "--exclude", "conv1"
    ).stdout
    assert out.splitlines()[-1].startswith("19 weights with 11,157,504 numbers, ")

"""Test ``loraio inspect`` with adapters, bases and other files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from running import Run, RunJson
from torch import nn

import loraio
from loraio.files import tensorfile


def test_an_adapter_as_json_has_the_documented_keys(run_json: RunJson, files: Path, three: loraio.Adapter) -> None:
    path = files / "three.safetensors"
    found = run_json("inspect", path)
    assert {key: found[key] for key in ("file", "bytes", "type", "dialect", "format_version", "rank", "alpha")} == {
        "file": str(path),
        "bytes": path.stat().st_size,
        "type": "adapter",
        "dialect": "native",
        "format_version": 2,
        "rank": 4,
        "alpha": 6,
    }
    assert found["parameters"] == three.parameters == sum(t["parameters"] for t in found["targets"].values())
    assert list(found["targets"]) == ["conv1.weight", "conv2.weight", "conv3.weight"]
    assert found["targets"]["conv1.weight"]["shape"] == [32, 1, 3, 3]
    assert found["targets"]["conv1.weight"]["scale"] == 1.5
    assert found["base"] == {"network": "digit-cnn", "network_args": {}, "heads": {}, "sha256": three.base.sha256}
    assert found["whole"] == {}
    assert found["training"] == json.loads(json.dumps(dict(three.training)))
    assert found["warnings"] == []


class Odd(nn.Module):
    """A network in which rank 2 saves much, saves nothing, or a rank of 1 saves nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.square, self.row = nn.Linear(64, 64), nn.Linear(4, 4), nn.Linear(7, 1)


def test_targets_with_factors_as_large_as_the_weight_get_a_warning(run: Run, run_json: RunJson, tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    config = loraio.TrainConfig(rank=2, rank_pattern={"row": 1}, targets=("all",))
    loraio.save(loraio.new_adapter(Odd(), config), path)
    expected = [
        "'row.weight': at rank 1 the factors hold 8 numbers, the weight itself 7; no rank holds fewer",
        "'square.weight': at rank 2 the factors hold 16 numbers, the weight itself 16; ranks up to 1 hold fewer",
    ]
    assert run_json("inspect", path)["warnings"] == expected
    result = run("inspect", path)
    assert result.stderr.splitlines() == [f"note: {line}" for line in expected]
    assert expected[0] not in result.stdout


def test_ranks_that_differ_between_targets_have_no_one_rank(
    run_json: RunJson, tmp_path: Path, trained_base: nn.Module
) -> None:
    parts = [
        loraio.new_adapter(trained_base, loraio.TrainConfig(rank=rank, targets=(name,)))
        for rank, name in ((1, "conv1"), (2, "conv2"))
    ]
    mixed = loraio.Adapter(
        targets={**parts[0].targets, **parts[1].targets},
        factors={**parts[0].factors, **parts[1].factors},
        base=parts[0].base,
    )
    loraio.save(mixed, tmp_path / "mixed.safetensors")
    found = run_json("inspect", tmp_path / "mixed.safetensors")
    assert (found["rank"], found["alpha"]) == (None, None)


def test_an_adapter_as_text_names_base_targets_and_training(run: Run, files: Path) -> None:
    result = run("inspect", files / "three.safetensors")
    text = result.stdout
    assert result.stderr == ""
    for word in ("adapter, native format version 2", "base: digit-cnn", "64x32x3x3", "digit: 3", "before: accuracy"):
        assert word in text


def test_a_base_as_json_has_the_documented_keys(run_json: RunJson, files: Path, trained_base: nn.Module) -> None:
    found = run_json("inspect", files / "base.safetensors")
    assert (found["type"], found["network"], found["parameters"]) == ("base", "digit-cnn", 113_162)
    assert found["tensors"]["conv3.weight"] == {"dtype": "F32", "shape": [128, 64, 3, 3]}
    assert found["tensors"].keys() == trained_base.state_dict().keys()
    assert (found["merged"], found["training"]) == ([], {})


def test_a_merged_base_shows_its_receipt(run: Run, run_json: RunJson, files: Path) -> None:
    (receipt,) = run_json("inspect", files / "merged.safetensors")["merged"]
    assert receipt["strength"] == 1.0
    text = run("inspect", files / "merged.safetensors").stdout
    assert "merged, receipt 1 of 1:\n" in text
    assert receipt["adapter_sha256"] in text
    assert "changed: 3 tensors (conv1.weight, conv2.weight, conv3.weight)" in text


def test_a_lineage_is_shown_in_order(run: Run, run_json: RunJson, files: Path, tmp_path: Path) -> None:
    path = tmp_path / "both.safetensors"
    loraio.merge_file(files / "merged.safetensors", files / "seven.safetensors", path, force=True)
    first, second = run_json("inspect", path)["merged"]
    assert (first["adapter"]["digit"], second["adapter"]["digit"]) == (3, 7)
    text = run("inspect", path).stdout
    assert text.index("merged, receipt 1 of 2:") < text.index("digit 3") < text.index("receipt 2 of 2:")
    assert text.index("receipt 2 of 2:") < text.index("digit 7") < text.index(f"forced: {second['forced'][0]}")


def test_a_residue_says_of_which_merge_it_is(run: Run, run_json: RunJson, files: Path, tmp_path: Path) -> None:
    base, path = files / "base.safetensors", tmp_path / "m"
    done = loraio.merge_file(base, files / "three.safetensors", path, reversible=True)
    (receipt,) = run_json("inspect", path)["merged"]
    found = run_json("inspect", f"{path}.residue")
    digests = {key: receipt[key] for key in ("adapter_sha256", "base_sha256", "strength")}
    assert found.items() >= {"type": "residue", "format_version": 3, "merged_sha256": done.sha256, **digests}.items()
    assert found["tensors"].keys() == receipt["changed"].keys()
    text = run("inspect", f"{path}.residue").stdout
    assert text.startswith(f"{path}.residue: residue of a merge, format version 3, 3 tensors")
    assert receipt["residue_sha256"] in run("inspect", path).stdout
    assert f"merged_sha256: {done.sha256}" in text


def test_a_file_from_elsewhere_is_a_base_without_a_name(run: Run, run_json: RunJson, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "elsewhere.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(())}, path)
    found = run_json("inspect", path)
    assert (found["type"], found["network"], found["sha256"], found["parameters"]) == ("base", None, None, 7)
    assert "network not named" in run("inspect", path).stdout
    assert "scalar" in run("inspect", path).stdout


@pytest.mark.parametrize(
    "entries",
    [
        {"merged": 3, "training": 4},
        {"merged": [1, "x", {"strength": "much", "changed": 1, "forced": 2}], "training": {"results": 5}},
        {"training": {"results": {"before": [], "after": {"accuracy": None}}, "versions": [{"a": [1]}]}},
    ],
)
def test_odd_metadata_is_shown_not_stumbled_over(run: Run, tmp_path: Path, entries: dict[str, Any]) -> None:
    path = tmp_path / "odd.safetensors"
    tensorfile.write({"a": torch.zeros(2)}, path, document={"format_version": 2, **entries})
    assert "base model" in run("inspect", path).stdout


def test_a_file_name_that_looks_like_markup_is_printed_as_it_is(run: Run, files: Path, tmp_path: Path) -> None:
    odd = tmp_path / "x[bold][a]:smile:.safetensors"
    shutil.copy(files / "three.safetensors", odd)
    assert str(odd) in run("inspect", odd).stdout
    table = run("evaluate", files / "base.safetensors", "--adapter", odd, "--dataset", "digits").stdout
    assert odd.stem in table


def test_a_file_name_that_is_not_utf_8_is_printed_escaped(
    run: Run, run_json: RunJson, files: Path, tmp_path: Path
) -> None:
    odd = tmp_path / "x\udcff.safetensors"
    try:
        shutil.copy(files / "three.safetensors", odd)
    except OSError:
        odd = tmp_path / "missing\udcff.safetensors"
        run("inspect", odd, code=1)
        return
    assert "x\\udcff.safetensors" in run("inspect", odd).stdout
    assert run_json("inspect", odd)["file"] == str(odd)


def test_a_sharded_base_has_the_facts_of_one_in_one_file(
    run: Run, run_json: RunJson, write_parts: Callable[..., Path], trained_base: nn.Module, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    whole, state = tmp_path / "whole.safetensors", trained_base.state_dict()
    save_file(state, whole)
    index = write_parts(state, tmp_path / "parted")
    expected = run_json("inspect", whole)
    assert expected["parts"] == []
    names = ["a-1-of-2.safetensors", "a-2-of-2.safetensors"]
    sizes = [(index.parent / name).stat().st_size for name in names]
    for path in (index, index.parent):
        found = run_json("inspect", path)
        assert (found["file"], found["parts"], found["bytes"]) == (str(path), names, sum(sizes))
        assert found["bytes"] - found["header_bytes"] - 16 == expected["bytes"] - expected["header_bytes"] - 8
        differ = {"file", "parts", "bytes", "header_bytes"}
        assert {key: found[key] for key in found.keys() - differ} == {
            key: expected[key] for key in expected.keys() - differ
        }
        assert f"{path}: base model in 2 shards, network not named, 113,162 parameters, " in run("inspect", path).stdout
    assert "base model, network not named" in run("inspect", whole).stdout


def test_a_sharded_base_that_contradicts_itself_is_refused(
    run: Run, run_json: RunJson, write_parts: Callable[..., Path], trained_base: nn.Module, tmp_path: Path
) -> None:
    index = write_parts(trained_base.state_dict(), tmp_path, **{"fc.bias": "../x.safetensors", "nowhere": 3})
    text = run("inspect", index, code=1).stderr
    assert text.startswith("FormatError: shards must be plain names of files in the index's own folder\n")
    assert "'fc.bias' is in '../x.safetensors'" in text
    assert "'nowhere' is in 3" in text
    index.unlink()
    assert "holds no index of a sharded checkpoint" in run_json("inspect", tmp_path, code=1)["message"]


def test_a_folder_is_no_file(run: Run, tmp_path: Path) -> None:
    assert str(tmp_path) in run("inspect", tmp_path, code=1).stderr

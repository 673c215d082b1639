"""Test ``loraio merge`` and ``loraio verify``."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from running import Run, RunJson

import loraio
from loraio.cli import _output
from loraio.errors import OutputError
from loraio.files import tensorfile
from loraio.merging.determinism import NondeterministicLayer
from loraio.merging.finished_shards import FinishedShards

State = dict[str, torch.Tensor]


def words(command: str, files: Path, *more: object) -> tuple[object, ...]:
    return (command, files / "base.safetensors", files / "three.safetensors", *more)


def test_the_merged_checkpoint_is_the_library_s(run: Run, files: Path, tmp_path: Path) -> None:
    path = tmp_path / "merged.safetensors"
    text = run(*words("merge", files, "-o", path)).stdout
    assert text.startswith(f"{path}: 3 tensors folded, 5 left bit-identical")
    assert path.read_bytes() == (files / "merged.safetensors").read_bytes()


def test_merge_json_has_the_documented_keys(run_json: RunJson, files: Path, tmp_path: Path) -> None:
    path = tmp_path / "merged.safetensors"
    found = run_json(*words("merge", files, "-o", path, "--strength", 0.5))
    facts = {
        "folded",
        "replaced",
        "untouched",
        "max_ulp",
        "landing",
        "base_mismatch",
        "forced",
        "parts",
        "residue",
        "reused",
    }
    assert found.keys() == {"schema", "file", "sha256", "strength", "fast", "stripped", *facts}
    assert found["landing"].keys() == {"targets", "parameters", "replaced", "smallest", "median", "largest"}
    assert (found["file"], found["strength"], found["folded"], found["untouched"]) == (str(path), 0.5, 3, 5)
    assert 0 < found["max_ulp"] <= 0.5
    assert loraio.read_base(path).document["sha256"] == found["sha256"]


def test_a_fast_merge_says_so_in_the_file_and_is_verified_as_one(
    run: Run, run_json: RunJson, files: Path, tmp_path: Path
) -> None:
    path = tmp_path / "fast.safetensors"
    assert "ulp from the range of float32 sums" in run(*words("merge", files, "-o", path, "--fast")).stdout
    checkpoint, exact = loraio.read_base(path), loraio.read_base(files / "merged.safetensors")
    assert checkpoint.document["merged"][0]["sums"] == "float32"
    assert not checkpoint.merged_exactly
    assert exact.merged_exactly
    assert not checkpoint.state["conv2.weight"].equal(exact.state["conv2.weight"])
    found = run_json(*words("verify", files, path))
    assert (found["ok"], found["exact"]) == (True, False)
    assert "as far as float32 sums go" in run(*words("verify", files, path)).stdout
    claims = dict(checkpoint.document)
    claims["merged"] = [{key: value for key, value in claims["merged"][0].items() if key != "sums"}]
    lying = tmp_path / "lying.safetensors"
    tensorfile.write(checkpoint.state, lying, document=claims)
    assert "weights: WRONG" in run(*words("verify", files, lying), code=3).stdout


def test_merge_gives_the_shards_of_a_sharded_base_and_counts_finished_ones(
    run: Run,
    run_json: RunJson,
    files: Path,
    write_parts: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    index = write_parts(loraio.read_base(files / "base.safetensors").state, tmp_path / "parts")
    three, merged = files / "three.safetensors", loraio.read_base(files / "merged.safetensors").document["sha256"]
    found = run_json("merge", index, three, "-o", tmp_path / "json", "--workers", 1)
    assert (found["sha256"], found["reused"]) == (merged, 0)
    assert found["parts"] == [str(tmp_path / f"json/a-{number}-of-2.safetensors") for number in (1, 2)]
    with monkeypatch.context() as patch:
        patch.setattr(FinishedShards, "forget", failing)
        assert "No space left" in run("merge", index, three, "-o", tmp_path / "m", code=1).stderr
    assert (
        "2 of 2 shards had been finished by an earlier run" in run("merge", index, three, "-o", tmp_path / "m").stderr
    )
    assert loraio.read_base(tmp_path / "m").document["sha256"] == merged


def failing(_: object) -> None:
    raise OutputError("No space left on device")


def test_a_bar_is_shown_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = Terminal()
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stderr", shown)
    with _output.byte_progress("merged", as_json=False) as report:
        assert report is not None
        report(3_000_000, 4_000_000)
    assert re.search(r"merged .*3\.0/4\.0 MB", shown.getvalue())
    with _output.byte_progress("merged", as_json=True) as report:
        assert report is None
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with _output.byte_progress("merged", as_json=False) as report:
        assert report is None


def test_verify_says_yes_to_a_right_merge(run: Run, files: Path) -> None:
    text = run(*words("verify", files, files / "merged.safetensors")).stdout
    assert text.startswith("weights: ok\n")
    assert text.endswith("\nverified\n")
    assert max(map(len, text.splitlines())) <= 80


def test_verify_json_is_the_contract(run_json: RunJson, files: Path) -> None:
    found = run_json(*words("verify", files, files / "merged.safetensors"))
    assert found.keys() == {"schema", "ok", "strength", "exact", "stripped", "weights", "outputs", "nondeterministic"}
    assert found["ok"] is True
    assert found["nondeterministic"] is None
    weights, outputs = found["weights"], found["outputs"]
    assert weights["ok"] is True
    assert 0 < weights["max_ulp"] <= 0.5
    assert (weights["not_correctly_rounded"], weights["folded"], weights["untouched"]) == (0, 3, 5)
    assert weights["problems"] == []
    assert outputs["ok"] is True
    assert (outputs["max_abs"], outputs["argmax_agreement"], outputs["samples"]) == (0.0, 1.0, 256)
    assert outputs["bound"] > 0
    assert outputs["effect"] > outputs["bound"]


@pytest.mark.parametrize("wrong", [False, True])
def test_verify_lets_the_weights_decide_for_a_nondeterministic_network(
    run: Run, run_json: RunJson, files: Path, wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = NondeterministicLayer(name="conv1", type="Conv2d")
    monkeypatch.setattr("loraio.merging.verification._nondeterministic", lambda *_: layer)
    case = words("verify", files, files / ("base.safetensors" if wrong else "merged.safetensors"))
    found, text = run_json(*case, code=3 * wrong), run(*case, code=3 * wrong).stdout
    assert found["nondeterministic"] == {"name": "conv1", "type": "Conv2d"}
    assert (found["ok"], found["weights"]["ok"], found["outputs"]) == (not wrong, not wrong, None)
    assert "another answer for the same input on this machine,\n  first in layer 'conv1' (Conv2d)" in text
    assert text.endswith("\nNOT VERIFIED\n" if wrong else "\nweights verified\n")
    assert wrong or max(map(len, text.splitlines())) <= 80


def test_verify_takes_real_images_or_a_number_of_random_ones(run: Run, run_json: RunJson, files: Path) -> None:
    merged = files / "merged.safetensors"
    assert run_json(*words("verify", files, merged, "--dataset", "digits"))["outputs"]["samples"] == 899
    few = [run_json(*words("verify", files, merged, "--random", 7, "--seed", seed))["outputs"] for seed in (1, 2, 1)]
    assert few[0]["samples"] == 7
    assert few[0] == few[2] != few[1]
    assert (
        "exclude each other"
        in run(*words("verify", files, merged, "--random", 7, "--dataset", "digits"), code=2).stderr
    )


def test_verify_knows_the_strength_of_the_merge(run: Run, run_json: RunJson, files: Path, tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    run(*words("merge", files, "-o", path, "--strength", 0.5))
    assert run_json(*words("verify", files, path, "--strength", 0.5))["ok"] is True
    assert run_json(*words("verify", files, path), code=3)["ok"] is False


def not_folded(base: State, merged: State) -> State:
    return base


def folded_twice(base: State, merged: State) -> State:
    return {name: 2 * tensor - base[name] for name, tensor in merged.items()}


def alpha_ignored(base: State, merged: State) -> State:  # alpha / r is 6 / 4
    return {name: base[name] + (tensor - base[name]) / 1.5 for name, tensor in merged.items()}


def one_layer_skipped(base: State, merged: State) -> State:
    return merged | {"conv2.weight": base["conv2.weight"]}


def one_untouched_bit_changed(base: State, merged: State) -> State:
    changed = merged["fc.bias"].clone()
    changed.view(torch.int32)[3] ^= 1
    return merged | {"fc.bias": changed}


def one_weight_next_to_right(base: State, merged: State) -> State:
    changed = merged["conv3.weight"].clone()
    changed[0, 0, 0, 0] = torch.nextafter(changed[0, 0, 0, 0], torch.tensor(torch.inf))
    return merged | {"conv3.weight": changed}


def not_a_number(base: State, merged: State) -> State:
    return merged | {"conv1.weight": torch.full_like(merged["conv1.weight"], torch.nan)}


MUTANTS = [
    not_folded,
    folded_twice,
    alpha_ignored,
    one_layer_skipped,
    one_untouched_bit_changed,
    one_weight_next_to_right,
    not_a_number,
]


@pytest.mark.parametrize("mutant", MUTANTS)
def test_verify_exits_3_on_a_wrong_merge(
    run: Run, run_json: RunJson, files: Path, tmp_path: Path, mutant: Callable[[State, State], State]
) -> None:
    base, merged = (dict(loraio.read_base(files / f"{name}.safetensors").state) for name in ("base", "merged"))
    path = tmp_path / "wrong.safetensors"
    tensorfile.write(mutant(base, merged), path, document={"format_version": 1})
    found = run_json(*words("verify", files, path), code=3)
    assert found["ok"] is False
    assert found["weights"]["ok"] is False
    assert found["weights"]["problems"] != []
    text = run(*words("verify", files, path), code=3).stdout
    assert text.startswith("weights: WRONG\n")
    assert text.endswith("\nNOT VERIFIED\n")


def test_numbers_that_json_lacks_are_null(run_json: RunJson, files: Path, tmp_path: Path) -> None:
    merged = dict(loraio.read_base(files / "merged.safetensors").state)
    path = tmp_path / "wrong.safetensors"
    tensorfile.write(not_a_number({}, merged), path, document={"format_version": 1})
    found = run_json(*words("verify", files, path), code=3)
    assert (found["weights"]["max_ulp"], found["outputs"]["max_abs"]) == (None, None)
    assert found["outputs"]["ok"] is False

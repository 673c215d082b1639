"""Test ``loraio unmerge``, and ``loraio merge`` with ``--force`` and ``--reversible``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from running import Run, RunJson, python

import loraio


@pytest.fixture
def merged(files: Path, tmp_path: Path) -> Path:
    """Write a reversible merge."""
    path = tmp_path / "merged.safetensors"
    loraio.merge_file(files / "base.safetensors", files / "three.safetensors", path, reversible=True)
    return path


@pytest.mark.slow
def test_a_merge_goes_there_and_back_in_processes_of_their_own(files: Path, tmp_path: Path) -> None:
    base, three, path = files / "base.safetensors", files / "three.safetensors", tmp_path / "m.safetensors"
    done = python("-m", "loraio", "merge", base, three, "-o", path, "--reversible")
    assert (done.returncode, done.stderr) == (0, "")
    residue = path.with_name("m.safetensors.residue")
    assert f"\n{residue}: " in done.stdout
    assert " bits for each folded weight, " in done.stdout
    for name, words in (("a", [three]), ("b", ["--base", base]), ("c", [three, "--residue", residue])):
        done = python("-m", "loraio", "unmerge", path, *words, "-o", tmp_path / name)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"{tmp_path / name}: the base bit for bit, sha256 ")
        assert done.stdout.endswith("1 merge taken back, 0 left\n")
        assert (tmp_path / name).read_bytes() == base.read_bytes()


def test_a_wrong_base_is_refused_in_a_process_of_its_own(merged: Path, files: Path, tmp_path: Path) -> None:
    loraio.save_base(loraio.build_network("digit-cnn", seed=8), tmp_path / "other")
    done = python("-m", "loraio", "unmerge", merged, "--base", tmp_path / "other", "-o", tmp_path / "out", "--json")
    assert (done.returncode, done.stdout) == (1, "")
    assert json.loads(done.stderr)["error"] == "BaseMismatchError"
    assert not (tmp_path / "out").exists()


def test_unmerge_json_has_the_documented_keys(run_json: RunJson, merged: Path, files: Path, tmp_path: Path) -> None:
    found = run_json("unmerge", merged, files / "three.safetensors", "-o", tmp_path / "out", "--workers", 1)
    assert found.keys() == {"schema", "file", "sha256", "parts", "taken_off", "left"}
    (receipt,) = run_json("inspect", merged)["merged"]
    assert (found["taken_off"], found["left"], found["parts"]) == ([receipt], [], [])
    assert found["sha256"] == receipt["base_sha256"]


def test_merge_json_has_the_size_of_the_residue(run_json: RunJson, files: Path, tmp_path: Path) -> None:
    path = tmp_path / "m"
    found = run_json("merge", files / "base.safetensors", files / "three.safetensors", "-o", path, "--reversible")
    kept = found["residue"]
    assert kept.keys() == {"file", "bytes", "bits_per_weight", "share"}
    assert (kept["file"], kept["bytes"]) == (f"{path}.residue", Path(f"{path}.residue").stat().st_size)
    assert 0 < kept["share"] < 0.1
    assert 0 < kept["bits_per_weight"] < 2


def test_a_residue_as_large_as_the_base_is_remarked_upon(run: Run, files: Path, tmp_path: Path) -> None:
    words = ("merge", files / "base.safetensors", files / "three.safetensors", "-o", tmp_path / "m", "--reversible")
    assert run(*words).stderr == ""
    done = run(*words, "--strength", 1e15, "--force")
    assert "the residue is nearly as large as the base itself" in done.stderr
    run("unmerge", tmp_path / "m", files / "three.safetensors", "-o", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (files / "base.safetensors").read_bytes()


def test_a_second_merge_needs_force_and_is_recorded(run: Run, run_json: RunJson, files: Path, tmp_path: Path) -> None:
    merged, path = files / "merged.safetensors", tmp_path / "again.safetensors"
    words = ("merge", merged, files / "three.safetensors", "-o", path)
    assert run_json(*words, code=1)["error"] == "AlreadyMergedError"
    error = run(*words, "--allow-base-mismatch", code=1).stderr
    assert "was merged into this file already (receipt 1 of 1)" in error
    assert "--force" in error
    assert not path.exists()
    assert "note: forced: adapter" in run(*words, "--force").stderr
    assert len(run_json(*words, "--force")["forced"]) == 1
    assert run_json("inspect", path)["merged"][1]["forced"] != []


def test_two_merges_are_taken_back_at_once(run: Run, files: Path, tmp_path: Path) -> None:
    base, twice = files / "base.safetensors", tmp_path / "twice"
    run("merge", files / "merged.safetensors", files / "seven.safetensors", "-o", twice, "--force")
    assert "--all" in run("unmerge", twice, "--base", base, "-o", tmp_path / "out", code=1).stderr
    assert (
        "2 merges taken back, 0 left" in run("unmerge", twice, "--base", base, "-o", tmp_path / "out", "--all").stdout
    )
    assert (tmp_path / "out").read_bytes() == base.read_bytes()
    assert "exists" in run("unmerge", twice, "--base", base, "-o", tmp_path / "out", "--all", code=1).stderr
    run("unmerge", twice, "--base", files / "merged.safetensors", "-o", tmp_path / "out", "--force")
    assert (tmp_path / "out").read_bytes() == (files / "merged.safetensors").read_bytes()


def test_an_input_is_never_the_output(run: Run, merged: Path, files: Path, tmp_path: Path) -> None:
    for path in (merged, Path(f"{merged}.residue")):
        before = path.read_bytes()
        error = run("unmerge", merged, files / "three.safetensors", "-o", path, "--force", code=1).stderr
        assert "is also an input" in error
        assert path.read_bytes() == before

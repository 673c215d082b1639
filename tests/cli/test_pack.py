"""Test ``loraio pack``, ``unpack``, and ``inspect`` of a pack."""

from __future__ import annotations

from pathlib import Path

from running import Run, RunJson, python

import loraio


def test_pack_inspect_and_unpack_agree_as_json(run_json: RunJson, files: Path, tmp_path: Path) -> None:
    output = tmp_path / "all.pack"
    packed = run_json("pack", files, "-o", output)
    assert packed == {
        "schema": "loraio/pack/1",
        "file": str(output),
        "bytes": output.stat().st_size,
        "adapters": ["seven", "three"],
    }
    seen = run_json("inspect", output)
    assert (seen["type"], seen["format_version"], seen["bytes"]) == ("pack", 2, output.stat().st_size)
    three = seen["adapters"]["three"]
    data = (files / "three.safetensors").read_bytes()
    assert output.read_bytes()[three["begin"] :][: three["bytes"]] == data
    written = run_json("unpack", output, "three", "-o", tmp_path / "out")
    assert written["files"] == [str(tmp_path / "out/three.safetensors")]
    assert (tmp_path / "out/three.safetensors").read_bytes() == data


def test_the_same_as_text(run: Run, files: Path, tmp_path: Path) -> None:
    output = tmp_path / "all.pack"
    assert run("pack", files, "-o", output).stdout.startswith(f"{output}: 2 adapters, ")
    text = run("inspect", output).stdout
    assert "pack of 2 adapters, format version 2" in text
    assert "seven" in text
    assert run("unpack", output, "-o", tmp_path / "out").stdout == f"{tmp_path / 'out'}: 2 adapters\n"
    assert loraio.load(tmp_path / "out/three.safetensors") == loraio.load(files / "three.safetensors")


def test_an_existing_output_is_kept_without_force(run: Run, run_json: RunJson, files: Path, tmp_path: Path) -> None:
    run("pack", files, "-o", tmp_path / "all.pack")
    assert "--force" in run("pack", files, "-o", tmp_path / "all.pack", code=1).stderr
    run("pack", files, "-o", tmp_path / "all.pack", "--force")
    run("unpack", tmp_path / "all.pack", "-o", tmp_path)
    assert run_json("unpack", tmp_path / "all.pack", "-o", tmp_path, code=1)["error"] == "OutputExistsError"
    run("unpack", tmp_path / "all.pack", "-o", tmp_path, "--force")


def test_processes_of_their_own_pack_the_same_bytes(files: Path, tmp_path: Path) -> None:
    for seed in ("1", "2"):
        done = python("-m", "loraio", "pack", files, "-o", tmp_path / f"{seed}.pack", PYTHONHASHSEED=seed)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "1.pack").read_bytes() == (tmp_path / "2.pack").read_bytes()

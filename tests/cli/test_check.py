"""Test ``loraio check``: exit code 3, the name of the damaged tensor, and the shipped adapters."""

from __future__ import annotations

import shutil
from pathlib import Path

from running import Run, RunJson

ROOT = Path(__file__).parents[2]


def test_the_shipped_files_are_as_they_were_written(run: Run) -> None:
    result = run("check", ROOT / "adapters")
    assert len(result.stdout.splitlines()) == 12
    assert result.stdout.endswith("11 files, all as they were written\n")


def test_damage_is_named_with_exit_code_3(run: Run, run_json: RunJson, files: Path, tmp_path: Path) -> None:
    path = tmp_path / "three.safetensors"
    content = bytearray((files / path.name).read_bytes())
    content[-1] ^= 0x80
    path.write_bytes(content)
    shutil.copy(files / "seven.safetensors", tmp_path)
    result = run("check", tmp_path, code=3)
    assert f"{path}: DAMAGED" in result.stdout
    assert "lora_" in result.stdout
    assert "1 of 2 files DAMAGED" in result.stdout
    found = run_json("check", path, tmp_path / "seven.safetensors", code=3)
    assert [(file["ok"], file["type"]) for file in found["files"]] == [(False, "adapter"), (True, "adapter")]
    assert not found["ok"]


def test_nothing_to_check_is_an_error(run: Run, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        assert str(path) in run("check", path, code=1).stderr

"""The scripts run."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest
from sampling import sample, sampled_or_all

ROOT = Path(__file__).parent.parent
WALKTHROUGH = ROOT / "scripts/walkthrough.py"


def test_the_walkthrough_runs_from_top_to_bottom_and_shows_what_it_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAIO_DATASET", "digits")
    names = runpy.run_path(str(WALKTHROUGH))
    printed = capsys.readouterr().out
    assert "B is (10, 2), A is (2, 10): 40 numbers instead of 100" in printed
    assert "rank 1: 92,672 convolution parameters, 1,097 added, 1.184 %" in printed
    assert names["svd_error"] < 1e-5
    assert names["base_untouched"]
    assert names["weight_error"] < 1e-6
    assert names["off_is_base"]
    digit = names["DIGIT"]
    assert names["off_result"] == names["base_result"]
    assert names["on_result"].wrong[digit] < names["off_result"].wrong[digit]
    assert names["on_result"].accuracy >= names["off_result"].accuracy
    assert names["proof"].ok


def test_the_walkthrough_opens_as_a_notebook() -> None:
    notebook = jupytext.read(WALKTHROUGH)
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds.count("markdown") >= 8
    assert kinds.count("code") >= 10
    for cell in notebook.cells:
        if cell.cell_type == "code":
            compile(cell.source, "cell", "exec")


def test_swapping_two_adapters_gives_the_base_back(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [str(files / f"{name}.safetensors") for name in ("base", "three", "seven")]
    monkeypatch.setattr(sys, "argv", ["swap.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "scripts/swap.py"), run_name="__main__")
    assert caught.value.code == 0
    lines = [line.split("misread, digits 0 to 9:")[-1] for line in capsys.readouterr().out.splitlines()]
    three, seven, back, _half, disabled, detached, verdict = lines
    assert three == back != seven
    assert disabled == detached != three
    assert "the same, bit for bit" in verdict


@pytest.mark.slow
def test_the_quickstart_runs_from_any_folder_and_a_second_time(tmp_path: Path) -> None:
    """In a copy of the scripts that uses this Python in the place of a new environment."""
    project = tmp_path / "project"
    (project / ".venv/bin").mkdir(parents=True)
    (project / ".venv/bin/python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (project / ".venv/bin/loraio").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m loraio "$@"\n')
    (project / "scripts").mkdir()
    for name in ("quickstart", "swap.py"):
        (project / "scripts" / name).write_bytes((ROOT / "scripts" / name).read_bytes())
    (project / "scripts/environment").write_text("#!/bin/sh\n")
    for file in (project / ".venv/bin").iterdir():
        file.chmod(0o755)
    for file in (project / "scripts").iterdir():
        file.chmod(0o755)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(2):
        found = subprocess.run(
            [project / "scripts/quickstart"],
            cwd=elsewhere,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert found.returncode == 0, found.stderr
        assert "\nverified\n" in found.stdout
        assert "the base is the same, bit for bit" in found.stdout
        assert str(project / "quickstart") in found.stdout
    assert not list(elsewhere.iterdir())
    assert len(list((project / "quickstart/adapters").glob("*.safetensors"))) == 10


@pytest.mark.parametrize("most", sampled_or_all(1))
def test_adapters_go_on_and_off_networks_of_several_families(
    most: int | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    every = ["squeezenet1_1", "shufflenet_v2_x0_5", "lraspp_mobilenet_v3_large", "ssdlite320_mobilenet_v3_large"]
    names = every if most is None else sample(every, most, key="networks")
    words = [word for name in names for word in ("--only", name)]
    monkeypatch.setattr(sys, "argv", ["torchvision_builders.py", "--json", *words])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "scripts/bench/torchvision_builders.py"), run_name="__main__")
    found = json.loads(capsys.readouterr().out)
    assert caught.value.code == 0
    assert [row["name"] for row in found["networks"]] == names
    assert found["failed"] == []
    for row in found["networks"]:
        assert row["ok"]
        assert row["max_ulp"] <= 0.5
        assert row["targets"] > 20


@pytest.mark.slow
def test_the_shipped_adapters_give_the_same_wrong_answers_in_peft() -> None:
    command = [sys.executable, ROOT / "scripts/bench/peft_digits.py", "--dataset", "digits", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["images"] == 899
    assert set(found["adapters"]) == {f"digit-{digit}" for digit in range(10)}
    for row in found["adapters"].values():
        assert row["wrong"] == row["wrong_in_peft"] != found["wrong_without"]

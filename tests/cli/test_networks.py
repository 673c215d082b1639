"""Test ``--model`` and ``--model-args`` with networks of one's own and bases from elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from running import Run, RunJson
from torch import nn

import loraio

OWN = """
from torch import nn


def small(width=4):
    return nn.Sequential(
        nn.Conv2d(1, width, 5, stride=3), nn.ReLU(), nn.Flatten(), nn.Linear(width * 64, 10)
    )
"""

NOTE = "note: names had the prefix 'module.', which was removed\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a current folder with a network of one's own."""
    (tmp_path / "own_small.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_small", raising=False)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    return tmp_path


@pytest.fixture
def prefixed(trained_base: nn.Module, tmp_path: Path) -> Path:
    """Write the trained base as DDP would save it."""
    path = tmp_path / "ddp.pt"
    torch.save({f"module.{name}": tensor for name, tensor in trained_base.state_dict().items()}, path)
    return path


def test_a_network_of_ones_own_goes_the_whole_way(run: Run, run_json: RunJson, here: Path) -> None:
    path = list(sys.path)
    options = ("--model", "own_small:small", "--model-args", '{"width": 3}')
    found = run_json("pretrain", "-o", "base.safetensors", "--dataset", "digits", *options)
    assert found["network"] == "own_small:small"
    assert sys.path == path
    checkpoint = loraio.read_base("base.safetensors")
    assert (checkpoint.network, checkpoint.network_args) == ("own_small:small", {"width": 3})
    train = ("train", "base.safetensors", "--digit", 3, "-o", "three.safetensors", "--dataset", "digits", "--steps", 5)
    refused = run(*train, code=1).stderr
    assert "which a file alone does not get to run" in refused
    assert "--model own_small:small" in refused
    run(*train, "--rank", 2, "--model", "own_small:small")
    adapter = loraio.load("three.safetensors")
    assert (adapter.base.network, dict(adapter.base.network_args)) == ("own_small:small", {"width": 3})
    run("merge", "base.safetensors", "three.safetensors", "-o", "merged.safetensors")
    assert loraio.read_base("merged.safetensors").network_args == {"width": 3}
    verify = ("verify", "base.safetensors", "three.safetensors", "merged.safetensors", "--model", "own_small:small")
    assert run_json(*verify, "--dataset", "digits")["ok"]
    assert "the input shape of 'own_small:small' is not known" in run(*verify, code=1).stderr


def test_the_program_finds_modules_of_the_current_folder(here: Path) -> None:
    program = Path(sys.executable).with_name("loraio")
    words = [program, "pretrain", "-o", "b.safetensors", "--dataset", "digits", "--model", "own_small:small"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("b.safetensors: own_small:small, ")


def test_a_removed_prefix_is_noted(run: Run, run_json: RunJson, files: Path, prefixed: Path) -> None:
    three, merged = files / "three.safetensors", prefixed.with_name("merged.safetensors")
    model = ("--model", "digit-cnn")
    result = run("merge", prefixed, three, "-o", merged)
    assert result.stderr == NOTE
    assert run("verify", prefixed, three, merged, *model).stderr == NOTE
    assert run("evaluate", prefixed, "--dataset", "digits", *model).stderr == NOTE
    assert run("targets", prefixed, *model).stderr == NOTE
    assert NOTE in run(
        "train", prefixed, "--digit", 3, "-o", prefixed.with_name("3.safetensors"), "--dataset", "digits",
        "--steps", 5, *model,
    ).stderr  # fmt: skip
    assert run_json("evaluate", prefixed, "--dataset", "digits", *model)["stripped"] == "module."
    assert run_json("verify", prefixed, three, merged)["stripped"] == "module."
    assert run_json("merge", prefixed, three, "-o", merged, "--force")["stripped"] == "module."
    assert run_json("targets", prefixed, *model)["stripped"] == "module."
    assert run_json("evaluate", files / "base.safetensors", "--dataset", "digits")["stripped"] == ""
    assert run_json("targets", files / "base.safetensors")["stripped"] == ""

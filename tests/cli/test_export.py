"""Test ``loraio export``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from running import Run, RunJson, python

import loraio
from loraio.cli._options import FAILED
from loraio.exporting import export

INTERRUPT = """
import os, signal, time
from loraio.exporting import export
from loraio.cli import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell is born to ignore it

def wait(path, *_):
    assert path.stat().st_size > 400_000
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)

export._run_file = wait
main()
"""

BOTH = """
import sys
from loraio.cli import main

for path in sys.argv[2:]:
    try:
        main(["export", sys.argv[1], "-o", path, "--json", *(["--opset", "17"] if path.endswith(".onnx") else [])])
    except SystemExit as end:
        assert end.code == 0
"""

converts = pytest.mark.skipif(
    torch.__version__.startswith("2.6."), reason="torch 2.6 does not convert a network to the opset that is asked for"
)


@pytest.mark.slow
@converts
def test_another_process_with_another_hash_seed_exports_the_same_bytes(files: Path, tmp_path: Path) -> None:
    merged, paths = files / "merged.safetensors", [tmp_path / f"m{suffix}" for suffix in sorted(export.RUNTIMES)]
    done = python("-c", BOTH, merged, *paths, PYTHONHASHSEED="7")
    assert (done.returncode, done.stderr) == (0, "")  # the converter to an older opset logs a lot
    for line, path in zip(done.stdout.splitlines(), paths, strict=True):
        found = json.loads(line)
        assert (found["ok"], found["file"], found["bytes"]) == (True, str(path), path.stat().st_size)
        again = loraio.export(merged, path.with_stem("again"), opset=17 if path.suffix == ".onnx" else None)
        assert again.path.read_bytes() == path.read_bytes()


def test_the_lines_name_the_file_and_the_largest_difference(run: Run, files: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    first, second = run("export", files / "merged.safetensors", "-o", path, "--batch", 2).stdout.splitlines()
    assert first.startswith(f"{path}: pt2, 4")
    assert first.endswith(" kB, inputs (batch, 1, 28, 28)")
    assert second.startswith("output: largest difference 0 in batches of 1, 3, 2, allowed ")
    assert second.endswith("; same answer: 100.00%")


@converts
def test_json_has_the_documented_keys(run_json: RunJson, files: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    found = run_json("export", files / "merged.safetensors", "-o", path, "--opset", 20)
    about = {"format", "bytes", "opset", "network", "input_shape", "batches", "outputs", "stripped", "max_abs"}
    assert found.keys() == {"schema", "ok", "file", "problems", *about}
    assert (found["format"], found["opset"], found["input_shape"]) == ("onnx", 20, [1, 28, 28])
    (output,) = found["outputs"]
    assert output.keys() == {"name", "shape", "max_abs", "bound", "argmax_agreement"}
    assert found["max_abs"] == output["max_abs"] <= output["bound"]


def test_other_outputs_make_the_exit_code_3(
    run: Run, run_json: RunJson, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = export._run_file
    monkeypatch.setattr(export, "_run_file", lambda *arguments: [[outputs[0] + 1] for outputs in found(*arguments)])
    words = ("export", files / "merged.safetensors", "-o", tmp_path / "m.pt2")
    result = run(*words, code=FAILED)
    assert result.stdout == ""
    assert "VerificationError: the exported network computes something else; nothing was written" in result.stderr
    assert "the largest difference is 1, it may be 0.000" in result.stderr
    answer = run_json(*words, code=FAILED)
    assert answer.keys() == {"schema", "ok", "file", "problems"}
    assert (answer["ok"], answer["file"], len(answer["problems"])) == (False, str(tmp_path / "m.pt2"), 2)
    assert list(tmp_path.iterdir()) == []
    run(*words, "--atol", 1.1)


def test_an_interrupt_leaves_nothing(files: Path, tmp_path: Path) -> None:
    done = python("-c", INTERRUPT, "export", files / "merged.safetensors", "-o", tmp_path / "m.pt2")
    assert (done.returncode, done.stdout) == (130, ""), done.stderr
    assert "interrupted" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_errors_have_hints(
    run: Run, run_json: RunJson, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = files / "merged.safetensors"
    assert "Known: .onnx, .pt2" in run("export", merged, "-o", tmp_path / "m.pb", code=1).stderr
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = run_json("export", merged, "-o", tmp_path / "m.onnx", code=1)
    assert (found["error"], found["hint"]) == ("ConfigError", "pip install 'loraio[onnx]'")


def test_a_base_from_elsewhere_needs_its_model(run: Run, files: Path, tmp_path: Path) -> None:
    state = loraio.read_base(files / "base.safetensors").state
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "ddp.pt")
    words = ("export", tmp_path / "ddp.pt", "-o", tmp_path / "m.pt2")
    assert "--model NAME" in run(*words, code=1).stderr
    result = run(*words, "--model", "digit-cnn")
    assert result.stderr == "note: names had the prefix 'module.', which was removed\n"
    assert "inputs (batch, 1, 28, 28)" in result.stdout


def test_an_input_shape_is_used(run: Run, files: Path, tmp_path: Path) -> None:
    words = ("export", files / "merged.safetensors", "-o", tmp_path / "m.pt2", "--input-shape")
    assert "inputs (batch, 1, 27, 28)" in run(*words, "1,27,28").stdout
    assert "does not take inputs of shape (1, 1, 64, 64)" in run(*words, "1,64,64", "--force", code=1).stderr

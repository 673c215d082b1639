"""Test that no content and no name of a file controls the terminal."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from rich.progress import Progress
from running import Run, RunJson
from safetensors.torch import load_file, save_file

import loraio
from loraio import cli
from loraio.cli import _output, main

EVIL = "x\x1b[2J\x1b]0;owned\x07\u202egnp\r\x9b1A\u2066"
"""Control characters that clear the screen, name the window, ring, reverse the line, overwrite it and move up."""

TAME = "x\\x1b[2J\\x1b]0;owned\\x07\\u202egnp\\r\\x9b1A\\u2066"


@pytest.fixture
def evil(
    files: Path, three: loraio.Adapter, base: torch.nn.Module, digits_test: loraio.Dataset, tmp_path: Path
) -> Path:
    """Write files with such names and contents."""
    folder = tmp_path / EVIL
    folder.mkdir()
    loraio.save_base(base, folder / f"base{EVIL}.safetensors", training={"note": EVIL, "lines\n": [EVIL, "a\nb"]})
    loraio.save(replace(three, training={"note": EVIL, EVIL: {"deep": EVIL}}), folder / f"{EVIL}.safetensors")
    state = {name.replace("conv1", EVIL): tensor for name, tensor in load_file(files / "base.safetensors").items()}
    save_file(state, folder / "names.safetensors")
    kohya = {
        f"lora_unet_{EVIL}.lora_down.weight": torch.ones(2, 3),
        f"lora_unet_{EVIL}.lora_up.weight": torch.ones(3, 2),
    }
    save_file(kohya, folder / "kohya.safetensors", {"ss_network_module": EVIL, EVIL: EVIL})
    save_file({f"{EVIL}.lora_A": torch.ones(2, 3)}, folder / "broken.safetensors", {"loraio": json.dumps({EVIL: EVIL})})
    (folder / "text.safetensors").write_text(EVIL)
    Image.fromarray((digits_test.images[0, 0] * 255).byte().numpy()).save(folder / f"{EVIL}.png")
    return folder


def test_no_name_and_no_content_controls_the_terminal(evil: Path) -> None:
    base, adapter, names = evil / f"base{EVIL}.safetensors", evil / f"{EVIL}.safetensors", evil / "names.safetensors"
    merged, image = evil / f"merged{EVIL}.safetensors", evil / f"{EVIL}.png"
    commands: list[tuple[object, ...]] = [
        *(("inspect", file) for file in sorted(evil.iterdir()) if file.suffix == ".safetensors"),
        ("merge", base, adapter, "-o", merged),
        ("merge", names, adapter, "-o", evil / "no.safetensors"),
        ("merge", base, evil / "kohya.safetensors", "-o", evil / "no.safetensors"),
        ("inspect", merged),
        ("verify", base, adapter, merged),
        ("verify", base, adapter, names),
        ("evaluate", base, "--adapter", adapter, "--dataset", "digits"),
        ("predict", base, image, "--adapter", adapter),
        ("predict", base, adapter),
        ("convert", adapter, "-o", evil / f"kohya{EVIL}", "--to", "kohya"),
        ("convert", evil / f"kohya{EVIL}", "-o", evil / f"native{EVIL}", "--to", "native", "--base", base),
        ("targets", base),
        ("targets", names, "--model", "digit-cnn"),
        ("targets", base, "--targets", EVIL),
        ("train", base, "--digit", "3", "-o", evil / f"new{EVIL}", "--dataset", "digits", "--steps", "1"),
        ("pack", adapter, "-o", evil / f"all{EVIL}.pack"),
        ("unpack", adapter, "-o", evil / "out", EVIL),
        ("export", base, "-o", evil / EVIL),
        ("inspect", evil / f"none{EVIL}"),
        ("inspect", f"--{EVIL}"),
        (EVIL,),
    ]
    tame = set()
    for words in commands:
        result = CliRunner().invoke(main, list(map(str, words)))
        assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
        raw = {character for character in result.output if not character.isprintable()} - {"\n"}
        assert not raw, (words, raw)
        tame |= {(words[0], result.exit_code)} if TAME in result.output else set()
    done = {command for command, code in tame if code == 0}
    assert done >= {"inspect", "merge", "evaluate", "predict", "convert"}
    assert ("inspect", 1) in tame


def test_the_text_of_a_file_stays_on_its_line(run: Run, evil: Path) -> None:
    text = run("inspect", evil / f"base{EVIL}.safetensors").stdout
    assert f"note: {TAME}\n" in text
    assert f"lines\\n: {TAME} a\\nb\n" in text


def test_json_has_the_names_as_they_are(run_json: RunJson, evil: Path) -> None:
    assert run_json("inspect", evil / f"{EVIL}.safetensors")["training"]["note"] == EVIL


def test_bars_and_tables_show_names_as_lines_do(capsys: pytest.CaptureFixture[str]) -> None:
    table = _output.table(EVIL, ["name", "number"])
    table.add_row(f"[red]{EVIL}\n", "1")
    _output.console().print(table)
    text = capsys.readouterr().out
    assert text.count(TAME) == 2
    assert f"[red]{TAME}\\n" in text
    assert not {character for character in text if not character.isprintable()} - {"\n"}


def test_bars_show_names_as_lines_do(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr(Progress, "start", lambda bar: made.append(bar))
    with _output.byte_progress(EVIL, as_json=False):
        assert made[0].tasks[0].description == TAME
        assert not made[0].columns[0].markup


def test_commands_print_through_one_module() -> None:
    for file in Path(cli.__file__).parent.glob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        named = {node.id for node in nodes if isinstance(node, ast.Name)}
        named |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "click"}
        if file.name != "_output.py":
            assert not named & {"print", "echo", "secho"}, f"{file}: use _output.line or _output.note"

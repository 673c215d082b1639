"""Every file of the corpus through every command that reads files: refused by the same words, within time and memory.

No traceback, no hang, nothing written, no payload run.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from hostile.containers import PAYLOAD, entry, raw, torch_saved
from hostile.corpus import Case, adapter_parts, cases, native
from PIL import Image
from safetensors.torch import save, save_file
from sampling import sample, sampled_or_all

import loraio
from loraio.cli import main
from loraio.files.limits import Limits

HANGS = 60
"""Seconds after which a command hangs."""

MEGABYTES = 64
"""Above idle, that refusing a file may take."""

BASE: dict[str, tuple[str, ...]] = {
    "merge, base": ("merge", "FILE", "ADAPTER", "-o", "OUT.safetensors"),
    "verify, base": ("verify", "FILE", "ADAPTER", "MERGED"),
    "verify, merged": ("verify", "BASE", "ADAPTER", "FILE"),
    "evaluate, base": ("evaluate", "FILE", "--dataset", "digits"),
    "predict, base": ("predict", "FILE", "IMAGE"),
    "convert, base": ("convert", "KOHYA", "--to", "native", "--base", "FILE", "-o", "OUT.safetensors"),
    "export": ("export", "FILE", "-o", "OUT.pt2"),
    "targets": ("targets", "FILE"),
    "unmerge": ("unmerge", "FILE", "--base", "BASE", "-o", "OUT.safetensors"),
    "unmerge, base": ("unmerge", "MERGED", "--base", "FILE", "-o", "OUT.safetensors"),
    "train": ("train", "FILE", "--dataset", "digits", "--steps", "1", "-o", "OUT.safetensors"),
}
"""Commands with the file in the place of a base."""

ADAPTER: dict[str, tuple[str, ...]] = {
    "merge, adapter": ("merge", "BASE", "FILE", "-o", "OUT.safetensors"),
    "verify, adapter": ("verify", "BASE", "FILE", "MERGED"),
    "evaluate, adapter": ("evaluate", "BASE", "--adapter", "FILE", "--dataset", "digits"),
    "predict, adapter": ("predict", "BASE", "IMAGE", "--adapter", "FILE"),
    "convert": ("convert", "FILE", "--to", "native", "--base", "BASE", "-o", "OUT.safetensors"),
    "unmerge, adapter": ("unmerge", "MERGED", "FILE", "-o", "OUT.safetensors"),
}
"""Commands with the file in the place of an adapter."""

OTHERS: dict[str, tuple[str, ...]] = {
    "inspect": ("inspect", "FILE"),
    "pack": ("pack", "FILE", "-o", "OUT.pack"),
    "unpack": ("unpack", "FILE", "-o", "OUT"),
    "unmerge, residue": ("unmerge", "MERGED", "ADAPTER", "--residue", "FILE", "-o", "OUT.safetensors"),
}

COMMANDS = {**OTHERS, **ADAPTER, **BASE}

REFUSING: dict[str, set[str]] = {
    "bytes": {*COMMANDS},
    "base": {*BASE},
    "network": {"evaluate, base", "predict, base", "convert, base", "export", "targets", "train"},
    "adapter": {*ADAPTER},
    "peft": {*ADAPTER, "inspect"},
    "pack": {"inspect", "unpack"},
    "pickle": {*ADAPTER, *BASE} - {"unmerge"},  # which has no receipts, whatever is in it
}
"""Who must refuse a case with its own message, by the case's role; the others may do so, without a traceback."""

CASES = cases()


@pytest.fixture(scope="session")
def given(files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the paths of valid files for the other arguments of the commands."""
    folder = tmp_path_factory.mktemp("given")
    pair = {"lora_unet_fc.lora_down.weight": torch.ones(1, 2048), "lora_unet_fc.lora_up.weight": torch.ones(10, 1)}
    save_file(pair, folder / "kohya.safetensors")
    Image.new("L", (28, 28)).save(folder / "image.png")
    base, adapter, merged = files / "base.safetensors", files / "three.safetensors", folder / "merged.safetensors"
    loraio.merge_file(base, adapter, merged, reversible=True)
    return {
        "BASE": str(files / "base.safetensors"),
        "ADAPTER": str(files / "three.safetensors"),
        "MERGED": str(merged),
        "KOHYA": str(folder / "kohya.safetensors"),
        "IMAGE": str(folder / "image.png"),
    }


def words_of(command: str, file: Path, given: dict[str, str], folder: Path) -> list[str]:
    """A command line; outputs go to the folder."""
    return [
        str(folder / word) if word.startswith("OUT") else str(file) if word == "FILE" else given.get(word, word)
        for word in COMMANDS[command]
    ]


@contextmanager
def no_hang() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"hangs for {HANGS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANGS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(words: list[str]) -> Result:
    """A command line in process; an exception that click did not see is a traceback."""
    with no_hang():
        result = CliRunner().invoke(main, words)
    assert result.exception is None or isinstance(result.exception, SystemExit), (words, repr(result.exception))
    assert "Traceback" not in result.output, words
    return result


def refused(result: Result, match: str, file: Path) -> None:
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert re.search(match, result.stderr), result.stderr
    assert str(file if file.is_dir() else file.parent) in result.stderr.replace("\\\\", "\\"), result.stderr
    assert len(result.stderr) < 20_000
    assert result.stderr.replace("\n", "").isprintable(), repr(result.stderr)


def commands_for(case: Case, most: int | None) -> list[str]:
    """Return all commands, or a sample with one that must refuse the case by its own message."""
    takes = [command for command in COMMANDS if not (case.folder and command == "pack")]  # it takes a folder's files
    if most is None:
        return takes
    refusing = sample([command for command in takes if command in REFUSING[case.role]], 1, key=case.name)
    return refusing + sample([command for command in takes if command not in refusing], most - 1, key=case.name)


@pytest.mark.parametrize("most", sampled_or_all(3))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_command_refuses_it(
    case: Case, most: int | None, given: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place, output = tmp_path / "in", tmp_path / "out"
    place.mkdir()
    output.mkdir()
    file = case.write(place)
    for command in commands_for(case, most):
        result = run(words_of(command, file, given, output))
        if command in REFUSING[case.role]:
            refused(result, case.match, file)
        assert result.exit_code in (0, 1, 2, 3)
        if result.exit_code:
            assert list(output.iterdir()) == [], command
        else:
            for made in output.iterdir():
                made.unlink()
    checked = run(["check", str(file)])
    if case.role == "bytes":
        assert checked.exit_code in (1, 3)
        assert re.search(case.match, checked.output), checked.output
    assert not (tmp_path / PAYLOAD).exists()
    assert {path.name: path.read_bytes() for path in place.iterdir()} == case.files


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 200
    assert {case.role for case in CASES} == {*REFUSING}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["pipe", "pipe.pt", "device", "folder"])
def test_what_is_no_file_is_refused_and_never_waited_for(
    command: str, kind: str, given: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    place = Path("/dev/zero") if kind == "device" else tmp_path / kind
    if kind.startswith("pipe"):
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    result = run(words_of(command, place, given, output))
    assert result.exit_code == 1
    pipe = "it is a named pipe|is a pickle, which has no receipts"
    what = {"device": "it is a device", "folder": "folder|nothing to pack"}.get(kind, pipe)
    assert re.search(what, result.stderr), result.stderr


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("zip in a tensor.safetensors", raw({"w": entry("U8", (4,), (0, 4))}, b"PK\3\4")),
        ("zip in the metadata.safetensors", raw({"__metadata__": {"a": "PK\x03\x04"}, "w": entry()}, bytes(8))),
    ],
)
def test_what_is_a_safetensors_file_too_is_read_as_one(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    facts = json.loads(run(["inspect", str(tmp_path / name), "--json"]).stdout)
    assert list(facts["tensors"]) == ["w"]


def test_a_pickle_that_calls_itself_safetensors_is_never_unpickled(
    given: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    file = tmp_path / "adapter.safetensors"
    file.write_bytes(torch_saved({"fc.lora_A": torch.ones(1, 2048), "fc.lora_B": torch.ones(10, 1)}))
    monkeypatch.setattr(torch, "load", fail)
    for command in COMMANDS:
        refused(run(words_of(command, file, given, tmp_path)), "a zip archive", file)


def test_a_file_prints_nothing_that_a_terminal_obeys(tmp_path: Path) -> None:
    document, factors = adapter_parts()
    document["training"] = {"note\x1b[2J": "\x1b]0;owned\a", "deep": {"list": ["\u202eevil"]}}
    document["base"]["network"] = "net\x1b[31m"
    (tmp_path / "a.safetensors").write_bytes(native(document, factors))
    base = native({"format_version": 1, "network": "x\x1b[2J", "merged": [{"a\x1b": "\x9b"}]}, {"w": torch.ones(2)})
    (tmp_path / "b.safetensors").write_bytes(base)
    config = {"peft_type": "LORA\x1b[2J", "r": 1, "lora_alpha": 1, "use_\x1b": "\x1b"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes(save({"m.fc.lora_A.weight": torch.ones(1, 2)}))
    for name in ("a.safetensors", "b.safetensors", "."):
        result = run(["inspect", str(tmp_path / name)])
        assert result.exit_code == 0
        assert result.output.replace("\n", "").isprintable(), repr(result.output)


# In processes of their own


def bombs() -> Iterator[tuple[str, bytes]]:
    """Yield the files that cost most to refuse, each just within a limit and refused by the last check."""
    size, entries = Limits().header_bytes, Limits().json_values

    def padded(text: str, data: bytes = b"!") -> bytes:
        return raw(text.encode().ljust(size), data)

    tensor = '"{}":{{"dtype":"U8","shape":[0,1],"data_offsets":[0,0]}}'
    tensors = ",".join(tensor.format(number) for number in range(Limits().tensors))
    yield "tensors.safetensors", padded(f"{{{tensors}}}")
    wide = "😀" + "x" * (size - 200)
    yield "wide-metadata.safetensors", raw(json.dumps({"__metadata__": {"a": wide}}, ensure_ascii=False), b"!")
    yield "objects.safetensors", padded('{"w":[' + '{"a":1},' * (entries // 2 - 3) + "0]}")
    yield "keys.safetensors", padded("{" + ",".join(f'"{number}":{{}}' for number in range(entries // 2 - 3)) + "}")
    yield "lists.safetensors", padded('{"w":[' + "[[]]," * (entries // 3 - 3) + "0]}")
    yield "floats.safetensors", padded('{"w":[' + "0.1234," * (entries - 3) + "0]}")
    yield "texts.safetensors", padded('{"w":[' + '"abcdefgh",' * (entries - 3) + "0]}")
    yield "wide-texts.safetensors", padded('{"w":[' + '"😀",' * (entries - 3) + "0]}")
    yield "escapes.safetensors", padded('{"w":"' + "\\u00e9" * ((size - 100) // 6) + '"}')
    yield "backslashes.safetensors", padded('{"w":"' + "\\\\" * ((size - 100) // 2) + '"}')
    yield "quotes.safetensors", padded('{"w":[' + '"",' * ((size - 100) // 3) + "0]}")
    yield "open.safetensors", padded('{"w":"' + '\\"' * ((size - 100) // 2))
    yield "commas.safetensors", padded('{"w":[' + "0," * ((size - 100) // 2) + "0]}")
    yield "long.safetensors", raw(b"{" + b" " * 99_000_000)
    document, factors = adapter_parts()
    filled = document | {"x": [{"a": 1}] * (entries // 2 - 100), "format_version": 99}
    yield "document.safetensors", native(json.dumps(filled, separators=(",", ":")), factors)
    wide_document = document | {"x": "😀" + "x" * (size - 5000), "format_version": 99}
    yield "wide-document.safetensors", native(json.dumps(wide_document, ensure_ascii=False), factors)
    yield "stretched.pt", torch_saved({"w": torch.ones(1).expand(10**9)})


MEASURE = """
import os, re, sys
from click.testing import CliRunner
from loraio.cli import main
import loraio.formats.pack, torch

def status(key):
    return int(re.search(rf"{key}:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) / 1024

torch.set_num_threads(1)
CliRunner().invoke(main, ["inspect", sys.argv[1]])
for file in sys.argv[1:]:
    child = os.fork()  # each from the same idle process
    if child:
        os.waitpid(child, 0)
        continue
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = status("VmRSS")
    result = CliRunner().invoke(main, ["inspect", file])
    said = (result.stderr.splitlines() or [""])[0]
    print(f"{status('VmHWM') - before:.1f}\\t{result.exit_code}\\t{file}\\t{said[:200]}", flush=True)
    os._exit(0)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")
def test_what_is_refused_costs_little_memory(tmp_path: Path) -> None:
    small = tmp_path / "small.safetensors"
    small.write_bytes(b"{}")
    paths = [small]
    for name, content in bombs():
        (tmp_path / name).write_bytes(content)
        paths.append(tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, paths)], capture_output=True, text=True, timeout=540, check=True
    )
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(rows) == len(paths), done.stderr
    assert [row for row in rows if row[1] != "1"] == []
    assert [row for row in rows if float(row[0]) > MEGABYTES] == []


def test_samples_come_to_every_command() -> None:
    assert {command for case in CASES for command in commands_for(case, 3)} == {*COMMANDS}


@pytest.mark.sampled
@pytest.mark.parametrize("number", sample(range(len(CASES)), 2, key="real processes"))
def test_a_real_process_says_the_same(number: int, given: dict[str, str], tmp_path: Path) -> None:
    case = CASES[number]
    (tmp_path / "in").mkdir()
    file = case.write(tmp_path / "in")
    command = sorted(REFUSING[case.role])[number % len(REFUSING[case.role])]
    words = [sys.executable, "-m", "loraio", *words_of(command, file, given, tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=HANGS, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.search(case.match, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in"]

"""Test the group of commands: help, examples, errors as text and JSON, and commands without torch."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from running import Run, RunJson, python

import loraio
from loraio.cli import _options, _output, inspect, main
from loraio.training import config
from loraio.training.optimizing import Progress

COMMANDS = sorted(file.stem for file in Path(inspect.__file__).parent.glob("[a-z]*.py"))
"""A command is a file in its folder; a name with an underscore first is none."""

PROBE = """
import sys
from loraio.cli import main
try:
    main()
finally:
    heavy = sorted(sys.modules.keys() & {"torch", "torchvision", "sklearn", "numpy", "safetensors"})
    print("HEAVY", *heavy, file=sys.stderr)
"""


def examples(command: click.Command) -> list[str]:
    """Return the command lines at the end of a command's help."""
    with click.Context(command, info_name="loraio") as context:
        lines = command.get_help(context).splitlines()
    start = next(n for n, line in enumerate(lines) if line.strip().startswith("Example"))
    return [line.strip() for line in lines[start + 1 :]]


def test_all_commands_are_there() -> None:
    assert sorted(main.commands) == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_ends_with_an_example_that_parses(name: str) -> None:
    command = main.commands[name]
    (line,) = examples(command)
    program, word, *arguments = shlex.split(line)
    assert (program, word) == ("loraio", name)
    command.make_context(name, arguments)  # raises a usage error where an option is not there


def test_the_help_of_the_group_ends_with_examples_that_parse() -> None:
    lines = examples(main)
    assert len(lines) == 3
    for line in lines:
        program, word, *arguments = shlex.split(line)
        assert program == "loraio"
        main.commands[word].make_context(word, arguments)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_json(name: str) -> None:
    assert "--json" in [word for parameter in main.commands[name].params for word in parameter.opts]


def test_the_list_of_commands_is_not_cut_short_in_80_columns(run: Run) -> None:
    commands = run("--help").stdout.partition("Commands:")[2].partition("Example")[0]
    assert "..." not in commands


def test_no_help_imports_torch() -> None:
    probe = PROBE.replace(
        "main()", "[main([*words, '--help'], standalone_mode=False) for words in [[], *([w] for w in main.commands)]]"
    )
    done = python("-c", probe)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage:") == 1 + len(COMMANDS)
    assert done.stderr == "HEAVY\n"


def files_of_each_type(
    files: Path, folder: Path, write_parts: Callable[..., Path], three: loraio.Adapter
) -> list[Path]:
    """Write a file of each dialect that is no pickle, a pack, and a sharded checkpoint."""
    for dialect in ("peft", "kohya", "lycoris", "diffusers"):
        loraio.convert(files / "three.safetensors", folder / dialect, to=dialect)
    loraio.pack([files], folder / "all.pack")
    write_parts(three.factors, folder / "sharded")
    return [files / "three.safetensors", files / "base.safetensors", *folder.iterdir()]


def test_inspect_and_unpack_import_neither_torch_nor_numpy(
    files: Path, write_parts: Callable[..., Path], three: loraio.Adapter, tmp_path: Path
) -> None:
    lines = [["inspect", str(file)] for file in files_of_each_type(files, tmp_path, write_parts, three)]
    lines += [[*lines[0], "--json"], ["pack", str(files), "-o", str(tmp_path / "2.pack")]]
    lines += [["unpack", str(tmp_path / "all.pack"), "-o", str(tmp_path / "out")]]
    probe = PROBE.replace("main()", f"[main(words, standalone_mode=False) for words in {lines!r}]")
    done = python("-c", probe)
    assert done.returncode == 0, done.stderr
    assert "in 2 shards" in done.stdout
    assert done.stderr.endswith("HEAVY\n")


def test_python_m_loraio_is_the_same_program(run: Run) -> None:
    done = python("-m", "loraio", "--version")
    assert (done.returncode, done.stdout) == (0, f"loraio, version {loraio.__version__}\n")
    assert python("-m", "loraio", "inspect").returncode == 2


def test_version_is_the_package_version(run: Run) -> None:
    assert run("--version").stdout.strip().endswith(loraio.__version__)


def test_a_reader_that_goes_away_ends_the_program_without_a_traceback(files: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "loraio", "inspect", str(files / "three.safetensors")]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(write)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "Error" not in done.stderr


def test_no_command_at_all_shows_the_help_and_exits_2(run: Run) -> None:
    assert "Commands:" in run(code=2).stderr


@pytest.mark.parametrize(
    ("words", "says"), [(["insepct"], "insepct"), (["inspect", "x", "--nope"], "--nope"), (["inspect"], "FILE")]
)
def test_a_wrong_word_exits_2(run: Run, run_json: RunJson, words: list[str], says: str) -> None:
    assert says in run(*words, code=2).stderr
    assert says in run_json(*words, code=2)["message"]


def test_the_word_json_after_two_dashes_is_a_file_name(run: Run) -> None:
    assert run("inspect", "--", "--json", code=1).stderr.startswith("MissingFileError: '--json' does not exist")


def test_an_error_as_json_has_the_parts_of_the_error_as_text(run: Run, run_json: RunJson, files: Path) -> None:
    words = ("verify", files / "three.safetensors", files / "three.safetensors", files / "merged.safetensors")
    text, found = run(*words, code=1).stderr, run_json(*words, code=1)
    assert found["error"] == "FormatError"
    assert text.startswith(f"FormatError: {found['message']}")
    assert found["hint"] in text


def test_debug_shows_the_traceback(files: Path) -> None:
    from click.testing import CliRunner

    from loraio.errors import MissingFileError

    result = CliRunner().invoke(main, ["--debug", "inspect", "nowhere.safetensors"])
    assert isinstance(result.exception, MissingFileError)


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_an_interrupt_ends_with_the_exit_code_of_shells(
    run: Run, files: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("loraio.files.tensorfile.read_header", interrupt)
    result = run("inspect", files / "three.safetensors", *flags, code=130)
    assert result.stdout == ""
    assert "interrupted" in result.stderr.lower()
    if flags:
        assert json.loads(result.stderr)["error"] == "Interrupted"


def test_the_largest_seed_is_the_library_s(run: Run) -> None:
    seed = next(p for p in main.commands["train"].params if p.name == "seed")
    assert isinstance(seed.type, click.IntRange)
    assert seed.type.max == config.MAX_SEED


def test_a_pipe_gets_no_escape_codes(run: Run, files: Path) -> None:
    for words in (["inspect", files / "three.safetensors"], ["inspect", files / "base.safetensors"]):
        assert "\x1b" not in run(*words).stdout


class Stream(io.StringIO):
    """A stream that claims to be a terminal, or not to be one."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def like_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the environment of a terminal with 80 columns and colours."""
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")


def test_tables_fit_a_terminal_of_80_columns(
    files: Path, monkeypatch: pytest.MonkeyPatch, like_a_terminal: None
) -> None:
    monkeypatch.chdir(files)
    with contextlib.redirect_stdout(Stream(True)) as shown:
        inspect.inspect.main(["three.safetensors"], standalone_mode=False)
    assert "\x1b[1m" in shown.getvalue()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue())
    table = plain.partition("Targets")[2].partition("dataset:")[0]
    assert "conv3.weight" in table
    assert max(len(line) for line in table.splitlines()) <= 80
    assert "…" not in table


def bars() -> str:
    """Return the text that the progress of a training shows on a terminal."""
    with contextlib.redirect_stderr(Stream(True)) as shown, _output.progress() as report:
        for step in (100, 200):
            report(Progress(label="digit 3", step=step, steps=200, loss=0.5))
    return shown.getvalue()


def test_training_shows_bars_on_a_terminal(like_a_terminal: None) -> None:
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", bars())
    assert "200/200" in plain
    assert "loss 0.5000" in plain


def test_no_color_takes_the_colours_away(monkeypatch: pytest.MonkeyPatch, like_a_terminal: None) -> None:
    colours = r"\x1b\[(?:[0-9;]*;)?(?:3[0-9]|9[0-7])[0-9;]*m"
    assert re.search(colours, bars())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(colours, bars())


def test_training_writes_lines_without_a_terminal_unless_told_not_to() -> None:
    for lines, expected in ((True, "digit 3: step 100/200, loss 0.5000\n"), (False, "")):
        with contextlib.redirect_stderr(Stream(False)) as shown, _output.progress(lines=lines) as report:
            report(Progress(label="digit 3", step=100, steps=200, loss=0.5))
        assert shown.getvalue() == expected


def test_a_number_stays_whole_when_it_is_written_so() -> None:
    number = _options.Number()
    assert [number.convert(text, None, None) for text in ("4", "4.0", "1e-3", "-2")] == [4, 4.0, 0.001, -2]
    assert [type(number.convert(text, None, None)) for text in ("4", "4.0")] == [int, float]


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "9" * 400, "9" * 5000, "four", ""])
def test_a_number_that_is_not_finite_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="not a finite number"):
        _options.Number().convert(text, None, None)

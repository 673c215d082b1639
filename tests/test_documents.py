"""The documents say what the program does: README, specification, help, change log."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import click
import jsonschema
import pytest

import loraio
from loraio.adapter import adapter as data
from loraio.adapter.kinds import KINDS
from loraio.adapter.layers import LAYER_TYPES
from loraio.cli import main
from loraio.files import integrity, tensorfile
from loraio.files.tensorfile import METADATA_KEY
from loraio.formats.dialects import DIALECTS
from loraio.formats.native import (
    _BASE_KEYS,
    _BASE_OPTIONS,
    _COMMON,
    _DOCUMENT_KEYS,
    _DOCUMENT_OPTIONS,
    _TARGET_KEYS,
    _TARGET_OPTIONS,
    _WHOLE_KEYS,
    _WHOLE_OPTIONS,
)

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SPEC = (ROOT / "loraio/docs/format.md").read_text()
SCHEMA = json.loads((ROOT / "loraio/formats/native.schema.json").read_text())


def blocks(language: str) -> list[str]:
    """The README's fenced blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Every loraio command line in the README, as words."""
    lines = "\n".join(blocks("console") + blocks("bash")).replace("\\\n", " ").splitlines()
    found = [line.removeprefix("$ ").split(" | ")[0].split(" > ")[0] for line in lines]
    return [shlex.split(line, comments=True) for line in found if line.startswith("loraio ")]


def test_the_readme_has_command_lines_and_python() -> None:
    assert len(commands()) >= 7
    assert blocks("python")


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_line_of_the_readme_parses(words: list[str]) -> None:
    context = main.make_context("loraio", words[1:], resilient_parsing=False)
    name, command, rest = main.resolve_command(context, [*context._protected_args, *context.args])
    assert command is not None, name
    command.make_context(name, rest, parent=context)


def test_every_command_has_an_entry_in_the_readme() -> None:
    for name in main.commands:
        assert f"`loraio {name}" in README, name


def test_every_exported_name_is_in_the_readme() -> None:
    for name in loraio.__all__:
        if name != "__version__":
            assert re.search(rf"\b{name}\b", README), name


def test_every_relative_link_of_the_readme_leads_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link


def test_every_guarantee_names_a_test_that_exists() -> None:
    names = re.findall(r"`(test_[a-z0-9_]+)`", README)
    assert names
    source = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    for name in names:
        assert f"def {name}(" in source, name


def test_the_python_of_the_readme_runs(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the small test base in the place of the shipped files."""
    monkeypatch.chdir(tmp_path)
    names = {"base": "base", "digit-3": "three", "digit-7": "seven"}
    (tmp_path / "adapters").mkdir()
    for shipped, small in names.items():
        (tmp_path / f"adapters/{shipped}.safetensors").write_bytes((files / f"{small}.safetensors").read_bytes())
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})


def dialect_table() -> str:
    """What each dialect holds: its layer types that fare alike in one row."""
    layers = [*LAYER_TYPES, *(f"{name}, grouped" for name, layer in LAYER_TYPES.items() if layer.grouped)]
    rows = {("`native`", *("read, write" for _ in KINDS)): [*LAYER_TYPES, "all of them grouped"]}
    for name, dialect in DIALECTS.items():
        for layer in layers:
            plain, _, grouped = layer.partition(", ")
            reasons = (dialect.refusal(plain, kind, grouped=bool(grouped)) for kind in sorted(KINDS))
            cells = ("read, write" if reason is None else f"refused: {reason}" for reason in reasons)
            rows.setdefault((f"`{name}`", *cells), []).append(layer)
    head = ["dialect", "layers", *sorted(KINDS)]
    lines = [head, ["---"] * len(head), *([name, "; ".join(held), *cells] for (name, *cells), held in rows.items())]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def test_the_table_of_dialects_says_what_they_hold() -> None:
    found = README.partition("<!-- dialects -->\n")[2].partition("<!-- /dialects -->")[0]
    assert found == dialect_table(), f"the table in README.md should be\n{dialect_table()}"


def test_every_option_of_the_command_line_has_help() -> None:
    for name, command in main.commands.items():
        assert command.help, name
        assert "loraio " + name in (command.epilog or ""), name
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name} {parameter.name}"


def test_the_specification_and_the_schema_name_the_keys_of_the_reader() -> None:
    target = SCHEMA["$defs"]["target"]
    assert set(target["required"]) == set(_TARGET_KEYS) - set(_COMMON)
    assert set(SCHEMA["properties"]["common"]["properties"]) == set(_COMMON)
    assert set(target["properties"]) == {*_TARGET_KEYS, *_TARGET_OPTIONS}
    assert set(SCHEMA["properties"]["base"]["properties"]) == {*_BASE_KEYS, *_BASE_OPTIONS}
    assert set(SCHEMA["required"]) == {*_DOCUMENT_KEYS, integrity.KEY}
    assert set(SCHEMA["properties"]) == {*_DOCUMENT_KEYS, *_DOCUMENT_OPTIONS, integrity.KEY}
    whole = SCHEMA["$defs"]["whole"]
    assert set(whole["required"]) == set(_WHOLE_KEYS)
    assert set(whole["properties"]) == {*_WHOLE_KEYS, *_WHOLE_OPTIONS}
    assert set(whole["properties"]["role"]["enum"]) == set(data.ROLES)
    assert set(whole["properties"]["dtype"]["enum"]) == set(data.WHOLE_DTYPES)
    assert set(SCHEMA["properties"]["base"]["required"]) == set(_BASE_KEYS)
    assert set(target["properties"]["kind"]["enum"]) == set(loraio.adapter.kinds.KINDS)
    assert set(target["properties"]["layer"]["enum"]) == set(loraio.adapter.layers.LAYER_TYPES)
    assert set(target["properties"]["dtype"]["enum"]) == set(data.FLOAT_DTYPES)
    assert set(target["properties"]["scale_rule"]["enum"]) == set(data.SCALE_RULES)
    keys = {*_TARGET_KEYS, *_TARGET_OPTIONS, *_DOCUMENT_KEYS, *_BASE_KEYS, *_BASE_OPTIONS, METADATA_KEY}
    for key in keys | {*_DOCUMENT_OPTIONS, *_WHOLE_KEYS, *_WHOLE_OPTIONS}:
        assert f"`{key}`" in SPEC, key


def test_what_is_written_satisfies_the_schema(three: loraio.Adapter, seven: loraio.Adapter, tmp_path: Path) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for adapter in (three, seven):
        loraio.save(adapter, tmp_path / "file", overwrite=True)
        text = tensorfile.read_header(tmp_path / "file").metadata[METADATA_KEY]
        jsonschema.validate(json.loads(text), SCHEMA)


def test_the_change_log_has_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert text.index("## Unreleased") < text.index(f"## {loraio.__version__}")


def test_ci_runs_the_test_script_and_nothing_else() -> None:
    lines = [line for line in (ROOT / ".ci/run").read_text().splitlines() if line and not line.startswith("#")]
    assert lines == ['exec "$(dirname "${BASH_SOURCE[0]}")/../scripts/test" "$@"']
    scripts = ("test", "quickstart", "environment", "train_adapters")
    for script in (".ci/run", *(f"scripts/{name}" for name in scripts)):
        assert (ROOT / script).stat().st_mode & 0o111, script
        subprocess.run(["bash", "-n", ROOT / script], check=True)

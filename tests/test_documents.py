"""Compare the documents with the program: blocks, links, tables, the specification, and the site."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import loraio
from loraio.adapter import metadata as data
from loraio.adapter.kinds import KINDS
from loraio.adapter.layers import LAYER_TYPES
from loraio.cli import main
from loraio.files import integrity, tensorfile
from loraio.files.tensorfile import METADATA_KEY
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
README, DOCS = ROOT / "README.md", ROOT / "loraio/docs"
SPEC = (DOCS / "format.md").read_text()
SCHEMA = json.loads((ROOT / "loraio/formats/native.schema.json").read_text())
TABLES = runpy.run_path(str(ROOT / "scripts/docs_tables.py"))
PAGES = [README, ROOT / "adapters/README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(block: str) -> Iterator[tuple[list[str], str]]:
    """Give the words and the printed output of each loraio command in a console block."""
    for part in block.replace("\\\n", " ").split("$ ")[1:]:
        line, _, output = part.partition("\n")
        if line.startswith("loraio "):
            yield shlex.split(line), output


COMMANDS = [words for page in PAGES for block in blocks(page, "console") for words, _ in commands(block)]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_line_of_the_documents_parses(words: list[str]) -> None:
    context = main.make_context("loraio", words[1:], resilient_parsing=False)
    name, command, rest = main.resolve_command(context, [*context._protected_args, *context.args])
    assert command is not None, name
    command.make_context(name, rest, parent=context)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_the_python_of_the_documents_runs(
    page: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run each block in a folder where the small test base stands for the shipped files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapters").mkdir()
    shipped = {"base": "base", "digit-1": "three", "digit-8": "seven", "../base": "base", "../one": "three"}
    for name, small in shipped.items():
        (tmp_path / f"adapters/{name}.safetensors").write_bytes((files / f"{small}.safetensors").read_bytes())
    for block in blocks(page, "python"):
        if page == README:  # the other pages' blocks may use what is there
            (tmp_path / "one.safetensors").unlink(missing_ok=True)
        exec(compile(block, page.name, "exec"), {})


def masked(text: str) -> list[str]:
    """Return the lines of an output without numbers and spaces: another processor ends in other last bits."""
    lines = (re.sub(r"[\d,.]*\d[\d.,]*(e[+-]\d+)?|[\s─]+", " ", line).strip() for line in text.splitlines())
    return [re.sub(" +", " ", line) for line in lines if line.strip(" -")]


@pytest.mark.slow
def test_the_minute_in_the_readme_prints_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words, output in commands(blocks(README, "console")[0]):
        done = CliRunner().invoke(main, words[1:])
        assert done.exit_code == 0, done.output
        assert masked(done.stdout) == masked(output), words


@pytest.mark.slow
def test_the_photos_in_the_readme_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        for number, name in enumerate(("cat", "dog", "owl")):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for copy in range(2):
                image = Image.effect_noise((64, 64), 40 + 60 * number + copy)
                image.convert("RGB").save(f"photos/{split}/{name}/{copy}.png")
    torch.save(loraio.build_network("torchvision:resnet18").state_dict(), "resnet18.pth")
    for words, _ in commands(blocks(README, "console")[1]):
        more = ["--steps", "2", "--workers", "0"] if words[1] == "train" else []
        done = CliRunner().invoke(main, [*words[1:], *more])
        assert done.exit_code == 0, (words, done.output)


def test_the_readme_is_read_in_three_minutes() -> None:
    assert len(README.read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", sorted(set(DOCS.glob("*.md")) - {DOCS / "description.md"}), ids=lambda page: page.name)
def test_every_page_begins_with_its_question(page: Path) -> None:
    title, _, question, *_ = page.read_text().splitlines()
    assert title.startswith("# ")
    assert question.endswith("?")
    assert page == DOCS / "index.md" or f"({page.name})" in (DOCS / "index.md").read_text()


@every_page
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)|srcset=\"([^\"]+)\"|src=\"([^\"]+)\"", page.read_text()):
        assert (page.parent / "".join(link)).exists(), link


def test_the_description_of_the_wheel_is_short_and_links_nowhere() -> None:
    found = re.search(r'^readme = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found is not None
    text = (ROOT / found[1]).read_text()
    assert len(text) < 6_000
    assert "](" not in text
    assert "http" not in text


@pytest.mark.parametrize("name", [name for name in TABLES["TABLES"] if name != "keys"])
def test_a_generated_table_is_current(name: str) -> None:
    made = {name: TABLES["TABLES"][name]()}
    marked = [page for page in TABLES["PAGES"] if f"<!-- {name} -->" in page.read_text()]
    assert marked
    for page in marked:
        assert TABLES["filled"](page.read_text(), made) == page.read_text(), f"scripts/docs --tables {name}"


@pytest.mark.slow
def test_the_table_of_json_keys_is_current() -> None:
    test_a_generated_table_is_current("keys")


def test_the_table_of_names_has_every_public_name() -> None:
    names = [name for found in TABLES["NAMES"].values() for name in found]
    assert sorted([*names, "__version__"]) == sorted(loraio.__all__)


def test_every_guarantee_names_a_test_that_exists() -> None:
    text = (DOCS / "guarantees.md").read_text()
    names = re.findall(r"`(test_[a-z0-9_]+|Test\w+)`", text)
    source = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    assert names
    assert [name for name in names if f"def {name}(" not in source and f"\n{name} = " not in source] == []
    rows = [row for row in text.splitlines() if row.startswith("| ") and "promise" not in row]
    assert [row for row in rows if "`test_" not in row and "`Test" not in row] == []


def paths_in(text: str) -> set[str]:
    """Return the paths of this repository that a text names in code."""
    return set(re.findall(r"[` ]((?:scripts|tests|loraio)/[\w./-]*\w)[` ]", text))


@every_page
def test_every_path_in_a_document_exists(page: Path) -> None:
    if page.name == "CHANGELOG.md":  # history
        return
    missing = [
        path
        for path in paths_in(page.read_text())
        if not re.search("NAME|COMMAND", path) and not (ROOT / path).exists()
    ]
    assert missing == []


def test_every_option_of_the_command_line_has_help() -> None:
    for name, command in main.commands.items():
        assert command.help, name
        assert "loraio " + name in (command.epilog or ""), name
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name} {parameter.name}"


def test_the_specification_and_the_schema_name_the_keys_of_the_reader() -> None:
    properties, definitions = SCHEMA["properties"], SCHEMA["$defs"]
    target, whole, base = definitions["target"], definitions["whole"], properties["base"]
    assert set(target["required"]) == set(_TARGET_KEYS) - set(_COMMON)
    assert set(properties["common"]["properties"]) == set(_COMMON)
    assert set(target["properties"]) == {*_TARGET_KEYS, *_TARGET_OPTIONS}
    assert set(base["properties"]) == {*_BASE_KEYS, *_BASE_OPTIONS}
    assert set(base["required"]) == set(_BASE_KEYS)
    assert set(SCHEMA["required"]) == {*_DOCUMENT_KEYS, integrity.KEY}
    assert set(properties) == {*_DOCUMENT_KEYS, *_DOCUMENT_OPTIONS, integrity.KEY}
    assert set(whole["required"]) == set(_WHOLE_KEYS)
    assert set(whole["properties"]) == {*_WHOLE_KEYS, *_WHOLE_OPTIONS}
    choices: dict[tuple[str, str], Any] = {
        ("whole", "role"): data.ROLES,
        ("whole", "dtype"): data.WHOLE_DTYPES,
        ("target", "kind"): KINDS,
        ("target", "layer"): LAYER_TYPES,
        ("target", "dtype"): data.FLOAT_DTYPES,
        ("target", "scale_rule"): data.SCALE_RULES,
    }
    for (kind, key), values in choices.items():
        assert set(definitions[kind]["properties"][key]["enum"]) == set(values), (kind, key)
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


@pytest.mark.parametrize("name", [".ci/run", *(f"scripts/{name}" for name in ("docs", "environment", "quickstart"))])
def test_a_script_can_be_run(name: str) -> None:
    assert (ROOT / name).stat().st_mode & 0o111
    subprocess.run(["bash", "-n", ROOT / name], check=True)


def test_the_picture_is_what_its_script_draws() -> None:
    picture = runpy.run_path(str(ROOT / "scripts/docs_picture.py"))
    for name, colours in picture["PALETTES"].items():
        assert (DOCS / f"idea-{name}.svg").read_text() == picture["drawn"](colours)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    words = ["build", "--strict", "--config-file", "scripts/mkdocs.yml", "--site-dir", str(tmp_path / "site")]
    subprocess.run([sys.executable, "-m", "mkdocs", *words], cwd=ROOT, check=True)
    assert (tmp_path / "site/reference.html").stat().st_size > 100_000

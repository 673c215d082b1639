"""Write the generated tables into README.md and loraio/docs, between their markers.

usage: python scripts/docs_tables.py [NAME ...]

A table NAME stands between `<!-- NAME -->` and `<!-- /NAME -->`. Without names all are written. `keys` runs every
command once on small files, which takes some seconds.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from click.testing import CliRunner

from loraio.adapter.kinds import KINDS
from loraio.adapter.layers import LAYER_TYPES
from loraio.cli import main
from loraio.formats.dialects import DIALECTS

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "loraio/docs").glob("*.md")))
MARKED = re.compile(r"<!-- (\w+) -->\n(.*?)<!-- /\1 -->\n", re.DOTALL)

NAMES = {
    "Adapters": ("Adapter", "Target", "WholeTensor", "BaseReference", "load", "save"),
    "Bases": ("build_network", "load_base", "read_base", "save_base", "BaseCheckpoint"),
    "A live model": ("attach", "Attachment", "attachment_of", "adapter_from", "base_state_dict"),
    "Many adapters": ("Bank", "pack", "unpack"),
    "Merging": ("merge", "merge_file", "MergedFile", "unmerge_file", "UnmergedFile", "receipt", "Receipt",
                "merge_effect", "MergeEffect"),
    "Proof": ("verify", "verify_weights", "Report", "WeightReport", "OutputReport", "check", "Checked"),
    "Other tools and runtimes": ("convert", "Conversion", "export", "Exported", "ExportedOutput"),
    "Training": ("train", "train_each", "TrainConfig", "RunFiles", "plan_targets", "plan_whole", "new_adapter",
                 "parameter_report", "pretrain", "PretrainConfig", "Progress"),
    "Data and results": ("load_dataset", "Dataset", "image_form", "ImageForm", "read_image", "predict", "evaluate",
                         "evaluate_each", "Evaluation"),
    "Errors": ("LoraioError",),
}  # fmt: skip
"""Every public name, by purpose."""

RECORDS = ("base", "parameters", "test", "before", "after", "total", "landing", "residue", "weights", "outputs")
"""Keys whose object has fixed keys; other objects go by names of tensors, adapters or options."""


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    lines = [list(head)]
    lines += [["---"] * len(lines[0]), *(list(row) for row in rows)]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def usage(name: str, command: click.Command) -> str:
    """Return a command with its required arguments and output."""
    words = [f"loraio {name}"]
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            word = parameter.metavar or str(parameter.name).upper()
            word += "..." if parameter.nargs == -1 and not word.endswith("...") else ""
            words.append(word if parameter.required else f"[{word}]")
        elif parameter.required:
            words.append(f"{parameter.opts[0]} {value_name(parameter)}")
    return " ".join(words)


def value_name(parameter: click.Parameter) -> str:
    """Return the word for an option's value in its help."""
    if isinstance(parameter.type, click.Choice):
        return "|".join(parameter.type.choices)
    if parameter.metavar:
        return parameter.metavar
    return {"path": "PATH", "integer range": "N", "number": "X"}.get(parameter.type.name, parameter.type.name.upper())


def commands() -> str:
    """Return the table of commands: usage, and the first sentence of the help."""
    return table(
        ("command", "does"),
        ((f"`{usage(name, command)}`", sentence(command.help or "")) for name, command in main.commands.items()),
    )


def sentence(text: str) -> str:
    """Return the first sentence of a docstring, on one line."""
    return re.split(r"(?<=\.)\s", text.strip(), maxsplit=1)[0].replace("\n", " ")


def options() -> str:
    """Return a section for each command: its help and its options."""
    sections = []
    for name, command in main.commands.items():
        paragraphs = [" ".join(part.split()) for part in (command.help or "").replace("\b", "").split("\n\n")]
        rows = []
        for option in command.params:
            if isinstance(option, click.Option):
                value = "" if option.is_flag else f" {value_name(option)}"
                plain = isinstance(option.default, str | int | float) and option.default is not False
                shown = f" Default: `{option.default}`." if plain else ""
                rows.append((f"`{', '.join(option.opts)}{value}`", f"{option.help}{shown}"))
        sections.append(
            f"### loraio {name}\n\n" + "\n\n".join(paragraphs) + "\n\n" + table(("option", "meaning"), rows)
        )
    return "\n".join(sections)


def key_tree(found: Mapping[str, Any]) -> str:
    """Return the keys of a JSON object, with those of nested records in parentheses."""
    cells = []
    for key, value in found.items():
        inner = ""
        if isinstance(value, list) and value and isinstance(value[0], dict):
            inner = f" (list: {', '.join(f'`{each}`' for each in value[0])})"
        elif isinstance(value, dict) and key in RECORDS:
            inner = f" ({', '.join(f'`{each}`' for each in value)})"
        elif isinstance(value, dict) and value and isinstance(next(iter(value.values())), dict):
            inner = f" (by name: {', '.join(f'`{each}`' for each in next(iter(value.values())))})"
        if key != "schema":
            cells.append(f"`{key}`{inner}")
    return ", ".join(cells)


def keys() -> str:
    """Return the table of JSON keys: run every command on small files and read what it prints."""
    with tempfile.TemporaryDirectory() as folder:
        return table(("command", "keys of `--json`"), ((name, key_tree(found)) for name, found in runs(Path(folder))))


def runs(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run each command with --json; give its name and the object it prints."""
    shipped = ROOT / "adapters"
    base, one, eight = (shipped / f"{name}.safetensors" for name in ("base", "digit-1", "digit-8"))
    own, merged, image = (folder / name for name in ("own.safetensors", "merged.safetensors", "image.png"))
    from PIL import Image

    Image.radial_gradient("L").save(image)
    lines: dict[str, tuple[Any, ...]] = {
        "pretrain": ("-o", own, "--dataset", "digits"),
        "targets": (base,),
        "train": (base, "--digit", 1, "-o", folder / "one.safetensors", "--dataset", "digits", "--steps", 3),
        "evaluate": (base, "--adapter", one, "--dataset", "digits"),
        "predict": (base, image, "--adapter", one),
        "pack": (one, eight, "-o", folder / "all.pack"),
        "unpack": (folder / "all.pack", "-o", folder / "unpacked"),
        "check": (one,),
        "convert": (one, "-o", folder / "peft", "--to", "peft"),
        "merge": (base, one, "-o", merged, "--reversible"),
        "unmerge": (merged, "--base", base, "-o", folder / "again.safetensors"),
        "verify": (base, one, merged),
        "export": (merged, "-o", folder / "net.pt2"),
    }
    found = {name: run(name, *words) for name, words in lines.items()}
    inspected = {"adapter": one, "base": merged, "pack": folder / "all.pack", "residue": f"{merged}.residue"}
    for name in main.commands:
        if name == "inspect":
            for kind, file in inspected.items():
                yield f"`inspect`, {kind}", run("inspect", file)
        else:
            yield f"`{name}`", found[name]


def run(*words: Any) -> dict[str, Any]:
    """Run one command line with --json and return the object on stdout."""
    done = CliRunner().invoke(main, [*map(str, words), "--json"])
    if done.exit_code:
        raise SystemExit(f"loraio {' '.join(map(str, words))}: {done.output}")
    parsed: dict[str, Any] = json.loads(done.stdout)
    return parsed


def names() -> str:
    """Return the table of public names, by purpose."""
    return table(("for", "names"), ((use, ", ".join(f"`{name}`" for name in found)) for use, found in NAMES.items()))


def reference() -> str:
    """Return a mkdocstrings directive for each public name, by purpose."""
    uses = ((use, found) for use, found in NAMES.items() if use != "Errors")
    return "\n".join(f"## {use}\n\n" + "\n".join(f"::: loraio.{name}\n" for name in found) for use, found in uses)


def layers() -> list[tuple[str, str, bool]]:
    """Return each layer type, and again with groups where it can have them: label, name, grouped."""
    plain = [(name, name, False) for name in LAYER_TYPES]
    return plain + [(f"{name}, grouped", name, True) for name, layer in LAYER_TYPES.items() if layer.grouped]


def dialects() -> str:
    """Return the table of layer types and dialects: the adapter kinds that each dialect holds."""
    rows = []
    for label, name, grouped in layers():
        held = [
            ", ".join(kind for kind in sorted(KINDS) if dialect.refusal(name, kind, grouped=grouped) is None) or "-"
            for dialect in DIALECTS.values()
        ]
        rows.append((label, ", ".join(sorted(KINDS)), *held))
    return table(("layer", "`native`", *(f"`{name}`" for name in DIALECTS)), rows)


def refusals() -> str:
    """Return a list of each dialect's reasons to refuse, with the layers and kinds that they concern."""
    lines = []
    for name, dialect in DIALECTS.items():
        reasons: dict[str, dict[str, list[str]]] = {}
        for label, layer, grouped in layers():
            for kind in sorted(KINDS):
                reason = dialect.refusal(layer, kind, grouped=grouped)
                if reason is not None:
                    reasons.setdefault(reason, {}).setdefault(label, []).append(kind)
        for reason, concerned in reasons.items():
            only = {tuple(kinds) for kinds in concerned.values()}
            kinds = only.pop() if len(only) == 1 else ()
            note = f" ({', '.join(kinds)})" if 0 < len(kinds) < len(KINDS) else ""
            lines.append(f"- `{name}`: {reason}: {'; '.join(concerned)}{note}\n")
    return "".join(lines)


def figures() -> str:
    """Return the table of benchmark figures, from results.json."""
    sys.path.insert(0, str(ROOT / "scripts/bench"))
    try:
        suite = runpy.run_path(str(ROOT / "scripts/bench/suite.py"))
    finally:
        sys.path.pop(0)
    text: str = suite["markdown"](suite["read"](ROOT / "scripts/bench/results/results.json"))
    return text + "\n"


TABLES: dict[str, Callable[[], str]] = {
    made.__name__: made for made in (commands, keys, options, names, reference, dialects, refusals, figures)
}


def filled(text: str, made: Mapping[str, str]) -> str:
    """Return a page with the given tables between their markers; other tables stay."""

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        inside = f"\n{made[name]}\n" if name in made else match[2]
        return f"<!-- {name} -->\n{inside}<!-- /{name} -->\n"

    return MARKED.sub(fill, text)


if __name__ == "__main__":
    unknown = set(sys.argv[1:]) - set(TABLES)
    if unknown:
        sys.exit(f"{__doc__}\ntables: {', '.join(TABLES)}")
    tables = {name: TABLES[name]() for name in sys.argv[1:] or TABLES}
    for page in PAGES:
        before = page.read_text()
        after = filled(before, tables)
        if after != before:
            page.write_text(after)
            print(page.relative_to(ROOT))

"""Hold the package to its map: imports go down only, foreign packages stay in their rooms, files stay short.

    python tests/test_imports.py [PACKAGE_FOLDER]

prints the rooms of a package, the arrows between them and those that climb. A checkout with a map of its own in
``tests/test_imports.py`` beside the package is measured by that map.
"""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "loraio"

LINES = [
    {"__main__"},
    {"cli"},
    {"__init__"},
    {"training", "serving", "merging", "exporting"},
    {"formats", "live"},
    {"bases"},
    {"adapter"},
    {"files"},
    {"registry"},
    {"errors", "version"},
]
"""From the top down; rooms of one line do not import each other."""

ASIDE: dict[tuple[str, str], str] = {}
"""Imports between rooms of one line, by module and imported module, each with its reason."""

FOREIGN = {
    "click": {"cli"},
    "rich": {"cli"},
    "safetensors": {"files"},
    "onnx": {"exporting"},
    "onnxruntime": {"exporting"},
    "onnxscript": {"exporting"},
    "threadpoolctl": {"merging"},
    "timm": {"bases"},
    "torchvision": {"bases", "training"},
    "sklearn": {"training"},
    "PIL": {"training"},
}
"""Foreign packages and the rooms that may import them."""

MOST_ROOMS, MOST_ARROWS, MOST_LINES = 16, 75, 450

Arrows = dict[tuple[str, str], set[str]]
"""By room and imported room: the imports, as "module -> name"."""


@functools.cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def python_files(*folders: str) -> Iterator[tuple[str, Path]]:
    """Yield name and path of all Python files of these folders, scripts without a suffix included."""
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix == ".py" or (file.is_file() and file.read_bytes().startswith(b"#!/usr/bin/env python")):
                yield str(file.relative_to(ROOT)), file


def module_of(file: Path, package: Path) -> str:
    """Return the dotted name of a module inside the package."""
    return ".".join(file.relative_to(package).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    """Return the room of a module: the folder "files" for all that is in it, "errors" for a module at the top."""
    return module.split(".")[0]


def imports_of(file: Path) -> Iterator[str]:
    """Yield the dotted names of all imports, also inside functions and for type checking."""
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def arrows_of(package: Path) -> Arrows:
    """Return the imports between rooms; a name that the package itself has is an import of its ``__init__``."""
    found: Arrows = defaultdict(set)
    for file in sorted(package.rglob("*.py")):
        module = module_of(file, package)
        for name in imports_of(file):
            first, _, rest = name.partition(".")
            if first == package.name:
                room = room_of(rest) if room_of(rest) in rooms_of(package) else "__init__"
                if room != room_of(module):
                    found[room_of(module), room].add(f"{module} -> {rest or first}")
    return found


def climbs_of(arrows: Arrows, lines: list[set[str]]) -> list[str]:
    """Return the imports that do not go down the map, but for those that `ASIDE` allows."""
    depth = {"__init__": 1.5} | {  # older maps leave it out: below the command line
        room: number for number, line in enumerate(lines) for room in line
    }
    return [
        each
        for (room, other), imports in arrows.items()
        for each in sorted(imports)
        if depth[other] <= depth[room] and tuple(each.split(" -> ")) not in ASIDE
    ]


@functools.cache
def rooms_of(package: Path) -> set[str]:
    return {room_of(module_of(file, package)) for file in package.rglob("*.py")}


def map_of(package: Path) -> list[set[str]]:
    """Return the map beside a package in another checkout, else this one."""
    theirs = package.parent / "tests/test_imports.py"
    for node in parsed(theirs).body if theirs.exists() else []:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LINES":
            lines: list[set[str]] = ast.literal_eval(node.value)
            return lines
    return LINES


def circles_of(arrows: Arrows) -> set[str]:
    """Return the rooms that import themselves by way of others."""
    below: dict[str, set[str]] = defaultdict(set)
    for room, other in arrows:
        below[room].add(other)
    while any(grown := {room for room, others in below.items() for each in others if below.get(each, set()) - others}):
        for room in grown:
            below[room] |= set().union(*(below.get(each, set()) for each in below[room]))
    return {room for room, others in below.items() if room in others}


def test_the_map_names_every_room() -> None:
    assert rooms_of(PACKAGE) <= set.union(*LINES)
    assert len(rooms_of(PACKAGE)) <= MOST_ROOMS


def test_imports_go_down_only_and_are_few() -> None:
    arrows = arrows_of(PACKAGE)
    assert climbs_of(arrows, LINES) == []
    assert circles_of(arrows) == set()
    assert len(arrows) <= MOST_ARROWS
    every = set().union(*arrows.values())
    assert {" -> ".join(pair) for pair in ASIDE} <= every


def test_a_circle_is_found() -> None:
    names = [("a", "b"), ("b", "c"), ("c", "b"), ("c", "d")]
    assert circles_of({pair: set() for pair in names}) == {"b", "c"}


def test_foreign_packages_stay_in_their_rooms() -> None:
    for file in PACKAGE.rglob("*.py"):
        for name in imports_of(file):
            allowed = FOREIGN.get(name.split(".")[0])
            room = room_of(module_of(file, PACKAGE))
            assert allowed is None or room in allowed, f"{file} imports {name}"


def test_no_file_is_too_long() -> None:
    lengths = {name: len(file.read_text().splitlines()) for name, file in python_files("loraio", "tests", "scripts")}
    assert not {name: length for name, length in lengths.items() if length > MOST_LINES}


def test_no_docstring_begins_with_what_or_whether() -> None:
    found = []
    for name, file in python_files("loraio", "tests", "scripts"):
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
                text = ast.get_docstring(node) or ""
                if text.startswith(("What", "Whether")):
                    found.append(f"{name}: {text.splitlines()[0]}")
    assert found == []


def test_sub_packages_hold_one_docstring() -> None:
    """So that commands without torch start without it; ``adapter`` names its data classes, two are registries."""
    full = {PACKAGE / name for name in ("adapter", "adapter/kinds", "cli")}
    for file in PACKAGE.glob("*/**/__init__.py"):
        assert file.parent in full or [type(node) for node in parsed(file).body] == [ast.Expr], file


def test_the_lazy_names_are_the_exported_ones() -> None:
    import loraio

    typed = {name for name in imports_of(PACKAGE / "__init__.py") if name.startswith("loraio.")}
    assert typed == {"loraio.version.__version__", *(f"loraio.{module}.{n}" for n, module in loraio._MODULES.items())}
    for name in loraio.__all__:
        assert getattr(loraio, name) is not None


def test_functions_stay_callable_after_every_submodule_is_imported() -> None:
    import loraio

    for file in PACKAGE.rglob("*.py"):
        if file.stem not in ("__main__", "__init__"):
            __import__(f"loraio.{module_of(file, PACKAGE)}")
    for name in ("attach", "evaluate", "export", "load", "merge", "predict", "pretrain", "save", "train", "verify"):
        assert callable(getattr(loraio, name)), name


def test_an_unknown_name_is_an_attribute_error() -> None:
    import loraio

    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = loraio.nonsense


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, loraio, loraio.cli, loraio.formats; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def main() -> None:
    """Print the map of a package: its rooms, the arrows between them, and the imports that climb."""
    package = Path(sys.argv[1] if len(sys.argv) > 1 else PACKAGE).resolve()
    arrows = arrows_of(package)
    climbs = climbs_of(arrows, map_of(package))
    lengths = sorted(len(file.read_text().splitlines()) for file in package.rglob("*.py"))
    print(f"{package}: {len(rooms_of(package))} rooms, {len(arrows)} arrows between them, {len(climbs)} imports climb")
    print(f"{len(lengths)} files, {sum(lengths)} lines, median {lengths[len(lengths) // 2]}, longest {lengths[-1]}")
    for room in sorted(rooms_of(package)):
        print(f"  {room:<12} {', '.join(sorted(other for each, other in arrows if each == room))}")
    for climb in climbs:
        print(f"  climbs: {climb}")


if __name__ == "__main__":
    main()

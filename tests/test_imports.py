"""The map of rooms: imports go down it only, and foreign packages are used in their own rooms only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import loraio

PACKAGE = Path(loraio.__file__).parent

LINES = [
    {"__main__"},
    {"cli"},
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
"""Imports between rooms of one line, each with its reason."""

ROOMS = {
    "click": {"cli"},
    "rich": {"cli"},
    "safetensors": set(),
    "onnx": {"exporting"},
    "onnxruntime": {"exporting"},
    "onnxscript": {"exporting"},
    "timm": {"bases"},
    "torchvision": {"bases", "training"},
    "sklearn": {"training"},
    "PIL": {"training"},
}
"""Foreign packages and the rooms that may import them."""

FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(file: Path) -> str:
    """Return the room of a file: "files" for everything in that folder, "errors" for a module at the top."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(file: Path) -> set[str]:
    """Dotted names of all imports, wherever they stand, those for type checking only included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def line_of(room: str) -> int:
    return next(number for number, line in enumerate(LINES) if room in line)


def test_the_map_names_every_room() -> None:
    assert {room_of(file) for file in FILES} - {"__init__"} == set.union(*LINES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_down_only(file: Path) -> None:
    room = room_of(file)
    if room == "__init__":  # the package itself names everything, lazily
        return
    module = ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
    for name in imports_of(file):
        parts = name.split(".")
        if parts[0] != "loraio" or len(parts) < 2 or parts[1] == room or parts[1] in loraio.__all__:
            continue
        if (module, ".".join(parts[1:3])) not in ASIDE:
            assert line_of(parts[1]) > line_of(room), f"{module} imports {name}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_foreign_packages_stay_in_their_rooms(file: Path) -> None:
    for name in imports_of(file):
        allowed = ROOMS.get(name.split(".")[0])
        assert allowed is None or room_of(file) in allowed, f"{file.name} imports {name}"


def test_the_lazy_names_are_the_exported_ones() -> None:
    assert loraio.__all__ == sorted(loraio.__all__)
    assert set(loraio.__all__) == {*loraio._MODULES, "__version__"}
    for name in loraio.__all__:
        assert getattr(loraio, name) is not None


def test_functions_stay_callable_after_every_submodule_is_imported() -> None:
    for file in FILES:
        if file.stem not in ("__main__", "__init__"):
            __import__(".".join(("loraio", *file.relative_to(PACKAGE).with_suffix("").parts)))
    for name in ("attach", "evaluate", "export", "load", "merge", "predict", "pretrain", "save", "train", "verify"):
        assert callable(getattr(loraio, name)), name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = loraio.nonsense


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, loraio, loraio.cli, loraio.formats; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Mutation testing: which mutants there are, how one takes the place of the code, and what is argued."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]

SOURCE = '''"""A module."""

from dataclasses import dataclass

LIMIT = 3


@dataclass(frozen=True)
class Pair:
    a: int
    b: int = 4

    @property
    def larger(self) -> bool:
        return self.a > LIMIT


def refuse(name: str, *, quietly: bool = False) -> str:
    """Says no."""
    if len(name) > 1 and not quietly:
        raise ValueError("too long a name")
    return name
'''


@pytest.fixture
def mutation(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("mutation")


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`SOURCE` as a module, from which another has imported all."""
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in (("mutated", SOURCE), ("user", "from mutated import LIMIT, Pair, refuse\n")):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("user")


def test_mutants_are_of_functions_properties_and_constants_but_not_of_prose(mutation: ModuleType) -> None:
    found = {str(mutant) for mutant in mutation.mutants(SOURCE)}
    assert "@@ module @@\n-LIMIT = 3\n+LIMIT = 4" in found
    assert "@@ Pair @@\n-b: int = 4\n+b: int = 5" in found
    assert "@@ Pair.larger @@\n-return self.a > LIMIT\n+return self.a >= LIMIT" in found
    assert '@@ refuse @@\n-raise ValueError("too long a name")\n+raise ValueError(None)' in found
    assert any("quietly: bool = True" in text for text in found)
    assert not any("XX" in text or "frozen=False" in text or "len(None)" in text for text in found)


def test_a_mutant_takes_the_place_of_the_code_wherever_it_was_imported(
    mutation: ModuleType, module: ModuleType
) -> None:
    mutated, pair = sys.modules["mutated"], module.Pair(3)
    assert not pair.larger
    assert pair.b == 4
    for change, seen in [
        ("+LIMIT = 4", lambda: module.LIMIT == 4 and not module.Pair(4).larger),
        ("+return self.a >= LIMIT", lambda: pair.larger),
        ("+b: int = 5", lambda: module.Pair(3).b == 5),
        ("+def refuse(name: str, *, quietly: bool = True) -> str:", lambda: module.refuse("long") == "long"),
    ]:
        (mutant,) = (mutant for mutant in mutation.mutants(SOURCE) if change in mutant.change)
        before = module.refuse, module.Pair
        mutation.exchange(mutated, mutation.load(mutant.source, mutated))
        assert seen(), change
        assert (module.refuse, module.Pair) == before
        mutation.exchange(mutated, mutation.load(SOURCE, mutated))


def test_what_is_argued_is_of_modules_that_are_tested_and_of_lines_that_are_there(mutation: ModuleType) -> None:
    argued = mutation.argued()
    assert {f"loraio/{name}.py" for name in mutation.TESTS} >= set(argued)
    for file, texts in argued.items():
        assert texts
        for text in texts:
            place, *changes = text.splitlines()
            assert place.startswith("@@ ")
            assert place.endswith(" @@")
            assert {line[0] for line in changes} <= {"-", "+"}, (file, text)

"""One lookup for all registries."""

from __future__ import annotations

import pytest

from loraio.errors import UnknownNameError
from loraio.registry import known, lookup, nearest


def test_a_name_gives_its_entry_and_an_unknown_one_the_nearest_and_all_known() -> None:
    registry = {"lora": 1, "dora": 2}
    assert lookup(registry, "dora", what="adapter kind") == 2
    with pytest.raises(UnknownNameError) as caught:
        lookup(registry, "lorra", what="adapter kind")
    assert str(caught.value) == "no adapter kind 'lorra'; did you mean 'lora'? Known: dora, lora"
    assert caught.value.__suppress_context__  # the KeyError says nothing more


@pytest.mark.parametrize(
    ("registry", "name", "message"),
    [
        ({"lora": 1}, "xyz", r"^no entry 'xyz'. Known: lora$"),
        ({}, "mnist", r"^no entry 'mnist'. Known: \(none\)$"),
        ({"Conv2d": 1}, "conv2d", "did you mean 'Conv2d'"),
    ],
)
def test_a_guess_is_made_only_if_a_name_is_near_in_any_case(registry: dict[str, int], name: str, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        lookup(registry, name, what="entry")


def test_nearest_takes_any_iterable_and_may_find_nothing() -> None:
    assert nearest("conv9", iter(["fc", "conv1"])) == "; did you mean 'conv1'?"
    assert nearest("conv9", []) == ""


def test_known_sorts_and_cuts() -> None:
    assert known(["b", "c", "a"]) == "a, b, c"
    assert known("abcde", limit=3) == "a, b, c, and 2 more"
    assert known("abc", limit=3) == "a, b, c"

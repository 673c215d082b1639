"""Patterns of strangers: the answers of `re`, in bounded time."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraio.errors import FormatError
from loraio.formats import patterns
from loraio.formats.patterns import Budget, Pattern, PatternTable

atoms = st.sampled_from(
    [
        *("a", "b", "c", ".", r"\.", "[ab]", "[^a]", "[^\\d_]", r"\w", r"\W", r"\d", r"\D", r"\s", r"\S"),
        *(r"\b", "^", "$", r"\Z", "(?!ab)", "(?=b)", "(?!$)", "(?P<n>a)"),
    ]
)
expressions = st.recursive(
    atoms,
    lambda inner: (
        st.tuples(inner, inner).map("".join)
        | st.tuples(inner, inner).map(lambda pair: f"({pair[0]}|{pair[1]})")
        | st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{2,}", "*?", "+?", "??", "{0}"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        )
    ),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None)
@given(expressions, st.text("ab.c1_ ", min_size=1, max_size=6))
def test_sets_of_places_answer_as_re_does(text: str, name: str) -> None:
    try:
        expected = re.fullmatch(text, name) is not None
    except re.error:
        return
    with pytest.MonkeyPatch.context() as patch:
        assert Pattern(text, Budget()).matches(name) == expected
        patch.setattr(patterns, "_TAME", -1)
        assert Pattern(text, Budget()).matches(name) == expected


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (r"(a+)+$", "a" * 400 + "b"),
        (r"(a|a)*b", "a" * 500),
        (r"(.*)*x", "a." * 250),
        (r".*" * 20 + "x", "a" * 500),
        (r"((a?){50}){50}b", "a" * 500),
        (r"(a?){4000000}b", "a" * 500),
        (r"(?:(?!b).)*" * 3 + "x", "a" * 300),
    ],
)
def test_what_takes_re_for_ever_is_answered(text: str, name: str) -> None:
    assert not Pattern(text, Budget()).matches(name)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("(a", "is no regular expression: missing \\)"),
        ("*", "nothing to repeat"),
        ("(" * 5000 + ")" * 5000, "is no regular expression"),
        ("a{99999999999}", "is no regular expression"),
        ("a" * 20_001, "20,001 characters, at most 20,000"),
    ],
)
def test_what_is_no_pattern_is_refused(text: str, match: str) -> None:
    with pytest.raises(FormatError, match=match):
        Pattern(text, Budget())


@pytest.mark.parametrize("text", [r"((a|b)+)+\1", "(?i)(a+)+b", "(?i:(a+)+)b", r"(?<=a)(a+)+b"])
def test_what_is_endless_and_has_no_other_form_is_refused(text: str) -> None:
    with pytest.raises(FormatError, match="may take very long, and has"):
        Pattern(text, Budget()).matches("a" * 50)


def test_looks_ahead_inside_of_each_other_are_refused_before_they_take_long() -> None:
    text = "(a+)+b"
    for _ in range(4):
        text = rf"(?:(?!.*{text}.*l).+)+.*"
    with pytest.raises(FormatError, match="take too long to match"):
        Pattern(text, Budget()).matches("aml" * 60)


def test_all_patterns_share_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAIO_LIMITS", "pattern_steps=10000")
    budget = Budget()
    found = Pattern("(a+)+b", budget)
    with pytest.raises(FormatError, match=r"take too long to match[\s\S]*LORAIO_LIMITS=pattern_steps"):
        any(found.matches("a" * 300) for _ in range(1000))


def test_a_table_looks_up_the_ends_of_names_as_peft_does() -> None:
    patterns_of = {"conv1": 1, "block.*conv": 2, "layer.0.conv2": 3, r"^fc": 4, "c(onv)?3": 5}
    table = PatternTable(patterns_of, Budget())
    for path in ("conv1", "a.conv1", "aconv1", "block1.conv", "x.block.y.conv", "layerx0.conv2", "layer.0.conv2", "fc"):
        wanted = next((value for key, value in patterns_of.items() if re.match(rf"(.*\.)?({key})$", path)), None)
        assert table.value(path, None) == wanted
    assert table.value("a.fc", None) is None
    assert table.value("b.conv3", None) == 5
    assert PatternTable([1], Budget()).value("a", "other") == "other"

"""Regular expressions of strangers get the answers of `re`, in bounded time, or a refusal."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraio.errors import FormatError
from loraio.formats.patterns import Budget, Pattern, PatternTable

atoms = st.sampled_from(
    [
        *("a", "b", "c", ".", r"\.", "[ab]", "[^a]", "[^\\d_]", r"\w", r"\W", r"\d", r"\D", r"\s", r"\S"),
        *(r"\b", "^", "$", r"\Z", "(?!ab)", "(?=b)", "(?!$)", "(?P<n>a)", "(?i:A)", "(?<=a)"),
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
    max_leaves=8,
)


@settings(max_examples=400, deadline=None)
@given(expressions, st.text("ab.c1_ ", min_size=1, max_size=60))
def test_a_pattern_answers_as_re_does_and_soon_or_is_refused(text: str, name: str) -> None:
    try:
        expression = re.compile(text)
        found = Pattern(text, Budget())
        started = time.process_time()
        answer = found.matches(name)
    except (re.error, FormatError):
        return
    assert time.process_time() - started < 1
    assert answer == (expression.fullmatch(name) is not None)


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        (r"^(?!.*lm_head).*\.(self_attn|mlp)\.(q_proj|down_proj)$", "model.layers.11.self_attn.q_proj", True),
        (r".*layers\.\d+\.(self_attn|mlp)\.(q|k|v|o)_proj", "model.layers.11.mlp.up_proj", False),
        (r"(?:.*?(?:vision|text).*?(?:attn|mlp).*?(?:q_proj|k_proj).*?)", "m.text_model.layers.1.attn.k_proj", True),
        (r"layer[1-4]\.\d+\.conv[12]", "layer3.0.conv2", True),
        (r"(.*\.)?conv1", "layer1.0.conv1", True),
        (r"(ab|cd)+", "abcd" * 50, True),
        (r"(a|b)*c", "ab" * 200, False),
        (r"(?:(?!b).)*" * 3 + "x", "a" * 300, False),
        (r"(?i)(a|B)+", "Ab" * 100, True),
    ],
)
def test_the_patterns_of_real_configurations_are_matched(text: str, name: str, expected: bool) -> None:
    assert Pattern(text, Budget()).matches(name) is expected


@pytest.mark.parametrize(
    "text",
    [
        *(r"(a+)+$", r"(a|a)*b", r"(.*)*x", r"((a?){50}){50}b", r"(a?){4000000}b", r"((a|b)+)+\1", "(?i)(a+)+b"),
        *("(?i:(a+)+)b", r"(?<=a)(a+)+b", r"(?:[a-z_]+\.)*conv", "(?i)(?:kx|\N{KELVIN SIGN}x)*b", ".*" * 20 + "x"),
    ],
)
def test_a_pattern_that_may_take_very_long_is_refused_by_name(text: str) -> None:
    with pytest.raises(FormatError, match=r"may take very long to match[\s\S]*names of the modules as a list"):
        Pattern(text, Budget()).matches("a" * 500)


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
def test_a_text_that_is_no_pattern_is_refused(text: str, match: str) -> None:
    with pytest.raises(FormatError, match=match):
        Pattern(text, Budget())


@pytest.mark.parametrize("text", [".*.*.*x", ".*?a.*?b.*?x", r"(a*)(a*)\1x"])
def test_all_patterns_share_a_budget(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAIO_LIMITS", "pattern_steps=100000")
    budget = Budget()
    found = Pattern(text, budget)
    with pytest.raises(FormatError, match=r"take too long to match[\s\S]*LORAIO_LIMITS=pattern_steps"):
        any(found.matches("a" * 100) for _ in range(1000))


def test_a_table_looks_up_the_ends_of_names_as_peft_does() -> None:
    patterns_of = {"conv1": 1, "block.*conv": 2, "layer.0.conv2": 3, r"^fc": 4, "c(onv)?3": 5}
    table = PatternTable(patterns_of, Budget())
    for path in ("conv1", "a.conv1", "aconv1", "block1.conv", "x.block.y.conv", "layerx0.conv2", "layer.0.conv2", "fc"):
        wanted = next((value for key, value in patterns_of.items() if re.match(rf"(.*\.)?({key})$", path)), None)
        assert table.value(path, None) == wanted
    assert table.value("a.fc", None) is None
    assert table.value("b.conv3", None) == 5
    assert PatternTable([1], Budget()).value("a", "other") == "other"

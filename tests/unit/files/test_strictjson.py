"""Check that JSON of strangers is counted exactly before it is parsed, and refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import json_values

from loraio.errors import FormatError
from loraio.files.strictjson import parse_json, read_json, read_json_text


def depth_of(tree: Any) -> int:
    inside = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else None
    return 0 if inside is None else 1 + max(map(depth_of, inside), default=0)


texts = st.recursive(
    st.text(st.sampled_from('"\\[]{},:a\u00e9😀'), max_size=6) | st.integers(-5, 5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.sampled_from('"\\[{a'), max_size=3), inner),
    max_leaves=12,
)


@given(texts | json_values, st.booleans())
def test_what_json_reads_is_read(tree: Any, ascii_only: bool) -> None:
    assert parse_json(json.dumps(tree, ensure_ascii=ascii_only), where="here") == tree


@given(texts, st.integers(1, 4))
def test_depth_is_counted_outside_of_texts_only(tree: Any, most: int) -> None:
    text = json.dumps(tree)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAIO_LIMITS", f"json_depth={most}")
        if depth_of(tree) <= most:
            assert parse_json(text, where="here") == tree
        else:
            with pytest.raises(FormatError, match=f"nested more than {most} deep"):
                parse_json(text, where="here")


@given(st.lists(texts, min_size=3, max_size=8))
def test_entries_are_counted_outside_of_texts_only(tree: list[Any]) -> None:
    def entries(part: Any) -> int:  # as many as commas and brackets
        inside = list(part.values()) if isinstance(part, dict) else part if isinstance(part, list) else None
        return 0 if inside is None else max(len(inside), 1) + sum(map(entries, inside))

    count = entries(tree)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAIO_LIMITS", f"json_values={count}")
        assert parse_json(json.dumps(tree), where="here") == tree
        patch.setenv("LORAIO_LIMITS", f"json_values={count - 1}")
        with pytest.raises(FormatError, match=f"more than {count - 1:,} entries"):
            parse_json(json.dumps(tree), where="here")


@given(st.lists(st.sampled_from(["\\\\", "\\ud83d", "\\ude00", "a", "\\uD83D", "\\uDE00", "\\u00e9"]), max_size=8))
def test_half_a_character_is_refused_and_a_whole_one_is_not(pieces: list[str]) -> None:
    text = f'"{"".join(pieces)}"'
    try:
        json.loads(text).encode("utf-8")
    except UnicodeEncodeError:
        with pytest.raises(FormatError, match="half a surrogate pair"):
            parse_json(text, where="here")
    else:
        assert parse_json(text, where="here") == json.loads(text)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "the file is empty[^$]*fetch the file again"),
        (b"PK\x03\x04" + b"\0" * 26, "not JSON but a zip archive[^$]*a name that ends in .pt"),
        (b"<html>", "not JSON but an HTML page[^$]*download it again"),
        (b'{"a": "\xff"}', "not UTF-8: 'utf-8' codec can't decode byte 0xff"),
        (b"7 or so", "not JSON but a text that starts with '7 or so'"),
        (b"\xf0\xf1", "not UTF-8"),
        (b'{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        (b'{"a": "1234567890123456789012"}', r"longer than 30 bytes[\s\S]*LORAIO_LIMITS=header_bytes"),
    ],
)
def test_a_json_file_that_is_none_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, match: str
) -> None:
    monkeypatch.setenv("LORAIO_LIMITS", "header_bytes=30")
    path.write_bytes(content)
    with pytest.raises(FormatError, match=match) as caught:
        read_json(path)
    assert repr(str(path)) in str(caught.value)


def test_a_json_file_is_read_with_its_bytes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAIO_LIMITS", "header_bytes=14")
    for content, value in [(b' \n{"a": [1]}\n\n', {"a": [1]}), (b"[1]", [1]), (b'{"\xc3\xa9": 0.5}', {"é": 0.5})]:
        path.write_bytes(content)
        assert read_json_text(path) == (content, value)
        assert read_json(path) == value

"""Limits: their defaults hold unless the environment says another number."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

from loraio.container import read_header, read_json
from loraio.errors import ConfigError, FormatError
from loraio.limits import PREFIX, Limits, limits, raising


def test_without_variables_the_defaults_hold() -> None:
    assert limits() == Limits()


@pytest.mark.parametrize("name", [field.name for field in fields(Limits)])
def test_each_limit_has_a_variable(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PREFIX + name.upper(), "17")
    assert limits() == Limits(**{name: 17})
    assert f"LORAIO_MAX_{name.upper()}=N" in raising(name)


@pytest.mark.parametrize("text", ["", "0", "-1", "1e6", " 5", "٣", "9" * 30, "many"])
def test_what_is_no_number_is_an_error(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAIO_MAX_TENSORS", text)
    with pytest.raises(ConfigError, match=r"LORAIO_MAX_TENSORS is .* not a number of at least 1"):
        limits()


def entries(count: int) -> dict[str, object]:
    return {f"t{number}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for number in range(count)}


@pytest.mark.parametrize(
    ("variable", "match"),
    [
        ("HEADER_BYTES", "the header has [0-9,]+ bytes, at most 10 are read"),
        ("JSON_DEPTH", "nested more than 2 deep"),
        ("JSON_VALUES", "more than 10 entries"),
        ("TENSORS", "20 tensors, at most 10"),
        ("NAME_BYTES", "longer than 2 bytes"),
        ("DIMENSIONS", "has 3 dimensions, at most 2"),
    ],
)
def test_a_limit_is_where_it_says_and_no_further(
    variable: str, match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = entries(20)
    header["t19"] = {"dtype": "U8", "shape": [1, 1, 0], "data_offsets": [0, 0]}
    text = json.dumps(header).encode()
    path = tmp_path / "some.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    values = text.count(b",") + text.count(b"{") + text.count(b"[")
    exact = {"HEADER_BYTES": len(text), "JSON_DEPTH": 3, "JSON_VALUES": values, "TENSORS": 20, "NAME_BYTES": 3}
    monkeypatch.setenv(PREFIX + variable, str(exact.get(variable, 3)))
    assert len(read_header(path).tensors) == 20
    monkeypatch.setenv(PREFIX + variable, str(exact.get(variable, 3) - 1))
    with pytest.raises(FormatError):
        read_header(path)
    monkeypatch.setenv(PREFIX + variable, "2" if variable in ("JSON_DEPTH", "NAME_BYTES", "DIMENSIONS") else "10")
    with pytest.raises(FormatError, match=match) as caught:
        read_header(path)
    assert repr(str(path)) in str(caught.value)
    assert caught.value.hint is not None
    assert PREFIX + variable in caught.value.hint


def test_a_json_file_has_the_limit_of_a_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "some.json"
    path.write_text('{"a": [1]}')
    monkeypatch.setenv("LORAIO_MAX_HEADER_BYTES", "10")
    assert read_json(path) == {"a": [1]}
    path.write_text('{"a": [12]}')
    with pytest.raises(FormatError, match=r"longer than 10 bytes[\s\S]*LORAIO_MAX_HEADER_BYTES") as caught:
        read_json(path)
    assert repr(str(path)) in str(caught.value)

"""Check that the default limits hold unless the environment gives another number."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

from loraio.errors import ConfigError, FormatError
from loraio.files.limits import VARIABLE, Limits, limits, raising
from loraio.files.tensorfile import read_header


@pytest.mark.parametrize("name", [field.name for field in fields(Limits)])
def test_each_limit_can_be_set(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, f"{name}=17")
    assert limits() == Limits(**{name: 17})
    assert f"LORAIO_LIMITS={name}=N" in raising(name)


def test_several_limits_are_set_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "tensors=5,header_bytes=6")
    assert limits() == Limits(tensors=5, header_bytes=6)
    monkeypatch.delenv(VARIABLE)
    assert limits() == Limits()


@pytest.mark.parametrize(
    "text",
    [
        *(f"tensors={number}" for number in ("", "=", "0", "-1", "1e6", " 5", "٣", "9" * 30, "many")),
        *("tensor=5", "tensors=5,", "5", " tensors=5"),
    ],
)
def test_a_limit_without_a_known_name_and_a_number_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, text)
    match = r"LORAIO_LIMITS says .*not a number of at least 1" if text.startswith("tensors=") else "names the limit"
    with pytest.raises(ConfigError, match=match if text != "tensors=5," else "names the limit ''"):
        limits()


def entries(count: int) -> dict[str, object]:
    return {f"t{number}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for number in range(count)}


@pytest.mark.parametrize(
    ("variable", "match"),
    [
        ("header_bytes", "the header has [0-9,]+ bytes, at most 10 are read"),
        ("json_depth", "nested more than 2 deep"),
        ("json_values", "more than 10 entries"),
        ("tensors", "20 tensors, at most 10"),
        ("name_bytes", "longer than 2 bytes"),
        ("dimensions", "has 3 dimensions, at most 2"),
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
    exact = {"header_bytes": len(text), "json_depth": 3, "json_values": values, "tensors": 20, "name_bytes": 3}
    monkeypatch.setenv(VARIABLE, f"{variable}={exact.get(variable, 3)}")
    assert len(read_header(path).tensors) == 20
    monkeypatch.setenv(VARIABLE, f"{variable}={exact.get(variable, 3) - 1}")
    with pytest.raises(FormatError):
        read_header(path)
    monkeypatch.setenv(VARIABLE, f"{variable}={2 if variable in ('json_depth', 'name_bytes', 'dimensions') else 10}")
    with pytest.raises(FormatError, match=match) as caught:
        read_header(path)
    assert repr(str(path)) in str(caught.value)
    assert caught.value.hint is not None
    assert f"{VARIABLE}={variable}=N" in caught.value.hint

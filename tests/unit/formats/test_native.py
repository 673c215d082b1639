"""The native format loses nothing in a round trip, and its strict reader names the file."""

from __future__ import annotations

import copy
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sealing import resealed_file
from strategies import tensor

import loraio
from loraio.adapter import Adapter, BaseReference, Target
from loraio.errors import (
    AdapterError,
    FormatError,
    LoraioError,
    MissingFileError,
    OutputExistsError,
    ShapeError,
    UnknownNameError,
)
from loraio.files import integrity, tensorfile
from loraio.files.tensorfile import read_header
from loraio.formats.dialects import NATIVE, identify
from loraio.formats.native import read_metadata, to_document

SHA = "0123456789abcdef" * 4


def conv(**changes: Any) -> Target:
    values: dict[str, Any] = {"rank": 2, "alpha": 3, "shape": (4, 3, 2, 1), "dtype": "F32", "layer": "Conv2d"}
    return Target(**{**values, "base_sha256": SHA, **changes})


def adapter(**changes: Any) -> Adapter:
    values: dict[str, Any] = {
        "targets": {"conv.weight": conv()},
        "factors": {
            "conv.weight.lora_A": tensor((2, 6), torch.float32, 1),
            "conv.weight.lora_B": tensor((4, 2), torch.float32, 2),
        },
        "base": BaseReference(sha256=SHA, network="digit-cnn"),
        "training": {"seed": 1, "results": {"before": [0.5, None]}},
    }
    return Adapter(**{**values, **changes})


def several(*names: str, **changes: Any) -> Adapter:
    """Return an adapter with the same target under each name."""
    own = adapter().factors_of("conv.weight")
    factors = {f"{name}.{short}": factor for name in names for short, factor in own.items()}
    return adapter(targets=dict.fromkeys(names, conv()), factors=factors, **changes)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "some.safetensors"


def round_trip(one: Adapter, path: Path) -> Adapter:
    loraio.save(one, path)
    return loraio.load(path)


# Round trips


def test_a_loaded_adapter_is_the_saved_one_and_is_saved_as_the_same_bytes(path: Path, tmp_path: Path) -> None:
    read = round_trip(adapter(), path)
    assert read == adapter()
    loraio.save(read, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == path.read_bytes()
    loraio.save(replace(read, training={"seed": 2}), tmp_path / "other")
    assert (tmp_path / "other").read_bytes() != path.read_bytes()
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert read == adapter()  # its factors do not change with the file


@pytest.mark.parametrize("alpha", [4, 4.0, 0.1, -1, 1e-300, 2**53 + 1])
def test_alpha_stays_the_same_number_of_the_same_type(path: Path, alpha: float) -> None:
    read = round_trip(adapter(targets={"conv.weight": conv(alpha=alpha)}), path).targets["conv.weight"].alpha
    assert read == alpha
    assert type(read) is type(alpha)


def test_factors_that_are_views_of_one_tensor_are_kept(path: Path) -> None:
    whole = torch.arange(20.0)
    factors = {"conv.weight.lora_A": whole[:12].reshape(6, 2).T, "conv.weight.lora_B": whole[12:].reshape(4, 2)}
    assert round_trip(adapter(factors=factors), path) == adapter(factors=factors)


def test_targets_come_back_in_the_order_of_their_names(path: Path) -> None:
    names = ["b.weight", "a.weight", "é.weight", "Z.weight"]
    one = several(*names)
    read = round_trip(one, path)
    assert read == one
    assert list(read.targets) == sorted(names)
    assert list(read.factors) == [f"{name}.{short}" for name in sorted(names) for short in ("lora_A", "lora_B")]


def test_targets_in_the_order_of_another_writer_come_in_the_order_of_their_names(path: Path) -> None:
    one = several("b", "a")
    factors, document = {name: factor.clone() for name, factor in one.factors.items()}, to_document(one)
    tensorfile.write(factors, path, document=document)
    header = tensorfile.read_header(path)
    text = json.dumps({**document, integrity.KEY: json.loads(header.metadata["loraio"])[integrity.KEY]})
    save_file(factors, path, metadata={"loraio": text})
    path.write_bytes(resealed_file(path.read_bytes()))
    assert list(json.loads(text)["targets"]) == ["b", "a"]
    assert list(loraio.load(path).targets) == ["a", "b"]


def test_the_same_adapter_gives_the_same_bytes_in_any_order_of_its_parts(tmp_path: Path) -> None:
    for file, order in (("one", "bac"), ("two", "cab")):
        loraio.save(several(*order, training=dict.fromkeys(order, 1)), tmp_path / file)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_nothing_but_factors_and_one_document_is_in_the_file(path: Path) -> None:
    loraio.save(adapter(), path)
    header = read_header(path)
    assert {name: info.shape for name, info in header.tensors.items()} == {
        "conv.weight.lora_A": (2, 6),
        "conv.weight.lora_B": (4, 2),
    }
    assert list(header.metadata) == ["loraio"]
    assert header.document() == {
        "format_version": 2,
        "targets": {
            "conv.weight": {
                "kind": "lora",
                "rank": 2,
                "alpha": 3,
                "scale_rule": "alpha/r",
                "shape": [4, 3, 2, 1],
                "dtype": "F32",
                "layer": "Conv2d",
                "groups": 1,
                "base_sha256": SHA,
            }
        },
        "base": {"network": "digit-cnn", "sha256": SHA},
        "training": {"seed": 1, "results": {"before": [0.5, None]}},
    }


def test_three_convolutions_cost_at_most_4_kib_over_their_factors(path: Path) -> None:
    shapes = {"conv1.weight": (32, 1, 3, 3), "conv2.weight": (64, 32, 3, 3), "conv3.weight": (128, 64, 3, 3)}
    targets = {name: conv(shape=shape, rank=4) for name, shape in shapes.items()}
    factors = {
        f"{name}.{short}": torch.ones(shape)
        for name, target in targets.items()
        for short, shape in target.factor_shapes.items()
    }
    one = adapter(targets=targets, factors=factors)
    loraio.save(one, path)
    assert path.stat().st_size - 4 * one.parameters <= 4096


# Writing


def test_saving_over_a_file_needs_overwrite(path: Path) -> None:
    loraio.save(adapter(), path)
    other = adapter(training={})
    with pytest.raises(OutputExistsError):
        loraio.save(other, path)
    assert loraio.load(path) == adapter()
    loraio.save(other, path, overwrite=True)
    assert loraio.load(path) == other


def nested() -> dict[str, Any]:
    document: dict[str, Any] = {}
    for _ in range(100_000):
        document = {"a": document}
    return document


@pytest.mark.parametrize(
    "training",
    [
        *({"a": value} for value in (math.nan, [math.inf], (1, 2), {1: 2}, torch.ones(1), Path("x"), b"x", {1, 2})),
        *({1: 2}, {1: 2, "b": 3}, nested(), {"a": "\ud800"}),
    ],
    ids=map(str, range(12)),
)
def test_metadata_that_json_would_change_or_refuse_are_not_saved(path: Path, training: dict[Any, Any]) -> None:
    with pytest.raises((AdapterError, FormatError), match=r"not plain JSON|half a surrogate pair"):
        loraio.save(adapter(training=training), path)
    assert not path.exists()


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"extra": {"training": 1}}, "training"),
        ({"targets": {"conv.weight": conv(extra={"rank": 3})}}, "rank"),
        ({"base": BaseReference(sha256=SHA, extra={"network": "x"})}, "network"),
    ],
)
def test_an_extra_key_that_is_a_known_one_is_not_saved(path: Path, changes: dict[str, Any], key: str) -> None:
    with pytest.raises(AdapterError, match=f"extra holds '{key}'"):
        loraio.save(adapter(**changes), path)
    assert not path.exists()


# Reading what others wrote


GONE = object()


def change_document(path: Path, *way: Any) -> None:
    """Write a file with the last of ``way`` at the keys before it in the document; GONE removes a key."""
    document = changed = copy.deepcopy(to_document(adapter()))
    *keys, last, value = way
    for key in keys:
        changed = changed[key]
    changed[last] = value
    if value is GONE:
        del changed[last]
    tensorfile.write(adapter().factors, path, document=document)


def refused(path: Path, error: type[LoraioError], match: str) -> LoraioError:
    with pytest.raises(error, match=match) as caught:
        loraio.load(path)
    assert repr(str(path)) in str(caught.value)
    return caught.value


TARGET = to_document(adapter())["targets"]["conv.weight"]
OWN = ("targets", "conv.weight")

MISSING = [
    (("format_version",), "format version None"),
    *(((key,), f"the metadata has no '{key}'") for key in ("base", "training")),
    (("targets",), "not an adapter"),
    *((("base", key), f"'base' has no '{key}'") for key in ("network", "sha256")),
    *(((*OWN, key), f"target 'conv.weight' has no '{key}'") for key in TARGET),
]


@pytest.mark.parametrize(("way", "match"), MISSING, ids=lambda part: str(part))
def test_a_document_without_a_key_is_refused(path: Path, way: tuple[str, ...], match: str) -> None:
    change_document(path, *way, GONE)
    refused(path, FormatError, match)


@pytest.mark.parametrize("version", [3, 0, -1, 10**30, "1", 1.5, 2.0, True, None, [1]])
def test_another_format_version_is_refused_and_a_newer_one_asks_for_a_newer_loraio(path: Path, version: Any) -> None:
    change_document(path, "format_version", version)
    error = refused(path, FormatError, re.escape(f"format version {version!r}, this loraio reads versions up to 2"))
    assert (error.hint == "a newer loraio") == (version in (3, 10**30))


WRONG_TYPES = [
    (("format_version",), [True, 1.0]),
    (("targets",), [None, [], "a", 1]),
    (("base",), [None, [], "a"]),
    (("training",), [None, [], "a", 1]),
    (("base", "sha256"), [None, 1]),
    (("base", "network"), [1, True, ["x"]]),
    (OWN, [None, [], "a"]),
    ((*OWN, "kind"), [None, 1, ["lora"]]),
    ((*OWN, "rank"), [None, "2", 2.0, True, [2]]),
    ((*OWN, "alpha"), [None, "3", True, [3]]),
    ((*OWN, "scale_rule"), [None, 1]),
    ((*OWN, "shape"), [None, "4", 4, {}]),
    ((*OWN, "dtype"), [None, 32]),
    ((*OWN, "layer"), [None, 2]),
    ((*OWN, "groups"), [None, "1", 1.0, True]),
    ((*OWN, "base_sha256"), [None, 0]),
]


@pytest.mark.parametrize(
    ("way", "value"), [(way, value) for way, values in WRONG_TYPES for value in values], ids=lambda part: str(part)
)
def test_a_value_of_a_wrong_type_is_refused(path: Path, way: tuple[str, ...], value: Any) -> None:
    change_document(path, *way, value)
    refused(path, FormatError, "wrong type|is not a JSON object|format version (True|1.0), this loraio")


@pytest.mark.parametrize(
    ("way", "value", "error", "match"),
    [
        ((*OWN, "rank"), 0, AdapterError, "rank is 0"),
        ((*OWN, "rank"), 10**30, AdapterError, "rank is 1000"),
        ((*OWN, "rank"), 3, ShapeError, r"'conv.weight.lora_A' has the shape \(2, 6\), rank and weight need \(3, 6\)"),
        ((*OWN, "alpha"), 10**400, AdapterError, "alpha is 1000"),
        ((*OWN, "groups"), 3, AdapterError, "do not divide"),
        ((*OWN, "shape"), [4, 3, 2, 2], ShapeError, r"need \(2, 12\)"),
        ((*OWN, "shape"), [4, 6], AdapterError, "has 4 dimensions"),
        ((*OWN, "shape"), [4, 3, 2.0, 1], AdapterError, "shape is"),
        ((*OWN, "shape"), [4, [3], 2, 1], AdapterError, "shape is"),
        ((*OWN, "shape"), [4, 10**4000, 10**4000, 1], AdapterError, "shape is"),
        ((*OWN, "dtype"), "I8", AdapterError, "dtype is 'I8'"),
        ((*OWN, "base_sha256"), "x", AdapterError, "64 hexadecimal digits"),
        ((*OWN, "kind"), "loha", UnknownNameError, "no adapter kind 'loha'"),
        ((*OWN, "layer"), "Conv4d", UnknownNameError, "no layer type 'Conv4d'"),
        ((*OWN, "scale_rule"), "alpha", UnknownNameError, "no scale rule 'alpha'"),
        (("base", "sha256"), "x", AdapterError, "the base's sha256 is 'x'"),
        (("targets",), {}, AdapterError, "at least one target"),
        (("targets", "other.weight"), TARGET, AdapterError, "'other.weight.lora_A' is missing"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(
    path: Path, way: tuple[str, ...], value: Any, error: type[LoraioError], match: str
) -> None:
    change_document(path, *way, value)
    refused(path, error, match)


def test_a_key_that_occurs_twice_in_the_document_is_refused(path: Path) -> None:
    text = json.dumps({**to_document(adapter()), "format_version": 1}).replace('"rank": 2', '"rank": 9, "rank": 2')
    save_file(dict(adapter().factors), path, metadata={"loraio": text})
    refused(path, FormatError, "'rank' occurs twice")


def write_factors(path: Path, **changes: torch.Tensor | None) -> None:
    """Write a file with the right document and changed factors."""
    factors = {**dict(adapter().factors), **{f"conv.weight.{name}": value for name, value in changes.items()}}
    kept = {name: value for name, value in factors.items() if value is not None}
    tensorfile.write(kept, path, document=to_document(adapter()))


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"lora_B": None}, AdapterError, "'conv.weight.lora_B' is missing"),
        ({"lora_A": None, "lora_B": None}, AdapterError, "'conv.weight.lora_A' is missing"),
        ({"bias": torch.ones(4)}, AdapterError, "'conv.weight.bias' belongs to no target"),
        ({"lora_A": torch.ones(6, 2)}, ShapeError, r"has the shape \(6, 2\)"),
        ({"lora_A": torch.full((2, 6), math.nan)}, AdapterError, "12 values that are NaN or infinite"),
        ({"lora_B": torch.tensor([[-math.inf, 0]] * 4)}, AdapterError, "4 values that are NaN or infinite"),
        ({"lora_A": torch.ones(2, 6).int()}, FormatError, "'conv.weight.lora_A' is I32, factors are one of F64"),
        ({"lora_A": torch.ones(2, 6).to(torch.float8_e4m3fn)}, FormatError, "is F8_E4M3"),
    ],
)
def test_factors_that_do_not_fit_the_document_are_refused(
    path: Path, changes: dict[str, Any], error: type[LoraioError], match: str
) -> None:
    write_factors(path, **changes)
    refused(path, error, match)


def test_a_file_that_is_no_adapter_is_refused_with_what_it_is(path: Path) -> None:
    save_file({"conv.weight": torch.ones(2)}, path)
    refused(path, FormatError, "not an adapter but a file without loraio metadata")
    with pytest.raises(FormatError, match="there is no 'loraio' metadata"):
        read_metadata(read_header(path))
    tensorfile.write({"conv.weight": torch.ones(2)}, path, document={"format_version": 1}, overwrite=True)
    refused(path, FormatError, "not an adapter but a base model")


def test_a_missing_file_and_a_folder_are_refused(path: Path, tmp_path: Path) -> None:
    refused(path, MissingFileError, "does not exist")
    refused(tmp_path, MissingFileError, "there is no adapter in the folder")


def test_metadata_is_read_from_the_header_alone(path: Path) -> None:
    one = adapter(extra={"note": "hi"})
    loraio.save(one, path)
    metadata = read_metadata(read_header(path))
    assert metadata.targets == dict(one.targets)
    assert (metadata.base, metadata.training, metadata.extra) == (one.base, one.training, one.extra)


def test_the_dialect_is_found_by_content_and_not_by_name(tmp_path: Path) -> None:
    loraio.save(adapter(), tmp_path / "adapter.bin")
    assert identify(tmp_path / "adapter.bin").dialect is None
    assert NATIVE.name == "native"

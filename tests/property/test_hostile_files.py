"""Any bytes of a file give an adapter or one of our errors with the path, nothing else."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sealing import resealed
from strategies import json_values, tensor

import loraio
from loraio.adapter import Adapter, BaseReference, Target
from loraio.errors import LoraioError
from loraio.files.tensorfile import read_header

HOSTILE = settings(max_examples=250, deadline=None)


def make_valid() -> bytes:
    """A valid adapter file."""
    target = Target(rank=1, alpha=2, shape=(2, 1, 2, 2), dtype="F32", layer="Conv2d", base_sha256="01" * 32)
    factors = {f"w.{short}": tensor(shape, torch.float32, 1) for short, shape in target.factor_shapes.items()}
    base = BaseReference(sha256="23" * 32, network="digit-cnn")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "valid"
        loraio.save(Adapter(targets={"w": target}, factors=factors, base=base, training={"seed": 1}), path)
        return path.read_bytes()


VALID = make_valid()
LENGTH = int.from_bytes(VALID[:8], "little")
HEADER = json.loads(VALID[8 : 8 + LENGTH])
DOCUMENT = json.loads(HEADER["__metadata__"]["loraio"])
DATA = VALID[8 + LENGTH :]


def assemble(header: Any, data: bytes = DATA) -> bytes:
    text = json.dumps(header).encode()
    return resealed(len(text).to_bytes(8, "little") + text) + data


def places(tree: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value of a JSON tree."""
    if way:
        yield way
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from places(value, (*way, key))


def changed(tree: Any, way: tuple[Any, ...], value: Any) -> Any:
    """A copy of the tree with another value in one place."""
    if not way:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[way[0]] = changed(tree[way[0]], way[1:], value)
    return copy


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile") / "some.safetensors"


def read_all(path: Path, content: bytes) -> bool:
    """Return True if the content is read as an adapter; if not, the error is ours and names the file."""
    path.write_bytes(content)
    try:
        read_header(path)
        loraio.load(path)
    except LoraioError as error:
        text = str(error)
    else:
        return True
    assert repr(str(path)) in text
    return False


def test_the_file_that_is_mutated_is_valid(path: Path) -> None:
    assert read_all(path, VALID)
    assert read_all(path, assemble(HEADER))


@HOSTILE
@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_file_with_changed_bytes_is_refused(path: Path, changes: list[tuple[int, int]]) -> None:
    content = bytearray(VALID)
    for position, value in changes:
        content[position] = value
    assert read_all(path, bytes(content)) == (content == VALID)


def test_every_flipped_bit_is_noticed(path: Path) -> None:
    for position in range(8 * len(VALID)):
        content = bytearray(VALID)
        content[position // 8] ^= 1 << position % 8
        assert not read_all(path, bytes(content)), position


@HOSTILE
@given(st.integers(0, len(VALID)), st.integers(0, len(VALID)), st.binary(max_size=12))
def test_a_file_with_bytes_cut_out_or_put_in_is_read_or_refused(
    path: Path, begin: int, end: int, inserted: bytes
) -> None:
    content = VALID[:begin] + inserted + VALID[end:]
    assert read_all(path, content) == (content == VALID)


@HOSTILE
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(path: Path, content: bytes) -> None:
    assert not read_all(path, content)
    assert not read_all(path, len(content).to_bytes(8, "little") + content)


strange = json_values | st.sampled_from(
    [-1, 2**63, 10**300, 1.0, "", "lora", "w", "F32", "F64", [], {}, [0, 0], [2, 1, 2, 2], "\0", "0" * 64]
)


@HOSTILE
@given(st.sampled_from(list(places(HEADER))), strange)
def test_a_header_with_another_value_in_one_place_is_read_or_refused(
    path: Path, way: tuple[Any, ...], value: Any
) -> None:
    read_all(path, assemble(changed(HEADER, way, value)))


@HOSTILE
@given(st.sampled_from(list(places(DOCUMENT))), strange)
def test_a_document_with_another_value_in_one_place_is_read_or_refused(
    path: Path, way: tuple[Any, ...], value: Any
) -> None:
    document = changed(DOCUMENT, way, value)
    if read_all(path, assemble({**HEADER, "__metadata__": {"loraio": json.dumps(document)}})):
        copy = path.with_name("copy")
        loraio.save(loraio.load(path), copy, overwrite=True)
        assert loraio.load(copy) == loraio.load(path)


def test_every_truncation_is_refused(path: Path) -> None:
    assert not any(read_all(path, VALID[:size]) for size in range(len(VALID)))

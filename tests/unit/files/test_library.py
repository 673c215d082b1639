"""The safetensors library gets only what the gate has checked, and writes what our own writer would."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import deserialize
from safetensors.torch import save

from loraio.errors import FormatError
from loraio.files import library, tensorfile
from loraio.files.tensors import TORCH_DTYPES, dtype_code, tensor_bytes

ENTRY = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
EMPTY = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
MORE = '{"dtype":"F32","shape":[2],"data_offsets":[0,8],"more":1}'
MANY = ",".join(f'"t{number}":{EMPTY}' for number in range(30_001))


@pytest.mark.parametrize(
    ("header", "match"),
    [
        pytest.param(f'{{"a":{ENTRY},"a":{ENTRY}}}', "'a' occurs twice", id="duplicate name"),
        pytest.param(f'{{"__metadata__":{{"k":"1","k":"2"}},"a":{ENTRY}}}', "'k' occurs twice", id="duplicate key"),
        pytest.param(f'{{"":{ENTRY}}}', "empty name", id="empty name"),
        pytest.param(f'{{"a\\u001b[2J":{ENTRY}}}', "not printable", id="escape code"),
        pytest.param(f'{{"a\\u202e":{ENTRY}}}', "not printable", id="change of direction"),
        pytest.param(f'{{"{"a" * 513}":{ENTRY}}}', "longer than 512", id="long name"),
        pytest.param(f'{{"a":{MORE}}}', "unknown key 'more'", id="unknown key"),
        pytest.param(f'{{"a":{ENTRY.replace("[2]", str([2, *[1] * 16]))}}}', "17 dimensions", id="many dimensions"),
        pytest.param(f"{{{MANY}}}", "30,001 tensors", id="many tensors"),
        pytest.param(
            f'{{"__metadata__":{{"a":"{"x" * 5_000_000}"}}}}', "at most 5,000,000 are read", id="large header"
        ),
        pytest.param(f' {{"a":{ENTRY}}}', "not a safetensors file", id="white space first"),
        pytest.param('{"__metadata__":{"loraio":"[1]"}}', "not a JSON object", id="a document of ours"),
    ],
)
def test_the_gate_refuses_what_the_library_accepts(tmp_path: Path, header: str, match: str) -> None:
    text = header.encode()
    text += b" " * (-len(text) % 8)
    content = len(text).to_bytes(8, "little") + text + (b"\0" * 8 if ENTRY[:-1] in header or "17" in match else b"")
    deserialize(content)
    with pytest.raises(FormatError, match=match):
        tensorfile.parse_file(content, tmp_path / "some.safetensors")


names = st.text("aB0.é", min_size=1, max_size=4)
dtypes = st.sampled_from([getattr(torch, name) for name in TORCH_DTYPES.values()])
shapes = st.lists(st.integers(0, 3), max_size=3)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(facts=st.dictionaries(names, st.tuples(dtypes, shapes), max_size=5), text=st.none() | st.text(max_size=8))
def test_the_layout_of_the_streaming_writer_is_that_of_the_library(
    facts: dict[str, tuple[torch.dtype, list[int]]], text: str | None
) -> None:
    tensors = {name: torch.arange(27).to(dtype)[: torch.Size(shape).numel()].reshape(shape)
               for name, (dtype, shape) in facts.items()}  # fmt: skip
    metadata = None if text is None else {"loraio": text}
    layout = {name: (dtype_code(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
    start, placed = tensorfile.layout(layout, metadata or {}, where="here")
    ours = start + b"".join(bytes(tensor_bytes(tensors[name]).numpy()) for name in placed)
    assert ours == save(tensors, metadata=metadata)
    assert ours == start + b"".join(library.serialized(tensors, placed))


@pytest.mark.parametrize("piece", [1, 100, 1 << 20])
def test_tensors_are_read_and_written_in_pieces(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(library, "PIECE", piece)
    tensors = {"a": torch.arange(40.0), "b": torch.ones((), dtype=torch.int64), "c": torch.ones(3, 0, 2)}
    layout = {name: (dtype_code(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
    start, placed = tensorfile.layout(layout, {}, where="here")
    data = b"".join(library.serialized(tensors, placed))
    assert start + data == save(tensors)
    read = dict(library.read(io.BytesIO(data), placed))
    assert list(read) == list(placed)
    assert all(read[name].equal(tensor) and read[name].shape == tensor.shape for name, tensor in tensors.items())
    with pytest.raises(EOFError, match="a"):
        list(library.read(io.BytesIO(data[:-1]), placed))


def test_another_order_of_a_later_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def reversed_names(tensors: dict[str, torch.Tensor]) -> bytes:
        text = json.dumps(dict.fromkeys(reversed(list(tensors)))).encode()
        return len(text).to_bytes(8, "little") + text

    monkeypatch.setattr("safetensors.torch.save", reversed_names)
    placed = {name: tensorfile.TensorInfo("F32", (1,), 4 * at, 4 * at + 4) for at, name in enumerate("ab")}
    with pytest.raises(FormatError, match="another order"):
        list(library.serialized({"a": torch.ones(1), "b": torch.ones(1)}, placed))

"""Check that the gate refuses files with the path and the reason, and reads what the format allows."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from loraio.errors import FormatError, LoraioError, MissingFileError
from loraio.files import tensorfile
from loraio.files.strictjson import read_json
from loraio.files.tensorfile import read_header, read_tensors
from loraio.files.tensors import DTYPE_BITS, TORCH_DTYPES, dtype_code


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def raw(header: bytes | str | dict[str, Any], data: bytes = b"") -> bytes:
    """Return a safetensors file of any header."""
    if isinstance(header, dict):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode()
    return len(header).to_bytes(8, "little") + header + data


def refused(path: Path, content: bytes, match: str) -> FormatError:
    """Check that the content is a FormatError that names the path and says why, and return it."""
    path.write_bytes(content)
    with pytest.raises(FormatError, match=match) as caught:
        read_header(path)
    assert repr(str(path)) in str(caught.value)
    return caught.value


# Reading


def test_a_small_file_is_read(path: Path) -> None:
    path.write_bytes(raw({"__metadata__": {"a": "b"}, "w": entry()}, b"\0" * 8))
    header = read_header(path)
    assert header.path == path
    assert header.tensors == {"w": ("F32", (2,), 0, 8)}
    assert header.metadata == {"a": "b"}
    assert header.file_bytes == path.stat().st_size == 8 + header.header_bytes + 8


def test_tensors_come_in_the_order_of_their_bytes(path: Path) -> None:
    path.write_bytes(raw({"a": entry(offsets=(8, 16)), "b": entry(offsets=(0, 8))}, b"\0" * 16))
    assert list(read_header(path).tensors) == ["b", "a"]


@pytest.mark.parametrize(
    ("header", "data"),
    [
        pytest.param({}, b"", id="no tensors"),
        pytest.param({"a": entry(shape=(), offsets=(0, 4))}, b"\0" * 4, id="0-d tensor"),
        pytest.param({"a": entry(shape=(3, 0), offsets=(0, 0)), "b": entry()}, b"\0" * 8, id="tensor of no bytes"),
        pytest.param({"../é/ \u3000": entry()}, b"\0" * 8, id="any printable name"),
        pytest.param({"__metadata__": None, "a": entry()}, b"\0" * 8, id="null metadata"),
        pytest.param(json.dumps({"a": entry()}) + "  \n ", b"\0" * 8, id="padding"),
        pytest.param('{"\\ud83d\\ude00":' + json.dumps(entry()) + "}", b"\0" * 8, id="surrogate pair"),
        pytest.param({"a": entry("F4", (4,), (0, 2))}, b"\0" * 2, id="four bits"),
    ],
)
def test_what_is_unusual_but_allowed_is_read(path: Path, header: Any, data: bytes) -> None:
    path.write_bytes(raw(header, data))
    with safe_open(path, framework="pt") as reference:
        assert set(read_header(path).tensors) == set(reference.keys())


@pytest.mark.parametrize(
    ("content", "match"),
    [
        pytest.param(b"", "the file is empty -> fetch the file again", id="empty"),
        pytest.param(b"1234567", "7 bytes are too few -> fetch the file again", id="less than a length"),
        pytest.param(b"\0" * 8, "not a safetensors file", id="no header"),
        pytest.param(
            raw("{}")[:-1], "truncated: the header alone has 2 bytes, the file 9 -> fetch the file", id="short header"
        ),
        pytest.param((128).to_bytes(8, "little") + b'{"a"', "truncated", id="a length that starts like a pickle"),
        pytest.param(
            (5_000_001).to_bytes(8, "little") + b"{" + b" " * 5_000_000,
            "header has 5,000,001 bytes, at most 5,000,000 are read",
            id="long header",
        ),
        pytest.param(
            (2**64 - 1).to_bytes(8, "little") + b"{}",
            "truncated: the header alone has 18,446,744,073,709,551,615 bytes, the file 10",
            id="largest length",
        ),
        pytest.param(b"\0" * 4000, "not a safetensors file", id="zeros"),
        pytest.param(b"\x01" * 100, "not a safetensors file -> fetch the file again", id="noise"),
        pytest.param(
            raw({"a": entry()}, b"\0" * 7), r"truncated: 76 of 77 bytes -> fetch the file", id="truncated data"
        ),
        pytest.param(
            raw({"a": entry()}, b"\0" * 9), "1 bytes follow .*: the header speaks of 77, the file has 78", id="trailing"
        ),
        pytest.param(raw({}, b"\0"), "1 bytes follow the last tensor", id="bytes of no tensor"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer", id="Git LFS"),
        pytest.param(
            b"PK\x03\x04" + b"\0" * 100, "zip archive, perhaps from torch.save -> a name that ends in .pt", id="zip"
        ),
        pytest.param(b"\x80\x02}q\x00(X\x05\x00\x00\x00ab", "pickle", id="pickle"),
        pytest.param(b"<!DOCTYPE html><html></html>", "an HTML page -> download it again", id="HTML"),
        pytest.param(b"plain text of some length", "not a safetensors file", id="text"),
    ],
)
def test_a_file_of_a_wrong_length_or_kind_is_refused(path: Path, content: bytes, match: str) -> None:
    match, _, hint = match.partition(" -> ")
    assert hint in str(refused(path, content, match).hint)


@pytest.mark.parametrize(
    ("header", "match"),
    [
        pytest.param(b'{"\xff": 1}', "not UTF-8", id="not UTF-8"),
        pytest.param('{"a": }', "not JSON", id="not JSON"),
        pytest.param("[1]", "not a safetensors file", id="a list"),
        pytest.param(" {}", "not a safetensors file", id="white space first"),
        pytest.param("\ufeff{}", "not a safetensors file", id="byte order mark"),
        pytest.param("{}\0\0", "not JSON", id="NUL padding"),
        pytest.param("{} {}", "not JSON", id="two documents"),
        pytest.param('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested more than 64 deep", id="deep nesting"),
        pytest.param('{"a": ' + "[" * 100_000, "nested more than 64 deep", id="deep nesting without an end"),
        pytest.param('{"a": ' + "9" * 5000 + "}", "not JSON", id="integer of too many digits"),
        pytest.param('{"a": NaN}', "NaN is not a JSON number", id="NaN"),
        pytest.param('{"a": -Infinity}', "-Infinity is not a JSON number", id="infinity"),
        pytest.param('{"a": 1e999}', "1e999 is beyond the range", id="beyond float64"),
        pytest.param('{"\\ud800": {}}', "half a surrogate pair", id="lone surrogate in a name"),
        pytest.param('{"__metadata__": {"a": "\\udc00"}}', "half a surrogate pair", id="lone surrogate in metadata"),
        pytest.param('{"__metadata__": {"a": 1}}', "not an object of strings", id="number in metadata"),
        pytest.param('{"__metadata__": {"a": null}}', "not an object of strings", id="null in metadata"),
        pytest.param('{"__metadata__": []}', "not an object of strings", id="metadata is a list"),
        pytest.param('{"__metadata__": "a"}', "not an object of strings", id="metadata is a string"),
        pytest.param('{"__metadata__": {}, "__metadata__": {}}', "'__metadata__' occurs twice", id="metadata twice"),
        pytest.param('{"__metadata__": {"a": "1", "a": "1"}}', "'a' occurs twice", id="metadata key twice"),
        pytest.param('{"a": 1}', "entry of tensor 'a' is not an object", id="entry is a number"),
        pytest.param('{"a": {}}', "dtype None", id="empty entry"),
    ],
)
def test_a_header_that_is_not_the_right_json_is_refused(path: Path, header: bytes | str, match: str) -> None:
    refused(path, raw(header), match)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        pytest.param(entry("F31"), "dtype 'F31'", id="unknown dtype"),
        pytest.param(entry("f32"), "dtype 'f32'", id="dtype in lower case"),
        pytest.param({**entry(), "dtype": ["F32"]}, r"dtype \['F32'\]", id="dtype is a list"),
        pytest.param(entry(shape=(-2,)), r"shape \[-2\]", id="negative shape"),
        pytest.param(entry(shape=(2.0,)), r"shape \[2.0\]", id="float shape"),
        pytest.param(entry(shape=(True, 2)), "shape", id="boolean shape"),
        pytest.param(entry(shape=("2",)), "shape", id="string shape"),
        pytest.param({**entry(), "shape": 2}, "shape 2", id="shape is a number"),
        pytest.param(entry(shape=(2**63,)), "not a list of sizes", id="a size beyond 63 bits"),
        pytest.param(entry(shape=(2**62, 2**62)), "too large for any file", id="overflow"),
        pytest.param(entry(shape=(2**62, 2**62, 0), offsets=(0, 0)), "too large for any file", id="overflow, then 0"),
        pytest.param(entry("U8", (2**60,)), "too large for any file: U8", id="one bit beyond 63"),
        pytest.param(entry("U8", (2**59 + 1,), (0, 2**59 + 1)), "truncated", id="beyond what a float holds"),
        pytest.param(entry(shape=(2**62,) * 16), "too large for any file", id="beyond a float"),
        pytest.param(entry(shape=(1,) * 17), "has 17 dimensions, at most 16", id="dimensions"),
        pytest.param(entry(note="hi"), "the unknown key 'note'", id="extra field"),
        pytest.param(entry("F4", (3,), (0, 2)), "F4 of shape .* needs 1.5", id="half a byte left"),
        pytest.param(entry(shape=(3,)), "has 8 bytes, F32 of shape .* needs 12", id="too few bytes for the shape"),
        pytest.param(entry(offsets=(8, 0)), "has -8 bytes", id="backward offsets"),
        pytest.param(entry(offsets=(0,)), r"data_offsets \[0\], not two offsets", id="one offset"),
        pytest.param(entry(offsets=(0, 4, 8)), "not two offsets", id="three offsets"),
        pytest.param(entry(offsets=(0.0, 8.0)), "not two offsets", id="float offsets"),
        pytest.param(entry(offsets=(-8, 0)), "not two offsets", id="negative offsets"),
        pytest.param({"dtype": "F32", "shape": [2]}, "data_offsets None", id="no offsets"),
        pytest.param({"dtype": "F32", "data_offsets": [0, 8]}, "shape None", id="no shape"),
    ],
)
def test_an_entry_that_makes_no_sense_is_refused(path: Path, bad: dict[str, Any], match: str) -> None:
    refused(path, raw({"w": bad}, b"\0" * 8), match)


@pytest.mark.parametrize("hidden", ["\0", "\x1b", "\u202e", "\u200b"])
def test_a_name_that_holds_what_is_not_printable_is_refused(path: Path, hidden: str) -> None:
    refused(path, raw({f"a{hidden}b": entry()}, b"\0" * 8), re.escape(f"{f'a{hidden}b'!r} holds {hidden!r}, which"))


def test_a_name_is_measured_in_bytes(path: Path) -> None:
    path.write_bytes(raw({"é" * 256: entry()}, b"\0" * 8))
    assert list(read_header(path).tensors) == ["é" * 256]
    refused(path, raw({"é" * 257: entry()}, b"\0" * 8), "name is longer than 512 bytes: 'éééé")


@pytest.mark.parametrize(
    ("offsets", "match"),
    [
        pytest.param([(0, 8), (16, 24)], "'b' starts at byte 16 and leaves a hole", id="hole"),
        pytest.param([(8, 16), (16, 24)], "'a' starts at byte 8 and leaves a hole", id="hole at the start"),
        pytest.param([(0, 8), (4, 12)], "'b' starts at byte 4 and overlaps", id="overlap"),
        pytest.param([(0, 8), (0, 8)], "'b' starts at byte 0 and overlaps", id="same bytes"),
        pytest.param([(0, 8), (4, 4)], "'b' starts at byte 4 and overlaps", id="no bytes inside another"),
    ],
)
def test_tensors_that_do_not_tile_the_data_are_refused(path: Path, offsets: Any, match: str) -> None:
    header = {
        name: entry(shape=((pair[1] - pair[0]) // 4,), offsets=pair) for name, pair in zip("ab", offsets, strict=True)
    }
    refused(path, raw(header, b"\0" * 24), match)


@pytest.mark.parametrize(
    ("name", "problem"), [("none", "does not exist"), ("", "cannot"), ("x" * 300, "cannot be read")]
)
def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path, name: str, problem: str) -> None:
    with pytest.raises(MissingFileError, match=re.escape(f"{str(tmp_path / name)!r} {problem}")):
        read_header(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"a": 1, "a": 1}', "'a' occurs twice"),
        ('{"a": NaN}', "NaN"),
        ('{"a": "\\ud800"}', "half a surrogate pair"),
        ('{"a":' * 100_000, "nested more than 64 deep"),
    ],
)
def test_a_document_that_is_not_an_object_is_refused(path: Path, text: str, match: str) -> None:
    path.write_bytes(raw({"__metadata__": {"loraio": text}}))
    with pytest.raises(FormatError, match=match) as caught:
        read_header(path).document()
    assert repr(str(path)) in str(caught.value)


def test_every_dtype_of_torch_has_its_bits() -> None:
    for code, name in TORCH_DTYPES.items():
        assert DTYPE_BITS[code] == 8 * getattr(torch, name).itemsize
        assert dtype_code(getattr(torch, name)) == code
    with pytest.raises(FormatError, match="complex128"):
        dtype_code(torch.complex128)


def test_every_dtype_of_the_format_has_its_size_and_its_place(path: Path) -> None:
    bits = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16)}
    bits |= dict.fromkeys(("U32", "I32", "F32"), 32) | dict.fromkeys(("U64", "I64", "F64", "C64"), 64)
    bits |= dict.fromkeys(("BOOL", "U8", "I8"), 8)
    bits |= {f"F8_{name}": 8 for name in ("E5M2", "E4M3", "E8M0", "E4M3FNUZ", "E5M2FNUZ")}
    start, placed = tensorfile.layout({code: (code, (8,)) for code in bits}, {}, where="here")
    path.write_bytes(start + bytes(sum(bits.values())))
    read = read_header(path).tensors
    assert read == placed
    assert {code: info.end - info.begin for code, info in read.items()} == bits
    assert set(bits) == set(DTYPE_BITS)
    wide = [bits[code] for code in read if bits[code] > 8]
    assert wide == sorted(wide, reverse=True)
    assert [bits[code] for code in read][: len(wide)] == wide


def test_a_dtype_that_torch_lacks_cannot_be_read_as_a_tensor(path: Path) -> None:
    path.write_bytes(raw({"w": entry("F6_E2M3", (4,), (0, 3))}, b"\0" * 3))
    header = read_header(path)
    with pytest.raises(FormatError, match="'w' has dtype F6_E2M3") as caught:
        read_tensors(header)
    assert repr(str(path)) in str(caught.value)


def test_tensors_outlive_a_change_of_their_file(path: Path) -> None:
    tensorfile.write({"w": torch.arange(1000.0)}, path, document={})
    tensors = read_tensors(read_header(path))
    with path.open("r+b") as file:
        size = path.stat().st_size
        file.write(b"\0" * size)
        file.flush()
        assert tensors["w"].equal(torch.arange(1000.0))
        file.truncate(0)
    path.unlink()
    assert tensors["w"].equal(torch.arange(1000.0))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda path: path.unlink(), MissingFileError),
        (lambda path: path.write_bytes(b"something else"), FormatError),
        (lambda path: tensorfile.write({"v": torch.ones(2)}, path, document={}, overwrite=True), FormatError),
        (lambda path: tensorfile.write({"w": torch.ones(3)}, path, document={}, overwrite=True), FormatError),
        (lambda path: tensorfile.write({"w": torch.ones(2).int()}, path, document={}, overwrite=True), FormatError),
    ],
    ids=["gone", "broken", "other names", "other shape", "other dtype"],
)
def test_a_file_that_changes_after_its_header_was_read_is_refused(
    path: Path, change: Callable[[Path], Any], error: type[LoraioError]
) -> None:
    tensorfile.write({"w": torch.ones(2)}, path, document={})
    header = read_header(path)
    change(path)
    with pytest.raises(error, match=re.escape(repr(str(path)))):
        read_tensors(header)


def test_a_tensor_that_is_damaged_is_named(path: Path) -> None:
    tensorfile.write({"v": torch.ones(2), "w": torch.ones(2)}, path, document={})
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    header = read_header(path)
    for where in (header, tensorfile.parse_file(path.read_bytes(), path)):
        with pytest.raises(FormatError, match="1 of 2 tensors are not what was written") as caught:
            read_tensors(where)
        assert "'w' has another SHA-256" in str(caught.value)
        assert repr(str(path)) in str(caught.value)
        assert "'v'" not in str(caught.value)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that opens and cannot be read")
def test_a_file_that_opens_and_cannot_be_read_says_why(path: Path) -> None:
    unreadable = Path("/proc/self/mem")
    for read in (read_header, read_json):
        with pytest.raises(MissingFileError, match=re.escape(f"'{unreadable}' cannot be read: Input/output error")):
            read(unreadable)
    tensorfile.write({"w": torch.ones(2)}, path, document={})
    header = replace(read_header(path), path=unreadable)
    with pytest.raises(FormatError, match=r"cannot be read: Input/output error[\s\S]*/proc/self/mem"):
        read_tensors(header)


def test_a_header_that_is_damaged_or_has_two_digests_is_refused(path: Path) -> None:
    tensorfile.write({"w": torch.ones(2)}, path, document={"x": 1})
    other = read_header(path).metadata["loraio"]
    refused(path, path.read_bytes().replace(b'\\"x\\":1', b'\\"x\\":2'), "its header is not what was written")
    with pytest.raises(FormatError, match="the text of another file's digests") as caught:
        tensorfile.write({"w": torch.ones(2)}, path, document={"x": 1}, metadata={"other": other}, overwrite=True)
    assert repr(str(path)) in str(caught.value)


def test_a_file_in_memory_is_as_one_on_disk(path: Path) -> None:
    tensors = {"w": torch.arange(300.0), "v": torch.ones(2, dtype=torch.float16)}
    tensorfile.write(tensors, path, document={"a": 1}, metadata={"format": "pt"})
    content = path.read_bytes()
    header = tensorfile.parse_file(content, path)
    assert replace(header, data=None) == read_header(path)
    assert header.metadata["format"] == "pt"
    assert header.sha256 == hashlib.sha256(content[: 8 + header.header_bytes]).hexdigest()
    path.unlink()
    assert all(tensor.equal(tensors[name]) for name, tensor in read_tensors(header).items())
    assert not re.search("parsed=|digests=|[^a]data=", repr(header))  # of any length
    with pytest.raises(FormatError, match="truncated") as caught:
        tensorfile.parse_file(content[:-1], path)
    assert repr(str(path)) in str(caught.value)

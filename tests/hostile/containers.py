"""Bytes that are no safetensors file, or one whose header cannot be right: each with what must be said about it."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from typing import Any

import torch
from safetensors.torch import save

PAYLOAD = "the-payload-ran"
"""The file that a pickle's payload would make in the current folder."""

Json = dict[str, Any]


def raw(header: bytes | str | Json, data: bytes = b"") -> bytes:
    """A safetensors file of any header."""
    if isinstance(header, dict):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode("utf-8", "surrogatepass")
    return len(header).to_bytes(8, "little") + header + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> Json:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def with_pad(text: bytes, size: int) -> bytes:
    """Padded with spaces, as headers are."""
    return text + b" " * (size - len(text))


class Payload:
    """Makes a file where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (PAYLOAD, "w")


def zipped(entries: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", how) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tarred(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("model.safetensors")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def torch_saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def other_formats() -> Iterator[tuple[str, bytes, str]]:
    """Yield files of other formats, as failed downloads and wrong endings leave them."""
    good = save({"w": torch.ones(2)})
    lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    yield "a Git LFS pointer", lfs, r"Git LFS pointer[\s\S]*git lfs pull"
    html = b"<!DOCTYPE html>\n<html><head><title>404</title></head></html>"
    yield "an HTML page", html, r"an HTML page[\s\S]*download it again"
    yield "an HTML page after white space", b"\n\n   <html><body>Sign in</body></html>", "an HTML page"
    yield "an HTML page after a byte order mark", b"\xef\xbb\xbf<!doctype HTML><html></html>", "an HTML page"
    yield "an XML error", b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "HTML or XML page"
    yield "a JSON error", b'{"error":"Repository not found"}' + b" " * 20, r"a JSON text|truncated: the header alone"
    yield "a JSON list", b'[{"error": "Entry not found"}]', "a JSON text"
    yield "a text", b"Entry not found", "a text that starts with 'Entry not found'"
    yield "a longer text", b"Invalid username or password.\nTry again.\n", "a text that starts with 'Invalid username"
    yield "a zip archive", zipped({"model.safetensors": good}), "a zip archive"
    yield "a zip of torch.save", torch_saved({"w": torch.ones(2)}), r"a zip archive[\s\S]*ends in \.pt"
    yield "an old torch.save", torch_saved({"w": torch.ones(2)}, _use_new_zipfile_serialization=False), "a pickle"
    for protocol in range(2, 6):
        yield f"a pickle of protocol {protocol}", pickle.dumps(Payload(), protocol), "a pickle"
    yield "a pickle of protocol 0", pickle.dumps(Payload(), 0), "not a safetensors file"
    yield "gzip", gzip.compress(good), r"a gzip archive[\s\S]*unpack it"
    yield "bzip2", bz2.compress(good), "a bzip2 archive"
    yield "xz", lzma.compress(good), "an xz archive"
    yield "zstd", b"\x28\xb5\x2f\xfd" + good, "a zstd archive"
    yield "7-Zip", b"7z\xbc\xaf\x27\x1c" + good, "a 7-Zip archive"
    yield "tar", tarred(good), "a tar archive"
    yield "GGUF", b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + b"\0" * 32, "a GGUF or GGML model"
    yield "GGML", b"lmgg" + b"\0" * 40, "a GGUF or GGML model"
    yield "ONNX", b"\x08\x08\x12\x07pytorch\x1a\x052.1.0" + b"\0" * 20, "perhaps an ONNX model"
    yield "TensorFlow Lite", b"\x1c\0\0\0TFL3" + b"\0" * 40, "a TensorFlow Lite model"
    yield "HDF5", b"\x89HDF\r\n\x1a\n" + b"\0" * 40, "an HDF5 file"
    yield "NumPy", b"\x93NUMPY\x01\0" + b"\0" * 40, "a NumPy array"
    yield "PNG", b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "an image"
    yield "JPEG", b"\xff\xd8\xff\xe0" + b"\0" * 40, "an image"
    yield "GIF", b"GIF89a" + b"\0" * 40, "an image"
    yield "PDF", b"%PDF-1.7\n%\xe2\xe3" + b"\0" * 40, "a PDF document"
    yield "ELF", b"\x7fELF\x02\x01\x01" + b"\0" * 40, "a program"
    yield "a shell script", b"#!/bin/sh\ntouch the-payload-ran\n", "a program"
    yield "a Python program", b"import os\nos.system('touch the-payload-ran')\n", "a text that starts with 'import os'"
    yield "zeros", bytes(4096), "zeros"
    yield "ones", b"\xff" * 100, "not a safetensors file"
    yield "random bytes", bytes(range(7, 200, 3)), "not a safetensors file"
    for size in range(8):
        yield f"{size} bytes", b"\x07" * size, "the file is empty" if not size else f"{size} bytes are too few"
    yield "eight bytes", bytes(8), "not a safetensors file"


def polyglots() -> Iterator[tuple[str, bytes, str]]:
    """Two formats in one file."""
    good = raw({"w": entry()}, bytes(8))
    archive = zipped({"a.py": b"import os"})
    yield "safetensors, then zip", good + archive, r"\d+ bytes follow the last tensor"
    yield "safetensors, then pickle", good + pickle.dumps(Payload()), "bytes follow the last tensor"
    yield "safetensors, then PDF", good + b"%PDF-1.4\n%%EOF", "bytes follow the last tensor"
    yield "safetensors, then HTML", good + b"<script>1</script>", "bytes follow the last tensor"
    yield "safetensors twice", good + good, "bytes follow the last tensor"
    yield "zip, then safetensors", archive + good, "a zip archive"
    yield "pickle, then safetensors", pickle.dumps(Payload()) + good, "a pickle"
    yield "GIF whose ninth byte is a brace", b"GIF89a\1\0{" + good, "an image"
    yield "zip whose ninth byte is a brace", b"PK\x03\x04\x14\0\0\0{" + good, "a zip archive"
    yield "PDF whose ninth byte is a brace", b"%PDF-1.7{" + good, "a PDF document"
    yield "HTML whose ninth byte is a brace", b"<html>  {" + good, "an HTML page"
    yield "pickle whose length is a header's", b"\x80\0\0\0\0\0\0\0{}" + b" " * 126 + pickle.dumps(1), "bytes follow"
    hidden = zipped({"x": b"y"}).hex()
    yield "zip in an unknown key", raw({"w": entry(payload=hidden)}, bytes(8)), "unknown key 'payload'"
    yield "zip in a tensor's name", raw({hidden: entry()}, bytes(8))[:-1], "truncated"
    yield (
        "a hole that holds a zip",
        raw({"w": entry(offsets=(len(archive), len(archive) + 8))}, archive + bytes(8)),
        "hole",
    )
    yield (
        "bytes after the brace",
        raw(b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}PK\3\4', bytes(8)),
        "not JSON",
    )


def lengths() -> Iterator[tuple[str, bytes, str]]:
    good = raw({"w": entry()}, bytes(8))
    header = good[8:-8]
    for more, what in ((1, "one"), (9, "nine"), (1 << 20, "a million"), (4_000_000, "four million")):
        length = (len(header) + more).to_bytes(8, "little")
        match = "truncated: the header alone" if more > 8 else "not JSON|not UTF-8"
        yield f"a header length of {what} too many", length + header + bytes(8), match
    yield "a header length of one too few", (len(header) - 1).to_bytes(8, "little") + header + bytes(8), "not JSON"
    for number in (2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1):
        yield (
            f"a header length of {number}",
            number.to_bytes(8, "little") + header + bytes(8),
            "truncated: the header alone",
        )
    yield "a header of no bytes", bytes(8) + b"{", "not a safetensors file|bytes follow|not JSON"
    yield "a big-endian length", len(header).to_bytes(8, "big") + header + bytes(8), "truncated: the header alone"
    for share in (0.1, 0.5, 0.9, 0.99):
        cut = good[: 8 + len(header) + int(8 * share)]
        yield f"{share:.0%} of the data", cut, rf"truncated: {len(cut)} of {len(good)} bytes"
    for share in (0.2, 0.7):
        yield f"{share:.0%} of the header", good[: 8 + int(len(header) * share)], "truncated: the header alone"
    yield "one byte after the data", good + b"\0", "1 bytes follow the last tensor"
    yield "a line break after the data", good + b"\n", "1 bytes follow the last tensor"
    yield "carriage returns put in", good.replace(b", ", b",\r\n "), "truncated|not JSON|bytes"


def json_texts() -> Iterator[tuple[str, bytes | str, str]]:
    """Headers that are not the JSON that they should be."""
    good = json.dumps(entry())
    yield "not UTF-8", b'{"\xff":1}', "header is not UTF-8"
    yield "an overlong slash", b'{"\xc0\xaf":1}', "header is not UTF-8"
    yield "a raw surrogate", b'{"\xed\xa0\x80":1}', "header is not UTF-8"
    yield "a list", "[1]", "not a safetensors file"
    yield "a byte order mark", "\ufeff{}", "not a safetensors file"
    yield "white space first", " {}", "not a safetensors file|JSON text"
    yield "a value that is missing", '{"w": }', "not JSON"
    yield "a trailing comma", f'{{"w": {good},}}', "not JSON"
    yield "a comment", f'{{"w": {good} /* safe */}}', "not JSON"
    yield "single quotes", "{'w': 1}", "not JSON"
    yield "two documents", "{} {}", "not JSON"
    yield "NUL padding", "{}\0\0\0", "not JSON"
    yield "a raw line break in a string", '{"a\nb": 1}', "not JSON"
    yield "no end", '{"w": ' + good, "not JSON"
    yield "a text without an end", '{"' + '\\"' * 1000, "not JSON"
    yield "NaN", '{"w": NaN}', "NaN is not a JSON number"
    yield "infinity", '{"w": Infinity}', "Infinity is not a JSON number"
    yield "minus infinity", '{"w": -Infinity}', "-Infinity is not a JSON number"
    yield "a number beyond float64", '{"w": 1e999}', "1e999 is beyond the range"
    yield "an integer of 5,000 digits", '{"w": ' + "9" * 5000 + "}", "an integer of thousands of digits"
    yield "an integer of a million digits", '{"w": ' + "9" * 1_000_000 + "}", "an integer of thousands of digits"
    yield (
        "65 lists deep",
        '{"w": ' + "[" * 65 + "]" * 65 + "}",
        r"nested more than 64 deep[\s\S]*LORAIO_LIMITS=json_depth",
    )
    yield "100,000 lists deep", '{"w": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested more than 64 deep"
    yield "100,000 objects deep", '{"w":' * 100_000, "nested more than 64 deep"
    yield "depth behind quotes", '{"\\"[[": "\\\\", "w": ' + "[" * 70 + "]" * 70 + "}", "nested more than 64 deep"
    yield (
        "a million lists",
        '{"w": [' + "[]," * 1_000_000 + "[]]}",
        r"more than 300,000 entries[\s\S]*LORAIO_LIMITS=json_values",
    )
    yield "a million objects", '{"w": [' + "{}," * 1_000_000 + "{}]}", "more than 300,000 entries"
    yield "a million numbers", '{"w": [' + "0," * 1_000_000 + "0]}", "more than 300,000 entries"
    yield "a million texts", '{"w": [' + '"",' * 1_000_000 + "0]}", "more than 300,000 entries"
    yield "a tensor twice", f'{{"w": {good}, "w": {good}}}', "the key 'w' occurs twice"
    yield "a tensor twice, once escaped", f'{{"w": {good}, "\\u0077": {good}}}', "the key 'w' occurs twice"
    yield "metadata twice", '{"__metadata__": {}, "__metadata__": {}}', "'__metadata__' occurs twice"
    yield "a metadata key twice", '{"__metadata__": {"a": "1", "a": "2"}}', "'a' occurs twice"
    yield (
        "a dtype twice",
        '{"w": {"dtype": "F32", "dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}',
        "'dtype' occurs",
    )
    yield (
        "offsets twice",
        '{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], "data_offsets": [0, 8]}}',
        "twice",
    )
    yield "half a character in a name", f'{{"\\ud800": {good}}}', "half a surrogate pair"
    yield "the other half", f'{{"\\udc00": {good}}}', "half a surrogate pair"
    yield "two first halves", f'{{"\\ud83d\\ud83d\\ude00": {good}}}', "half a surrogate pair"
    yield "half a character behind a backslash", f'{{"\\\\\\ud800": {good}}}', "half a surrogate pair"
    yield "half a character in metadata", '{"__metadata__": {"a": "\\udc00"}}', "half a surrogate pair"


def headers() -> Iterator[tuple[str, Json, str]]:
    """Headers that are JSON and say what cannot be."""
    for value in (1, None, "a", [], True, 1.5):
        yield f"an entry that is {value!r}", {"w": value}, "entry of tensor 'w' is not an object"
    for value in ({"a": 1}, {"a": None}, {"a": {}}, {"a": ["b"]}, [], "a", 1, True):
        yield f"metadata that is {json.dumps(value)}", {"__metadata__": value, "w": entry()}, "not an object of strings"
    for dtype in ("F31", "f32", "float32", "", None, 1, ["F32"], "F32 ", "F\u0663\u0662", "x" * 100_000):
        yield f"dtype {str(dtype)[:20]!r}", {"w": entry(dtype)}, "which safetensors does not know"
    for shape in ((-2,), (2.0,), (True, 2), ("2",), 2, None, "2", {"0": 2}, (2**63,), (None,), ([2],), (1e308,)):
        yield f"shape {shape!r}", {"w": entry(shape=shape)}, "not a list of sizes"
    for offsets in ((0,), (0, 4, 8), (0.0, 8.0), (-8, 0), None, 8, "08", ("0", "8"), (0, 2**63), (True, 8), ((0,), 8)):
        yield f"offsets {offsets!r}", {"w": entry(offsets=offsets)}, "not two offsets"
    for shape in ((2**62, 2**62), (2**32, 2**32), (2**62, 2**62, 0), (2**31, 2**31, 2**31), (2**60,), (2**62,) * 16):
        yield f"shape {shape!r}, which overflows", {"w": entry(shape=shape, offsets=(0, 0))}, "too large for any file"
    yield "seventeen dimensions", {"w": entry(shape=(1,) * 17, offsets=(0, 4))}, "17 dimensions, at most 16"
    yield "ten thousand dimensions", {"w": entry(shape=(1,) * 10_000, offsets=(0, 4))}, "10,000 dimensions, at most 16"
    yield "half a byte", {"w": entry("F4", (3,), (0, 2))}, "F4 of shape .* needs 1.5"
    yield "too few bytes for its shape", {"w": entry(shape=(3,))}, "has 8 bytes, F32 of shape .* needs 12"
    yield "too many bytes for its shape", {"w": entry(shape=(1,))}, "has 8 bytes, F32 of shape .* needs 4"
    yield "offsets backwards", {"w": entry(offsets=(8, 0))}, "has -8 bytes"
    yield "no dtype", {"w": {"shape": [2], "data_offsets": [0, 8]}}, "dtype None"
    yield "no shape", {"w": {"dtype": "F32", "data_offsets": [0, 8]}}, "shape None"
    yield "no offsets", {"w": {"dtype": "F32", "shape": [2]}}, "data_offsets None"
    yield "an unknown key in an entry", {"w": entry(strides=[1])}, "unknown key 'strides'"
    yield "an unknown key of a megabyte", {"w": entry(**{"x" * 1_000_000: 1})}, "unknown key"


def layouts() -> Iterator[tuple[str, list[tuple[int, int]], str]]:
    """Offsets of tensors of 8 bytes or none, in 24 bytes of data."""
    yield "a hole", [(0, 8), (16, 24)], "'t1' starts at byte 16 and leaves a hole"
    yield "a hole at the start", [(8, 16), (16, 24)], "leaves a hole"
    yield "an overlap", [(0, 8), (4, 12), (16, 24)], "overlaps the one before"
    yield "the same bytes twice", [(0, 8), (0, 8)], "overlaps the one before"
    yield "an empty tensor inside another", [(0, 8), (4, 4), (8, 16), (16, 24)], "overlaps"
    yield "bytes that are no tensor's", [(0, 8), (8, 16)], "8 bytes follow the last tensor"
    yield "bytes beyond the end", [(0, 8), (8, 16), (16, 24), (24, 32)], r"truncated: \d+ of \d+ bytes"
    yield "bytes far beyond the end", [(0, 8), (8, 16), (16, 24), (2**62, 2**62 + 8)], "leaves a hole"


def names() -> Iterator[tuple[str, str, str]]:
    """Yield names that no tensor may have."""
    yield "an empty name", "", "a tensor has an empty name"
    yield "a name of 513 bytes", "n" * 513, r"longer than 512 bytes[\s\S]*LORAIO_LIMITS=name_bytes"
    yield "a name of 200 characters of three bytes", "字" * 200, "longer than 512 bytes"
    yield "a name of a megabyte", "n" * 1_000_000, "longer than 512 bytes"
    for what, char in {
        "NUL": "\0",
        "a line break": "\n",
        "a carriage return": "\r",
        "an escape sequence": "\x1b",
        "a bell": "\a",
        "DEL": "\x7f",
        "a C1 control": "\x9b",
        "a right-to-left override": "\u202e",
        "a zero-width space": "\u200b",
        "a byte order mark": "\ufeff",
        "a soft hyphen": "\u00ad",
        "a line separator": "\u2028",
        "a paragraph separator": "\u2029",
        "a tag character": "\U000e0041",
    }.items():
        yield f"{what} in a name", f"conv{char}.weight", "which is not printable"


def pickles() -> Iterator[tuple[str, bytes, str]]:
    """Files named .pt."""
    state = {"fc.lora_A": torch.ones(2, 2048), "fc.lora_B": torch.ones(10, 2)}
    good = torch_saved(state)
    for protocol in (2, 4):
        yield (
            f"a pickle with a payload, protocol {protocol}",
            pickle.dumps(Payload(), protocol),
            "weights_only|asks for",
        )
    yield "a payload in a state dict", torch_saved({"w": Payload()}), r"asks for the Python object .*open"
    yield (
        "a payload in an archive",
        zipped({"archive/data.pkl": pickle.dumps(Payload()), "archive/version": b"3"}),
        "asks for|weights_only",
    )
    old = torch_saved({"w": Payload()}, _use_new_zipfile_serialization=False)
    yield "a payload in an old file", old, "asks for the Python object"
    for what, code in (
        ("os.system", b"cposix\nsystem\n"),
        ("eval", b"c__builtin__\neval\n"),
        ("a loader", b"ctorch\nload\n"),
    ):
        program = b"\x80\x02" + code + b"X\x0f\x00\x00\x00the-payload-ran\x85R."
        yield f"a call of {what}", program, "asks for|weights_only"
    yield "an archive that is cut", good[: len(good) // 2], r"without an end[\s\S]*fetch the file again"
    yield "an archive without a pickle", zipped({"a": b"b"}), "weights_only"
    bomb = zipped({"archive/data.pkl": bytes(30_000_000)}, zipfile.ZIP_DEFLATED)
    yield "an archive that unpacks to a thousand times itself", bomb, "compressed, which torch.save never does"
    yield "a pickle that is cut", pickle.dumps(list(range(1000)))[:-40], "weights_only"
    yield "a list", torch_saved([torch.ones(2)]), "holds list, not a state dict"
    yield "a tensor", torch_saved(torch.ones(2)), "holds Tensor, not a state dict"
    yield "an empty dict", torch_saved({}), "not a state dict"
    yield "numbers among tensors", torch_saved(state | {"epoch": 3}), "what is not a tensor is 'epoch'"
    yield "names that are numbers", torch_saved({1: torch.ones(2)}), "what is not a tensor is 1"
    yield "a stretched tensor", torch_saved({"w": torch.ones(1).expand(10**9)}), "tensors of 4,000,000,000 bytes"
    yield "a sparse tensor", torch_saved({"w": torch.eye(3).to_sparse()}), "what is not a tensor is 'w'"
    yield "a tensor without values", torch_saved({"w": torch.ones(2, device="meta")}), "what is not a tensor is 'w'"
    yield (
        "complex numbers of 128 bits",
        torch_saved({"w": torch.ones(2, dtype=torch.complex128)}),
        "what is not a tensor",
    )
    yield "safetensors by another name", raw({"w": entry()}, bytes(8))[:-1], "by another name|truncated"
    yield "an empty .pt", b"", "the file is empty"
    yield "HTML in a .pt", b"<!doctype html><html></html>", "an HTML page"
    yield "a Git LFS pointer in a .pt", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"

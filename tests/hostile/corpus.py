#!/usr/bin/env python3
"""Files of strangers that must be refused, each with what has to be said about it.

    python tests/hostile/corpus.py FOLDER      writes all of them, and expected.json with their messages

The published attacks are those of the audit of safetensors by Trail of Bits (2023): names that
occur twice, offsets that overlap, leave holes or overflow, headers of any length, and files that are of two formats at
once; those on pickles are as old as pickle.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import struct
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from loraio.adapter import Adapter, BaseReference, Target
from loraio.files import integrity, tensorfile
from loraio.files.tensors import dtype_code, tensor_bytes, tensor_sha256
from loraio.formats.native import to_document

PAYLOAD = "the-payload-ran"
"""The file that a pickle's payload would make in the current folder."""

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One file, or one folder.

    Attributes:
        name: what is wrong with it.
        files: contents by name; the first is the one that a command is given, or the folder if ``folder`` is set.
        match: a regular expression that the refusal has to match.
        role: who must refuse it, with that message: every command ("bytes"); those that take an "adapter", a "base", a
            base whose "network" they build, a "pack", or a file of torch.save ("pickle"); those that look into a "peft"
            folder. The others may refuse it or not, without a traceback.
        folder: whether the commands are given the folder.
    """

    name: str
    files: dict[str, bytes] = field(repr=False)
    match: str
    role: str = "bytes"
    folder: bool = False

    def write(self, folder: Path) -> Path:
        """Make it in a folder that is there; what the commands are given."""
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        return folder if self.folder else folder / next(iter(self.files))


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


# Bytes that are no safetensors file


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
    """What is often in the place of a file, and what shares its ending."""
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


# Headers


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
    """What no tensor may be called."""
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


# Documents of our own


def adapter_parts() -> tuple[Json, dict[str, Tensor]]:
    """The document and the tensors of an adapter that is right."""
    target = Target(rank=1, alpha=2, shape=(2, 1, 2, 2), dtype="F32", layer="Conv2d", base_sha256="01" * 32)
    factors = {f"w.{short}": torch.ones(shape) for short, shape in target.factor_shapes.items()}
    base = BaseReference(sha256="23" * 32, network="digit-cnn")
    adapter = Adapter(targets={"w": target}, factors=factors, base=base, training={"seed": 1})
    document: Json = json.loads(json.dumps(to_document(adapter)))
    return document, factors


def native(document: Any, tensors: dict[str, Tensor]) -> bytes:
    """A file that holds them, whose digests are right where its version has some."""
    if isinstance(document, str) or document.get("format_version") != integrity.SEALED:
        text = document if isinstance(document, str) else json.dumps(document)
        return save({name: tensor.clone() for name, tensor in tensors.items()}, metadata={"loraio": text})
    facts = {name: (dtype_code(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
    metadata = tensorfile.metadata_of(document, facts, lambda name: tensor_sha256(tensors[name]), where="it")
    start, placed = tensorfile.layout(facts, metadata, where="it")
    return start + b"".join(tensor_bytes(tensors[name]).numpy().tobytes() for name in placed)


def changed(tree: Any, way: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value in one place; ``...`` takes the place out."""
    if not way:
        return value
    copy = dict(tree)
    if len(way) == 1 and value is ...:
        del copy[way[0]]
    else:
        copy[way[0]] = changed(tree.get(way[0], {}), way[1:], value)
    return copy


def documents() -> Iterator[tuple[str, bytes, str]]:
    """Adapters of ours whose document is wrong."""
    good, factors = adapter_parts()
    target = ("targets", "w")
    for name, way, value, match in (
        ("version 99", ("format_version",), 99, r"format version 99[\s\S]*a newer loraio"),
        ("version as a text", ("format_version",), "1", "format version '1'"),
        ("version true", ("format_version",), True, "format_version|format version"),
        ("no version", ("format_version",), ..., "format version None"),
        ("targets a list", ("targets",), [], "'targets'|targets"),
        ("no targets", ("targets",), {}, "target"),
        ("a target that is a number", target, 1, "target 'w' is not a JSON object"),
        ("no rank", (*target, "rank"), ..., "target 'w' has no 'rank'"),
        ("rank 0", (*target, "rank"), 0, "rank"),
        ("rank -1", (*target, "rank"), -1, "rank"),
        ("rank 2**62", (*target, "rank"), 2**62, "rank|lora_A|63"),
        ("rank 10**30", (*target, "rank"), 10**30, "rank|lora_A|63"),
        ("rank as a float", (*target, "rank"), 1.0, "'rank'"),
        ("rank true", (*target, "rank"), True, "'rank'"),
        ("alpha as a text", (*target, "alpha"), "2", "'alpha'"),
        ("alpha of 400 digits", (*target, "alpha"), 10**400, "alpha"),
        ("kind lorra", (*target, "kind"), "lorra", "lorra"),
        ("kind of control characters", (*target, "kind"), "\x1b[2J", r"\\x1b\[2J"),
        ("layer os.system", (*target, "layer"), "os.system", r"os\.system"),
        ("scale rule", (*target, "scale_rule"), "alpha*r", r"alpha\*r"),
        ("shape of another rank", (*target, "shape"), [2, 4], "shape|dimensions"),
        ("shape with 0", (*target, "shape"), [0, 1, 2, 2], "shape|size"),
        ("shape of texts", (*target, "shape"), ["2", 1, 2, 2], "shape|size"),
        ("groups 0", (*target, "groups"), 0, "groups"),
        ("groups 3", (*target, "groups"), 3, "groups"),
        ("digest too short", (*target, "base_sha256"), "01", "base_sha256|digest|hexadecimal"),
        ("digest in capitals", (*target, "base_sha256"), "AB" * 32, "base_sha256|digest|hexadecimal"),
        ("dtype F8", (*target, "dtype"), "F8_E4M3", "F8_E4M3"),
        ("base a list", ("base",), [], "'base'"),
        ("no base", ("base",), ..., "'base'"),
        ("training a text", ("training",), "x", "'training'"),
        ("a target of another name", ("targets", "../../etc/passwd"), good["targets"]["w"], "etc/passwd"),
        ("whole that is not there", ("whole",), {"fc.weight": {"role": "head"}}, "whole tensor|'shape'"),
        ("sketch of texts", (*target, "sketch"), ["x"], "sketch"),
    ):
        yield name, native(changed(good, way, value), factors), match
    text = json.dumps(good)
    yield "a document that is no JSON", native("{", factors), "not JSON"
    yield "a document with a key twice", native(text[:-1] + ', "base": {}}', factors), "'base' occurs twice"
    yield "a deep document", native('{"targets":' * 1000 + "{}" + "}" * 1000, factors), "nested more than 64 deep"
    yield "a document with NaN", native(text[:-1] + ', "x": NaN}', factors), "NaN is not a JSON number"
    yield "a document with half a character", native(text[:-1] + ', "x": "\\ud800"}', factors), "half a surrogate"
    wide = native(text[:-1] + ', "x": [' + "1," * 400_000 + "1]}", factors)
    yield "a document of 400,000 numbers", wide, "more than 300,000 entries"
    for what, value in (("NaN", float("nan")), ("infinity", float("inf"))):
        for name in factors:
            wrong = factors | {name: torch.full_like(factors[name], value)}
            yield f"{what} in {name}", native(good, wrong), "NaN or infinity|NaN|infinit"
    yield "a factor too many", native(good, factors | {"v.lora_A": torch.ones(1)}), "v.lora_A"
    yield "a factor too few", native(good, {"w.lora_A": factors["w.lora_A"]}), "w.lora_B"
    yield "a factor of another shape", native(good, factors | {"w.lora_B": torch.ones(3, 1)}), r"\(3, 1\)"
    yield "a factor of integers", native(good, factors | {"w.lora_B": torch.ones(2, 1, dtype=torch.int64)}), "I64"


def packs() -> Iterator[tuple[str, bytes, str]]:
    """Packs whose index is wrong."""
    member, digest = torch.zeros(4, dtype=torch.uint8), "0" * 64

    def pack(listed: Any, tensors: dict[str, Tensor], version: Any = 1) -> bytes:
        return native({"format_version": version, "pack": listed}, tensors)

    for name in ("../evil", "a/b", "a\\b", "/etc/passwd", "C:x", ".", "..", ".hidden", "con?", "end.", " x", "x" * 250):
        yield f"a member called {name[:20]!r}", pack({name: digest}, {name: member}), "contradicts itself"
    yield "a member that is not there", pack({"a": digest}, {"b": member}), "is listed and not there"
    yield "a member of floats", pack({"a": digest}, {"a": torch.ones(2)}), "not a list of bytes"
    yield "a digest that is none", pack({"a": "xyz"}, {"a": member}), "not 64 hexadecimal digits"
    yield "names that differ in case", pack({"a": digest, "A": digest}, {"a": member, "A": member}), "one name"
    yield "a pack that is a list", pack([], {}), "'pack' is not a JSON object"
    yield "a pack of version 99", pack({"a": digest}, {"a": member}, 99), "pack version 99"
    yield "a pack of version true", pack({"a": digest}, {"a": member}, True), "pack version True"


# Files of other tools

PEFT = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["fc"], "bias": "none"}


def peft(config: Any, tensors: dict[str, Tensor] | None = None) -> dict[str, bytes]:
    pair = {
        "base_model.model.fc.lora_A.weight": torch.ones(2, 2048),
        "base_model.model.fc.lora_B.weight": torch.ones(10, 2),
    }
    text = config if isinstance(config, bytes) else json.dumps(config).encode()
    return {"adapter_model.safetensors": save(tensors or pair), "adapter_config.json": text}


def peft_folders() -> Iterator[tuple[str, dict[str, bytes], str, str]]:
    """Folders of PEFT: name, files, message, and who must give it."""
    yield "PEFT: an empty configuration", peft(b""), "the file is empty", "bytes"
    yield "PEFT: a configuration that is HTML", peft(b"<html></html>"), "not JSON but an HTML page", "bytes"
    yield "PEFT: a configuration that is a list", peft([]), "not a JSON object", "bytes"
    yield "PEFT: a deep configuration", peft(b'{"r":' * 1000), "nested more than 64 deep", "bytes"
    yield "PEFT: a key twice", peft(b'{"r": 1, "r": 2}'), "'r' occurs twice", "bytes"
    yield "PEFT: NaN in the configuration", peft(b'{"r": NaN}'), "NaN is not a JSON number", "bytes"
    yield "PEFT: a configuration of 6 MB", peft(b'{"r": "' + b"x" * 6_000_000 + b'"}'), "longer than 5,000,000", "bytes"
    yield "PEFT: a broken pattern", peft(PEFT | {"target_modules": "(fc"}), "is no regular expression", "adapter"
    yield (
        "PEFT: a pattern 2,000 groups deep",
        peft(PEFT | {"target_modules": "(" * 2000 + ")" * 2000}),
        "regular",
        "adapter",
    )
    many = {f"x{number}(a+)+": 1 for number in range(3_000)}
    yield "PEFT: three thousand patterns", peft(PEFT | {"rank_pattern": many}), "take too long to match", "adapter"
    yield "PEFT: a pattern of 30,000 bytes", peft(PEFT | {"target_modules": "a" * 30_000}), "at most 20,000", "adapter"
    endless = PEFT | {"target_modules": r"((f|c)+)+\1$"}
    yield "PEFT: a pattern with a reference", peft(endless), "may take very long|is not in target_modules", "adapter"
    yield "PEFT: rank_pattern a list", peft(PEFT | {"rank_pattern": ["x"]}), "rank_pattern is", "adapter"
    yield "PEFT: a rank that is not the tensors'", peft(PEFT | {"r": 8}), "says rank 8, the tensors have 2", "adapter"
    yield "PEFT: an unknown setting", peft(PEFT | {"use_magic": True}), "unknown setting 'use_magic'", "adapter"
    yield "PEFT: another method", peft(PEFT | {"peft_type": "VERA"}), "peft_type is 'VERA'", "adapter"
    yield "PEFT: alpha a list", peft(PEFT | {"lora_alpha": [1]}), r"alpha is \[1\], not a number", "adapter"
    alone = {"base_model.model.fc.lora_A.weight": torch.ones(2, 2048)}
    yield "PEFT: half a pair", peft(PEFT, alone), "lora_B is missing", "adapter"
    two = {f"base_model.model.fc.lora_{s}.{n}.weight": torch.ones(2, 2) for s in "AB" for n in ("one", "two")}
    yield "PEFT: two adapters", peft(PEFT, two), "it holds 2 adapters", "adapter"
    infinite = {"base_model.model.fc.lora_A.weight": torch.full((2, 2048), float("inf"))}
    infinite["base_model.model.fc.lora_B.weight"] = torch.ones(10, 2)
    yield "PEFT: infinity in a factor", peft(PEFT, infinite), "NaN or infinity|infinit", "adapter"


def foreign() -> Iterator[tuple[str, str, bytes, str]]:
    """Single files of other tools: name, file name, content, message."""
    one, nan = torch.tensor(1.0), float("nan")

    def tensors(**shapes: Any) -> dict[str, Tensor]:
        return {key.replace("__", "."): torch.ones(shape) for key, shape in shapes.items()}

    fc = {"lora_unet_fc.lora_down.weight": torch.ones(2, 2048), "lora_unet_fc.lora_up.weight": torch.ones(10, 2)}
    for name, content, match in (
        ("kohya: no up", tensors(lora_unet_fc__lora_down__weight=(2, 2048)), "lora_up|missing"),
        ("kohya: alpha of three numbers", fc | {"lora_unet_fc.alpha": torch.ones(3)}, "should be one number"),
        ("kohya: alpha a truth value", fc | {"lora_unet_fc.alpha": torch.tensor(True)}, "should be a number"),
        ("kohya: alpha NaN", fc | {"lora_unet_fc.alpha": torch.tensor(nan)}, "alpha|nan"),
        ("kohya: alpha infinite", fc | {"lora_unet_fc.alpha": torch.tensor(float("inf"))}, "alpha|inf"),
        ("kohya: NaN in a factor", fc | {"lora_unet_fc.lora_up.weight": torch.full((10, 2), nan)}, "NaN"),
        ("kohya: factors of integers", {key: value.long() for key, value in fc.items()}, "I64"),
        ("kohya: factors of no dimension", dict.fromkeys(fc, one), "lora_down|shape|no pair"),
        ("kohya: a slot that nobody knows", fc | {"lora_unet_fc.evil": one}, "evil"),
        ("kohya: a layer that the base lacks", {k.replace("_fc", "_no"): v for k, v in fc.items()}, "no"),
        ("lycoris: half a Hadamard product", tensors(lycoris_fc__hada_w1_a=(10, 2)), "hada|missing"),
        (
            "lycoris: a Kronecker product of no numbers",
            tensors(lycoris_fc__lokr_w1=(0, 0), lycoris_fc__lokr_w2=(1, 1)),
            "lokr",
        ),
        ("lycoris: a change of another shape", tensors(lycoris_fc__diff=(3, 3)), r"\(3, 3\)|diff"),
        ("diffusers: no pair", tensors(unet__fc__lora_A__weight=(2, 2048)), "lora_B is missing"),
        (
            "diffusers: ranks that differ",
            tensors(unet__fc__lora__down__weight=(2, 2048), unet__fc__lora__up__weight=(10, 3)),
            "rank",
        ),
        ("loralib: no pair", tensors(fc__lora_A=(2, 2048)), "lora_B is missing"),
        ("loralib: shapes that make no pair", tensors(fc__lora_A=(2, 2048), fc__lora_B=(10, 3)), "no pair"),
        ("torchtune: experts", tensors(fc__lora_gate_a=(2, 2)), "experts"),
        ("torchtune: no pair", tensors(fc__lora_a__weight=(2, 2048)), "lora_b|missing"),
        ("minlora: no pair", tensors(fc__parametrizations__weight__0__lora_A=(2, 2048)), "lora_B of parametrization 0"),
        (
            "minlora: a place of 30 digits",
            {f"fc.parametrizations.weight.{'9' * 30}.lora_A": torch.ones(2, 2)},
            "missing",
        ),
    ):
        yield name, "adapter.safetensors", save({key: value.clone() for key, value in content.items()}), match
    metadata = {"lora_adapter_metadata": '{"unet.r":' * 100}
    pair = tensors(unet__fc__lora_A__weight=(2, 2048), unet__fc__lora_B__weight=(10, 2))
    yield "diffusers: deep metadata", "adapter.safetensors", save(pair, metadata=metadata), "nested more than 64"
    for name, key, match in (
        ("loralib .pt", "fc.lora_A", "lora_B is missing"),
        ("torchtune .pt", "fc.lora_a.weight", "missing|lora_b"),
    ):
        yield f"{name}: no pair", "adapter.pt", torch_saved({key: torch.ones(2, 2048)}), match
    yield (
        "minlora .pt: no pair",
        "adapter.pt",
        torch_saved({"fc.parametrizations.weight.0.lora_A": torch.ones(2, 2048)}),
        "lora_B",
    )


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


# Base checkpoints


def bases() -> Iterator[tuple[str, dict[str, bytes], str]]:
    """Checkpoints that no base can be, and parted ones whose index lies; names of files with their contents."""
    part = save({"a.weight": torch.ones(2)})

    def index(places: Any, **more: Any) -> dict[str, bytes]:
        text = json.dumps({"metadata": {}, "weight_map": places, **more}).encode()
        return {"a.safetensors.index.json": text, "a-1.safetensors": part}

    for name in ("../a-1.safetensors", "/etc/passwd", "/tmp/x.safetensors", "..\\a-1.safetensors", "sub/a.safetensors"):
        yield f"a part at {name!r}", index({"a.weight": name}), "plain names of files in the index's own folder"
    for part_name in (
        "C:a.safetensors",
        "a-1.safetensors\0",
        "file:///a.safetensors",
        "a-1.bin",
        "",
        1,
        None,
        ["a"],
        "~/.x",
    ):
        yield f"a part called {part_name!r}", index({"a.weight": part_name}), "plain names of files"
    yield "a part that is not there", index({"a.weight": "b.safetensors"}), "do not belong together[^$]*does not exist"
    yield "a tensor that no part has", index({"b.weight": "a-1.safetensors"}), "'b.weight' is not in"
    yield "a part that is the index", index({"a.weight": "a.safetensors.index.json"}), "plain names of files"
    yield "an index that is a list", {"a.safetensors.index.json": b"[]"}, "no 'weight_map'"
    yield "an empty index", {"a.safetensors.index.json": b""}, "the file is empty"
    yield "an index that is HTML", {"a.safetensors.index.json": b"<html></html>"}, "not JSON but an HTML page"
    yield "an index with a tensor twice", {"a.safetensors.index.json": b'{"weight_map": {"a": "b", "a": "b"}}'}, "twice"
    yield "a deep index", {"a.safetensors.index.json": b'{"weight_map":' * 1000}, "nested more than 64 deep"
    wide = b'{"weight_map": [' + b"1," * 400_000 + b"1]}"
    yield "an index of 400,000 numbers", {"a.safetensors.index.json": wide}, "more than 300,000 entries"
    damaged = index({"a.weight": "a-1.safetensors"}) | {"a-1.safetensors": part[:-1]}
    yield "a part that is truncated", damaged, "truncated: "
    yield "a part that is a pointer", damaged | {"a-1.safetensors": b"version https://git-lfs\n"}, "Git LFS pointer"


def single_bases() -> Iterator[tuple[str, bytes, str]]:
    """Checkpoints in one file."""
    w = {"w": torch.ones(2)}
    yield "a base of no tensors", save({}), "holds no tensors"
    yield "a base that is an adapter", native(*adapter_parts()), "is an adapter, not a base model"
    yield "a base of version 99", native({"format_version": 99, "network": "digit-cnn"}, w), "99"
    listed = {"format_version": 1, "network": "digit-cnn", "network_args": []}
    yield "network_args a list", native(listed, w), "options are"
    yield "a network that is a number", native({"format_version": 1, "network": 1}, w), "network is 1, not a name"
    yield "a dtype that torch lacks", raw({"w": entry("F4", (4,), (0, 2))}, bytes(2)), "F4"


def networks() -> Iterator[tuple[str, bytes, str]]:
    """Checkpoints that say of what network they are."""
    w = {"w": torch.ones(2)}
    yield "code", native({"format_version": 1, "network": "os:system"}, w), "does not get to run"
    yield "one that nobody knows", native({"format_version": 1, "network": "evil-cnn"}, w), "no network 'evil-cnn'"
    args = {"format_version": 1, "network": "torchvision:resnet18", "network_args": {"weights": "DEFAULT"}}
    yield "one that asks for a download", native(args, w), "asks for them"


def cases() -> list[Case]:
    """All of them."""
    found: list[Case] = []

    def one(name: str, content: bytes, match: str, role: str = "bytes", file: str = "some.safetensors") -> None:
        found.append(Case(name=name, files={file: content}, match=match, role=role))

    for name, content, match in (*other_formats(), *polyglots(), *lengths()):
        one(name, content, match)
    for name, text, match in json_texts():
        one(f"JSON: {name}", raw(text, bytes(8)), match)
    for name, header, match in headers():
        one(f"header: {name}", raw(header, bytes(8)), match)
    for name, offsets, match in layouts():
        header = {
            f"t{n}": entry(shape=((end - begin) // 4,), offsets=(begin, end)) for n, (begin, end) in enumerate(offsets)
        }
        one(f"layout: {name}", raw(header, bytes(24)), match)
    for name, called, match in names():
        one(f"name: {name}", raw({called: entry()}, bytes(8)), match)
    tensors = {f"t{number}": entry(shape=(0,), offsets=(0, 0)) for number in range(30_001)}
    one("30,001 tensors", raw(json.dumps(tensors, separators=(",", ":"))), "30,001 tensors, at most 30,000")
    one(
        "a header of 6 MB",
        raw(with_pad(b"{}", 6_000_000)),
        r"6,000,000 bytes, at most 5,000,000[\s\S]*LORAIO_LIMITS=header_bytes",
    )
    for name, content, match in documents():
        one(f"document: {name}", content, match, "adapter")
    for name, content, match in packs():
        one(f"pack: {name}", content, match, "pack", "some.pack")
    for name, content, match in pickles():
        one(f"pickle: {name}", content, match, "pickle", "some.pt")
    for name, content, match in single_bases():
        one(f"base: {name}", content, match, "base")
    for name, content, match in networks():
        one(f"network: {name}", content, match, "network")
    for name, files, match in bases():
        found.append(Case(name=f"parted: {name}", files=files, match=match, role="base"))
    for name, files, match, role in peft_folders():
        found.append(
            Case(name=name, files=files, match=match, role="adapter" if role == "adapter" else "peft", folder=True)
        )
    for name, file, content, match in foreign():
        one(name, content, match, "adapter", file)
    assert len({case.name for case in found}) == len(found)
    return found


def write_all(folder: Path) -> dict[str, str]:
    """Each case in a folder of its own, numbered; the messages by the path of what a command is given."""
    expected = {}
    for number, case in enumerate(cases()):
        place = folder / f"{number:03}"
        place.mkdir(parents=True)
        expected[str(case.write(place).relative_to(folder))] = f"{case.name}: {case.match}"
    return expected


if __name__ == "__main__":
    target = Path(sys.argv[1])
    (target / "expected.json").write_text(json.dumps(write_all(target), indent=1))

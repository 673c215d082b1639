"""Committed files: today's writer must give their bytes, today's reader their values.

A change here is a change of the file format. The files were made by ``loraio.save`` from the literals below, each by a
loraio that wrote its version.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch

import loraio
from loraio.adapter import Adapter, BaseReference, Target

FILE = Path(__file__).parent / "adapter-v2.safetensors"
FIRST = Path(__file__).parent / "adapter-v1.safetensors"

A1 = [[0.5, -0.25, 1.0, 0.0]]
B1 = [[1.0], [-2.0]]
A2 = [[0.125, -0.0, 3.0], [1.5, 2.0, -0.75]]
B2 = [[1.0, 0.5], [-1.0, 2.0], [0.0, 0.25], [-0.5, 4.0]]


def golden() -> Adapter:
    """Two targets of other layers, ranks, rules and dtypes, with a key at each level that no version knows."""
    return Adapter(
        targets={
            "conv1.weight": Target(
                rank=1, alpha=2, shape=(2, 1, 2, 2), dtype="F32", layer="Conv2d", groups=2, base_sha256="01" * 32
            ),
            "é.fc.weight": Target(
                rank=2,
                alpha=1.5,
                shape=(4, 3),
                dtype="F16",
                layer="Linear",
                base_sha256="23" * 32,
                scale_rule="alpha/sqrt(r)",
                extra={"x-note": "kept"},
            ),
        },
        factors={
            "conv1.weight.lora_A": torch.tensor(A1),
            "conv1.weight.lora_B": torch.tensor(B1),
            "é.fc.weight.lora_A": torch.tensor(A2, dtype=torch.bfloat16),
            "é.fc.weight.lora_B": torch.tensor(B2, dtype=torch.float64),
        },
        base=BaseReference(sha256="45" * 32, network="digit-cnn", extra={"x-url": None}),
        training={"dataset": "digits", "digit": 3, "lr": 0.001, "results": {"after": 0.5, "before": 0.25}},
        extra={"x-tags": ["a", 1, True]},
    )


def test_the_writer_gives_the_bytes_of_the_file(tmp_path: Path) -> None:
    loraio.save(golden(), tmp_path / "new")
    assert (tmp_path / "new").read_bytes() == FILE.read_bytes()


@pytest.mark.parametrize("file", [FIRST, FILE])
def test_the_reader_gives_the_values_of_the_file(file: Path) -> None:
    read = loraio.load(file)
    assert read == golden()
    assert type(read.targets["conv1.weight"].alpha) is int
    assert read.factors["conv1.weight.lora_A"].tolist() == A1
    assert read.factors["é.fc.weight.lora_B"].tolist() == B2


@pytest.mark.parametrize(
    ("file", "sha256"),
    [
        (FIRST, "8e6e6f0f770f7842381c826885981f49ffbaf0072da30af92985bc018cc793c9"),
        (FILE, "0bafaf800d9a5e8922ad2ea32edae74f31e0d727aed0f63b527a4c41c05a2977"),
    ],
)
def test_the_file_is_the_one_that_was_committed(file: Path, sha256: str) -> None:
    assert hashlib.sha256(file.read_bytes()).hexdigest() == sha256


def test_a_second_reader_written_from_the_specification_finds_the_same() -> None:
    content = FILE.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    data = content[8 + length :]

    def values(name: str, code: str) -> tuple[float, ...]:
        begin, end = header[name]["data_offsets"]
        return struct.unpack(f"<{(end - begin) // struct.calcsize(code)}{code}", data[begin:end])

    def flat(rows: list[list[float]]) -> tuple[float, ...]:
        return tuple(value for row in rows for value in row)

    assert values("conv1.weight.lora_A", "f") == flat(A1)
    assert values("conv1.weight.lora_B", "f") == flat(B1)
    assert values("é.fc.weight.lora_B", "d") == flat(B2)
    bfloats = [struct.unpack("<f", struct.pack("<I", bits << 16))[0] for bits in values("é.fc.weight.lora_A", "H")]
    assert bfloats == list(flat(A2))
    document = json.loads(header.pop("__metadata__")["loraio"])
    assert document["format_version"] == 2
    assert document["targets"]["é.fc.weight"]["alpha"] == 1.5
    own = document["integrity"]["file"].encode()
    assert hashlib.sha256(content[: 8 + length].replace(own, b"0" * 64)).hexdigest() == own.decode()
    digests = base64.b64decode(document["integrity"]["tensors"])
    for place, name in enumerate(sorted(header, key=lambda name: header[name]["data_offsets"])):
        begin, end = header[name]["data_offsets"]
        assert hashlib.sha256(data[begin:end]).digest() == digests[32 * place : 32 * place + 32]
    assert set(header) == {f"{name}.{short}" for name in document["targets"] for short in ("lora_A", "lora_B")}

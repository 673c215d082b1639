"""Merge on files: proven before the file gets its name."""

from __future__ import annotations

import os
from io import FileIO
from pathlib import Path

import pytest
import torch
from checkpoints import State

import loraio
from loraio.errors import OutputExistsError, VerificationError
from loraio.files import copying, tensorfile
from loraio.merging import checkpoint_writer, plans


def test_the_file_holds_what_merge_gives_and_says_what_was_merged(
    files: Path, state: State, three: loraio.Adapter, tmp_path: Path
) -> None:
    result = loraio.merge_file(
        files / "base.safetensors", files / "three.safetensors", tmp_path / "m.safetensors", strength=0.5
    )
    assert result.path == tmp_path / "m.safetensors"
    assert result.weights.ok
    checkpoint = loraio.read_base(result.path)
    expected = loraio.merge(state, three, 0.5)
    assert checkpoint.state.keys() == expected.keys()
    assert all(checkpoint.state[name].equal(expected[name]) for name in expected)
    assert checkpoint.network == "digit-cnn"
    assert checkpoint.document["sha256"] == result.sha256
    told = {"kinds": ["lora"], "ranks": [4], "targets": 3, "network": "digit-cnn"}
    assert checkpoint.document["merged"] == [
        {
            "adapter": told | {"dataset": "digits", "digit": 3, "seed": 1, "steps": 40},
            "adapter_sha256": loraio.bases.identity.state_sha256(three.factors),
            "base_sha256": three.base.sha256,
            "changed": {name: loraio.bases.identity.tensor_sha256(expected[name]) for name in three.targets},
            "strength": 0.5,
            "versions": {"loraio": loraio.__version__, "torch": str(torch.__version__)},
        }
    ]
    assert checkpoint.receipts == (result.receipt,)


def test_a_fast_merge_writes_the_bits_of_a_fast_merge_in_memory(
    files: Path, state: State, three: loraio.Adapter, tmp_path: Path
) -> None:
    path = tmp_path / "fast.safetensors"
    loraio.merge_file(files / "base.safetensors", files / "three.safetensors", path, exact=False)
    found, expected = loraio.read_base(path).state, loraio.merge(state, three, exact=False)
    assert all(found[name].equal(expected[name]) for name in expected)


def test_a_plain_pickled_state_dict_can_be_merged_without_its_network(
    files: Path, state: State, tmp_path: Path
) -> None:
    torch.save(state, tmp_path / "base.pt")
    result = loraio.merge_file(tmp_path / "base.pt", files / "three.safetensors", tmp_path / "m.safetensors")
    assert result.sha256 == loraio.read_base(files / "merged.safetensors").document["sha256"]


@pytest.mark.parametrize("name", ["conv1.weight", "conv1.bias"])
def test_a_file_that_reads_back_wrong_is_not_kept(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    header = tensorfile.read_header(files / "merged.safetensors")
    damaged_byte = 8 + header.header_bytes + header.tensors[name].begin + 2
    real = copying.read_into

    def damaged(file: FileIO, begin: int, room: memoryview) -> None:
        real(file, begin, room)
        temporary = Path(os.fsdecode(file.name)).name.startswith(".")
        if temporary and begin <= damaged_byte < begin + len(room):
            room[damaged_byte - begin] ^= 16

    for module in (checkpoint_writer, plans):
        monkeypatch.setattr(module, "read_into", damaged)
    target = tmp_path / "m.safetensors"
    target.write_bytes(b"old")
    with pytest.raises(VerificationError, match="nothing was written"):
        loraio.merge_file(files / "base.safetensors", files / "three.safetensors", target, overwrite=True)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_an_existing_output_is_refused_before_anything_is_read(files: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"x")
    with pytest.raises(OutputExistsError, match="exists"):
        loraio.merge_file(tmp_path / "missing", files / "three.safetensors", tmp_path / "taken")

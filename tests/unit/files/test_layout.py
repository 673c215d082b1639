"""Check that the same input always gives the same bytes, which read back to the bit."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from outputs import only
from safetensors.torch import save

from loraio.errors import FormatError, MissingFileError
from loraio.files import tensorfile
from loraio.files.tensorfile import read_header, read_tensors
from loraio.files.tensors import TORCH_DTYPES, tensor_sha256


def test_what_was_written_is_read_back_to_the_bit(path: Path) -> None:
    tensors = {
        name: (torch.arange(6).reshape(2, 3) % 2).to(getattr(torch, dtype)) for name, dtype in TORCH_DTYPES.items()
    }
    tensors |= {"scalar": torch.tensor(-0.0), "empty": torch.ones(0, 3), "é/../x": torch.tensor([float("nan")])}
    tensorfile.write(tensors, path, document={"b": [1, "é"], "a": None})
    header = read_header(path)
    assert header.document() == {"a": None, "b": [1, "é"]}
    start = '{"a":null,"b":[1,"é"],"integrity":{"file":"'
    assert list(header.metadata) == ["loraio"]
    assert header.metadata["loraio"].startswith(start)
    assert header.digests == {name: tensor_sha256(tensor) for name, tensor in tensors.items()}
    read = read_tensors(header)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert read[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))


def test_tied_views_and_non_contiguous_tensors_are_written_right(path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    parameter = torch.nn.Parameter(whole.clone())
    tensors = {
        "whole": whole,
        "tied": whole,
        "row": whole[1],
        "transposed": whole.T,
        "strided": whole[::2, 1::2],
        "expanded": torch.tensor([1.0]).expand(5),
        "channels_last": torch.arange(48.0).reshape(1, 3, 4, 4).to(memory_format=torch.channels_last),
        "parameter": parameter,
        "empty": torch.ones(0),
        "other empty": torch.ones(0, 2),
    }
    tensorfile.write(tensors, path, document={})
    read = read_tensors(read_header(path))
    assert all(read[name].equal(tensor) for name, tensor in tensors.items())
    assert whole.equal(torch.arange(24.0).reshape(4, 6))


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"é": "ü", "a": ""}])
def test_without_a_document_the_bytes_are_those_of_the_library(path: Path, metadata: dict[str, str] | None) -> None:
    tensors = {"é": torch.ones(3), "b": torch.zeros(2, 2).half(), "a": torch.ones(1).half()}
    for length in range(1, 10):  # each padding
        tensors |= {"n" * length: torch.tensor(7)}
        tensorfile.write(tensors, path, metadata=metadata, overwrite=True)
        if metadata is None or len(metadata) == 1:  # the library orders several strings at random
            assert path.read_bytes() == save(tensors, metadata=metadata)
        assert read_header(path).metadata == (metadata or {})
        assert (8 + read_header(path).header_bytes) % 8 == 0


def test_a_document_that_has_its_digests_gets_a_place_for_that_of_the_file_alone() -> None:
    facts: dict[str, Any] = {"w": ("F32", (2,))}
    for digest_of, entries in [(None, {"file"}), (lambda name: "0" * 64, {"file", "tensors"})]:
        found = json.loads(tensorfile.metadata_of({"a": 1}, facts, digest_of, where="here")["loraio"])
        assert found.keys() == {"a", "integrity"}
        assert found["integrity"].keys() == entries


def test_the_bytes_depend_neither_on_the_order_of_tensors_nor_of_keys(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    tensorfile.write({"a": torch.ones(2), "b": torch.zeros(3)}, one, document={"x": 1, "y": {"p": 1, "q": 2}})
    tensorfile.write({"b": torch.zeros(3), "a": torch.ones(2)}, two, document={"y": {"q": 2, "p": 1}, "x": 1})
    assert one.read_bytes() == two.read_bytes()


def test_processes_with_other_hash_seeds_write_the_same_bytes(tmp_path: Path) -> None:
    script = """
import sys, torch
from loraio.files import tensorfile
tensors = {name: torch.ones(2) for name in {"conv1", "conv2", "fc", "bias"}}
tensorfile.write(tensors, sys.argv[1], document={key: {"a": 1, "b": 2} for key in {"x", "y", "z", "w"}})
"""
    sums = set()
    for seed in ("0", "7"):
        file = tmp_path / seed
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", script, file], env=environment, check=True, timeout=120)
        sums.add(hashlib.sha256(file.read_bytes()).hexdigest())
    assert len(sums) == 1


@pytest.mark.parametrize(
    ("tensor", "options", "match"),
    [
        *(("", {"document": {}}, "empty name"), ("__metadata__", {"document": {}}, "where the metadata are")),
        ("half \ud800", {"document": {}}, "holds half a surrogate pair|not printable"),
        ("w", {"document": {"a": "\ud800"}}, r"\\ud800.* holds half a surrogate pair"),
        ("w", {"metadata": {"a": "\ud800"}}, "holds half a surrogate pair"),
        *(("w", {"document": {"a": value}}, "not plain JSON: ") for value in ({1, 2}, float("nan"), b"bytes")),
    ],
)
def test_names_and_documents_that_no_file_can_hold_are_refused(
    path: Path, tensor: str, options: dict[str, Any], match: str
) -> None:
    with pytest.raises(FormatError, match=match) as caught:
        tensorfile.write({tensor: torch.ones(1)}, path, **options)
    assert repr(str(path)) in str(caught.value)
    only(path.parent)


def test_a_file_that_changes_after_its_header_was_read_is_an_error(path: Path) -> None:
    tensorfile.write({"a": torch.ones(40), "b": torch.zeros(40)}, path, document={"x": 1})
    header, whole = tensorfile.read_header(path), path.read_bytes()
    path.write_bytes(whole[:-8])
    here = rf"[^$]*{re.escape(repr(str(path)))}"
    with pytest.raises(FormatError, match="the file ends within 'b': it changed while it was being read" + here):
        tensorfile.read_tensors(header)
    tensorfile.write({"a": torch.ones(40), "c": torch.zeros(40)}, path, document={"x": 1}, overwrite=True)
    with pytest.raises(FormatError, match="the header changed while the file was being read" + here):
        tensorfile.read_tensors(header)
    path.unlink()
    with pytest.raises(MissingFileError, match="does not exist"):
        tensorfile.read_tensors(header)

"""Files are checked against their digests: damage is named, and files without digests are not complete."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import loraio
from loraio.errors import MissingFileError
from loraio.files import tensorfile
from loraio.formats.checking import checkable

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture
def folder(files: Path, base: nn.Module, tmp_path: Path) -> Path:
    """Two adapters, their pack and a base."""
    for name in ("three", "seven"):
        shutil.copy(files / f"{name}.safetensors", tmp_path)
    loraio.pack([tmp_path / "three.safetensors", tmp_path / "seven.safetensors"], tmp_path / "all.safetensors")
    loraio.save_base(base, tmp_path / "base.safetensors")
    return tmp_path


def flipped(path: Path, position: int) -> Path:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    return path


def data_of(path: Path, name: str) -> int:
    """Return the offset of a tensor's bytes in the file."""
    header = tensorfile.read_header(path)
    return 8 + header.header_bytes + header.tensors[name].begin


def test_whole_files_are_ok_and_complete(folder: Path) -> None:
    kinds = {}
    for path in checkable(folder):
        found = loraio.check(path)
        assert (found.ok, found.complete, found.problems) == (True, True, ())
        assert found.bytes == path.stat().st_size
        kinds[path.stem] = (found.kind, found.tensors)
    state = loraio.read_base(folder / "base.safetensors").state
    assert kinds == {
        "all": ("pack", 2),
        "base": ("base", len(state)),
        "seven": ("adapter", len(loraio.load(folder / "seven.safetensors").factors)),
        "three": ("adapter", len(loraio.load(folder / "three.safetensors").factors)),
    }


def test_a_residue_is_a_kind_of_its_own_and_checked_beside_its_checkpoint(files: Path, tmp_path: Path) -> None:
    path, residue = (tmp_path / name for name in ("m.safetensors", "m.safetensors.residue"))
    loraio.merge_file(files / "base.safetensors", files / "three.safetensors", path, reversible=True)
    found = loraio.check(residue)
    assert (found.kind, found.ok, found.complete, found.tensors) == ("residue", True, True, 3)
    assert checkable(tmp_path) == [path, residue]
    flipped(residue, data_of(residue, "conv2.weight") + 9)
    assert "'conv2.weight' has another SHA-256" in "\n".join(loraio.check(residue).problems)


@pytest.mark.parametrize("file", ["three", "base"])
def test_the_damaged_tensor_is_named_and_no_other(folder: Path, file: str) -> None:
    path = folder / f"{file}.safetensors"
    names = list(tensorfile.read_header(path).tensors)
    flipped(path, data_of(path, names[1]))
    found = loraio.check(path)
    assert not found.ok
    text = "\n".join(found.problems)
    assert f"1 of {len(names)} tensors" in text
    assert repr(names[1]) in text
    assert not any(repr(name) in text for name in names if name != names[1])


def test_the_damaged_member_of_a_pack_is_named(folder: Path) -> None:
    path = folder / "all.safetensors"
    flipped(path, data_of(path, "three") + 5000)
    found = loraio.check(path)
    assert len(found.problems) == 1
    assert "'three'" in found.problems[0]


def test_damage_in_a_header_is_named_too(folder: Path) -> None:
    path = folder / "three.safetensors"
    place = path.read_bytes().index(b"alpha/r") + 1
    found = loraio.check(flipped(path, place))
    assert (found.ok, found.kind) == (False, "unreadable")
    assert "its header is not what was written" in found.problems[0]


@pytest.mark.parametrize("what", ["tensor", "header of a shard", "index", "shard of another checkpoint"])
def test_a_sharded_checkpoint_is_checked_shard_by_shard(
    what: str, files: Path, trained_base: nn.Module, write_parts: Callable[..., Path], tmp_path: Path
) -> None:
    base = write_parts(trained_base.state_dict(), tmp_path / "base")
    merged = loraio.merge_file(base, files / "three.safetensors", tmp_path / "merged")
    index = merged.path
    assert (loraio.check(index).ok, loraio.check(index).complete) == (True, True)
    assert checkable(index.parent) == [index]
    part = merged.parts[0]
    name = next(iter(tensorfile.read_header(part).tensors))
    if what == "tensor":
        flipped(part, data_of(part, name))
    elif what == "header of a shard":
        save_file(load_file(part), part, {"format": "pt"})
    elif what == "index":
        index.write_text(index.read_text().replace('"strength": 1.0', '"strength": 2.0'))
    else:
        other = loraio.merge_file(base, files / "three.safetensors", tmp_path / "other", strength=0.5)
        shutil.copy(other.parts[0], part)
    found = loraio.check(index)
    assert not found.ok
    assert any((name if what == "tensor" else "") in line for line in found.problems)


def test_files_without_digests_are_in_order_and_not_complete(tmp_path: Path) -> None:
    plain = tmp_path / "plain.safetensors"
    save_file({"w": torch.ones(3)}, plain)
    for path, kind in ((plain, "other"), (GOLDEN / "adapter-v1.safetensors", "adapter")):
        found = loraio.check(path)
        assert (found.ok, found.complete, found.kind, found.tensors) == (True, False, kind, 0)


def test_the_digest_of_a_base_of_the_first_version_is_compared(base: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    loraio.save_base(base, path)
    header = tensorfile.read_header(path)
    text = json.dumps({**(header.document() or {}), "format_version": 1})
    save_file(tensorfile.read_tensors(header), path, {"loraio": text})
    assert loraio.check(path).ok
    found = loraio.check(flipped(path, data_of(path, "fc.bias")))
    assert found.problems == ("the weights have another digest than its metadata say",)


def test_a_file_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError):
        loraio.check(tmp_path / "none.safetensors")
    with pytest.raises(MissingFileError):
        checkable(tmp_path / "none")


def test_links_and_hidden_files_are_passed_over_and_folders_inside_are_not(folder: Path) -> None:
    inner = folder / "inner"
    inner.mkdir()
    shutil.copy(folder / "three.safetensors", inner / "deep.safetensors")
    (folder / "link.safetensors").symlink_to(folder / "three.safetensors")
    (folder / ".hidden.safetensors").write_bytes(b"")
    (folder / "loop").symlink_to(folder)
    names = [str(path.relative_to(folder)) for path in checkable(folder)]
    assert names == [f"{name}.safetensors" for name in ("all", "base", "inner/deep", "seven", "three")]

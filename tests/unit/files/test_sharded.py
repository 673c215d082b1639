"""Read sharded checkpoints, headers alone or tensors too; both refuse the same files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import loraio
from loraio.errors import FormatError, MissingFileError
from loraio.files.sharded import INDEX_SUFFIX, is_sharded, read_sharded_header

Read = Callable[[Path], Any]
WriteParts = Callable[..., Path]


@pytest.fixture(params=[read_sharded_header, loraio.read_base], ids=["header", "base"])
def read(request: pytest.FixtureRequest) -> Read:
    """Each function that reads an index."""
    reader: Read = request.param
    return reader


def test_the_headers_are_those_of_the_tensors(write_parts: WriteParts, base: nn.Module, tmp_path: Path) -> None:
    state = base.state_dict()
    index = write_parts(state, tmp_path / "parts")
    files = sorted(index.parent.glob("*.safetensors"))
    for path in (index, index.parent):
        assert is_sharded(path)
        parted = read_sharded_header(path)
        assert parted.index == index
        assert [header.path for header in parted.headers.values()] == files
        assert [(name, info.shape) for name, info in parted.tensors.items()] == [
            (name, tuple(tensor.shape)) for name, tensor in state.items()
        ]
        assert parted.file_bytes == sum(file.stat().st_size for file in files)
        assert parted.file_bytes - parted.header_bytes - 2 * 8 == sum(tensor.nbytes for tensor in state.values())


def test_other_names_are_no_sharded_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").touch()
    for name in ("a.safetensors", "nowhere", "index.json"):
        assert not is_sharded(tmp_path / name)
    assert is_sharded(f"nowhere{INDEX_SUFFIX}")


@pytest.mark.parametrize(
    "file",
    [
        "../a.safetensors", "..", "sub/a.safetensors", "sub\\a.safetensors", "/etc/a.safetensors", "C:a.safetensors",
        "a.bin", "", ".", None, 3, ["a.safetensors"], "a\0.safetensors", "NUL.safetensors", "com1.a.safetensors",
        "a\x1b.safetensors", "a\u202e.safetensors",
    ],
)  # fmt: skip
def test_a_shard_outside_of_the_folder_is_refused(
    read: Read, write_parts: WriteParts, base: nn.Module, tmp_path: Path, file: Any
) -> None:
    index = write_parts(base.state_dict(), tmp_path / "parts", **{"fc.bias": file})
    with pytest.raises(FormatError, match="shards must be plain names") as caught:
        read(index)
    assert caught.value.problems == (f"'fc.bias' is in {file!r}",)
    assert str(index) in str(caught.value)


def test_shards_that_are_one_file_to_some_systems_are_refused(
    read: Read, write_parts: WriteParts, base: nn.Module, tmp_path: Path
) -> None:
    index = write_parts(base.state_dict(), tmp_path / "parts", **{"fc.bias": "A-1-OF-2.safetensors"})
    with pytest.raises(FormatError, match=r"'A-1-OF-2.*' and 'a-1-of-2.*' are one name"):
        read(index)


def test_shards_may_be_links_as_in_the_caches_of_hubs(write_parts: WriteParts, base: nn.Module, tmp_path: Path) -> None:
    index = write_parts(base.state_dict(), tmp_path / "parts")
    part = tmp_path / "parts/a-1-of-2.safetensors"
    part.rename(tmp_path / "blob")
    part.symlink_to(tmp_path / "blob")
    assert read_sharded_header(index).tensors.keys() == base.state_dict().keys()


def test_index_and_shards_that_contradict_each_other_are_refused_with_every_line(
    read: Read, write_parts: WriteParts, base: nn.Module, tmp_path: Path
) -> None:
    state = base.state_dict()
    places = {"fc.bias": "a-1-of-2.safetensors", "nowhere": "a-2-of-2.safetensors"}
    index = write_parts(state, tmp_path / "parts", **places)
    with pytest.raises(FormatError, match="do not belong together") as caught:
        read(index)
    assert set(caught.value.problems) == {
        "'fc.bias' is not in 'a-1-of-2.safetensors', but in 'a-2-of-2.safetensors'",
        "'nowhere' is not in 'a-2-of-2.safetensors'",
    }
    index = write_parts(state, tmp_path / "twice")
    part = index.parent / "a-2-of-2.safetensors"
    names = ["conv1.weight", *list(state)[3:]]
    save_file({name: state[name] for name in names} | {"stray": torch.zeros(1)}, part)
    with pytest.raises(FormatError) as caught:
        read(index)
    assert set(caught.value.problems) == {
        "'conv1.weight' is in 2 files: a-1-of-2.safetensors, a-2-of-2.safetensors",
        "'stray' in 'a-2-of-2.safetensors' is not in the index",
    }
    part.unlink()
    with pytest.raises(MissingFileError, match=r"a-2-of-2\.safetensors' does not exist"):
        read(index)
    part.write_bytes(b"junk")
    with pytest.raises(FormatError, match=r"'a-2-of-2\.safetensors': 4 bytes are too few"):
        read(index)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "has no 'weight_map'"),
        ('{"weight_map": {}}', "has no 'weight_map'"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' occurs twice"),
    ],
)
def test_an_index_that_is_none_is_refused(read: Read, tmp_path: Path, text: str, message: str) -> None:
    index = tmp_path / f"a{INDEX_SUFFIX}"
    index.write_text(text)
    with pytest.raises(FormatError, match=message):
        read(index)
    index.write_bytes(b"\xff")
    with pytest.raises(FormatError, match="not UTF-8"):
        read(index)


def test_a_folder_needs_exactly_one_index(read: Read, write_parts: WriteParts, base: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="holds no index"):
        read(tmp_path)
    with pytest.raises(MissingFileError, match="does not exist"):
        read(tmp_path / f"a{INDEX_SUFFIX}")
    index = write_parts(base.state_dict(), tmp_path)
    (tmp_path / f"b{INDEX_SUFFIX}").write_bytes(index.read_bytes())
    with pytest.raises(FormatError, match="holds 2 indexes"):
        read(tmp_path)


def test_tensors_come_in_the_order_of_the_index(write_parts: WriteParts, base: nn.Module, tmp_path: Path) -> None:
    index = write_parts(base.state_dict(), tmp_path)
    document = json.loads(index.read_text())
    names = list(reversed(document["weight_map"]))
    index.write_text(json.dumps({"weight_map": {name: document["weight_map"][name] for name in names}}))
    assert list(read_sharded_header(index).tensors) == list(loraio.read_base(index).state) == names


@pytest.mark.parametrize("ending", ["", INDEX_SUFFIX, ".safetensors"])
def test_a_name_too_long_for_a_file_is_an_error_with_the_name(
    read: Read, write_parts: WriteParts, base: nn.Module, tmp_path: Path, ending: str
) -> None:
    name = "a" * 300 + ending
    assert is_sharded(tmp_path / name) == (ending == INDEX_SUFFIX)
    shard = ending == ".safetensors"
    path = write_parts(base.state_dict(), tmp_path, **{"fc.bias": name}) if shard else tmp_path / name
    with pytest.raises(MissingFileError, match=f"{name}' cannot be read"):
        read(path)


def test_a_folder_that_cannot_be_listed_is_an_error_with_its_name(
    read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(MissingFileError, match=f"the folder '{tmp_path}' cannot be read: Permission denied"):
        read(tmp_path)

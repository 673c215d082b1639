"""Base checkpoints as files: plain, sharded, pickled, with and without prefixes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import loraio
from loraio.bases.checkpoints import fitted
from loraio.bases.models import stripped_of, write_base
from loraio.errors import FormatError, MissingFileError, OutputExistsError
from loraio.files import tensorfile

WriteParts = Callable[..., Path]


def write_state(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a plain state dict, as other tools do."""
    if path.suffix == ".pt":
        torch.save(dict(state), path)
    else:
        save_file(dict(state), path)


def prefixed(model: nn.Module, prefix: str = "module.") -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in model.state_dict().items()}


def assert_same_state(model: nn.Module, expected: nn.Module) -> None:
    state = model.state_dict()
    assert all(state[name].equal(tensor) for name, tensor in expected.state_dict().items())


class Hostile:
    """Calls print when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("unpickled",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Hostile(), "weights_only=True"),
        ({"conv1.weight": Hostile()}, "weights_only=True"),
        ([1, 2], "holds list, not a state dict"),
        ({}, "holds dict, not a state dict"),
        ({"lr": 0.1, "weight": torch.zeros(1)}, "what is not a tensor is 'lr'"),
    ],
)
def test_pickles_that_are_no_state_dicts_are_refused_and_never_run(
    tmp_path: Path, content: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "base.pt"
    torch.save(content, path)
    with pytest.raises(FormatError, match=message) as caught:
        loraio.read_base(path)
    assert str(path) in str(caught.value)
    assert capsys.readouterr().out == ""


def test_files_that_are_no_base_are_refused(files: Path, tmp_path: Path) -> None:
    (tmp_path / "junk.pt").write_bytes(b"junk")
    save_file({}, tmp_path / "empty.safetensors")
    for path, error, message in (
        (files / "three.safetensors", FormatError, "is an adapter, not a base model"),
        (tmp_path / "missing.safetensors", MissingFileError, "does not exist"),
        (tmp_path / "missing.pt", MissingFileError, "does not exist"),
        (tmp_path / "junk.pt", FormatError, r"not a file of torch\.save"),
        (tmp_path / "empty.safetensors", FormatError, "holds no tensors"),
    ):
        with pytest.raises(error, match=message):
            loraio.read_base(path)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"format_version": 3}, "format version 3"),
        ({"network": 5}, "the network is 5"),
        ({"network_args": [1]}, r"the network's options are \[1\]"),
        *(({"merged": merged}, "the receipts are") for merged in (7, "ab", [1])),
    ],
)
def test_metadata_that_is_not_understood_is_refused(tmp_path: Path, document: dict[str, Any], message: str) -> None:
    path = tmp_path / "base.safetensors"
    tensorfile.write({"a": torch.zeros(1)}, path, document={"format_version": 1, **document})
    with pytest.raises(FormatError, match=message):
        loraio.read_base(path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "model.module._orig_mod."])
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_a_prefix_of_all_names_is_taken_off(base: nn.Module, tmp_path: Path, prefix: str, ending: str) -> None:
    path = tmp_path / f"base.{ending}"
    write_state(prefixed(base, prefix), path)
    checkpoint = loraio.read_base(path)
    assert checkpoint.stripped == prefix
    assert checkpoint.state.keys() == base.state_dict().keys()
    model = loraio.load_base(path, model="digit-cnn")
    assert stripped_of(model) == prefix
    assert_same_state(model, base)


def test_a_prefix_of_some_names_or_of_our_own_files_stays(tmp_path: Path) -> None:
    path, own = tmp_path / "base.pt", tmp_path / "base.safetensors"
    for names in (["module.a", "b"], ["module."]):
        write_state({name: torch.zeros(1) for name in names}, path)
        checkpoint = loraio.read_base(path)
        assert (checkpoint.stripped, list(checkpoint.state)) == ("", names)
    write_base({"model.a": torch.zeros(1)}, own, network=None)
    assert loraio.read_base(own).stripped == ""


WRAPPER = """
from torch import nn


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(1, 2, 3))

    def forward(self, x):
        return self.model(x)
"""


def test_a_prefix_that_is_the_networks_own_stays(tmp_path: Path, write_module: Callable[[str, str], None]) -> None:
    write_module("own_wrapper", WRAPPER)
    path = tmp_path / "base.pt"
    write_state(prefixed(loraio.build_network("own_wrapper:Wrapper", seed=1)), path)
    assert loraio.read_base(path).stripped == "module.model."
    model = loraio.load_base(path, model="own_wrapper:Wrapper")
    assert stripped_of(model) == "module."
    fresh = loraio.new_adapter(model, loraio.TrainConfig(rank=1))
    adapter = replace(fresh, factors={name: torch.ones_like(tensor) for name, tensor in fresh.factors.items()})
    loraio.save(adapter, tmp_path / "adapter.safetensors")
    merged = loraio.merge_file(path, tmp_path / "adapter.safetensors", tmp_path / "merged.safetensors")
    assert merged.stripped == "module."
    assert loraio.read_base(merged.path).state.keys() == model.state_dict().keys()
    checkpoint = loraio.read_base(path)
    assert fitted(checkpoint, ["nowhere"]) is checkpoint


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_the_state_dict_is_found_inside_a_training_checkpoint(base: nn.Module, tmp_path: Path, key: str) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save({key: base.state_dict(), "epoch": 3, "optimizer": {"state": {}}}, path)
    assert loraio.read_base(path).state.keys() == base.state_dict().keys()


def test_a_sharded_checkpoint_is_read_by_its_index_or_its_folder(
    write_parts: WriteParts, files: Path, trained_base: nn.Module, tmp_path: Path
) -> None:
    index = write_parts(prefixed(trained_base), tmp_path / "parts")
    for path in (index, index.parent):
        checkpoint = loraio.read_base(path)
        assert checkpoint.path == index
        assert [part.name for part in checkpoint.parts] == ["a-1-of-2.safetensors", "a-2-of-2.safetensors"]
        assert list(checkpoint.state) == list(trained_base.state_dict())
        model = loraio.load_base(path, model="digit-cnn")
        assert stripped_of(model) == "module."
        assert_same_state(model, trained_base)
        merged = loraio.merge_file(path, files / "three.safetensors", tmp_path / "merged.safetensors", overwrite=True)
        assert merged.sha256 == loraio.read_base(files / "merged.safetensors").document["sha256"]
    with pytest.raises(OutputExistsError, match="is also an input"):
        loraio.merge_file(index, files / "three.safetensors", index.parent / "a-1-of-2.safetensors", overwrite=True)

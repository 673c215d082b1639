"""Models of base checkpoints: loaded, saved, and hashed again only after a write."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import loraio
from loraio.bases import identity, models
from loraio.bases.networks import network_args_of, network_of
from loraio.errors import BaseMismatchError, ConfigError, FormatError, OutputExistsError, UnknownNameError
from loraio.files import tensorfile


def test_a_saved_base_comes_back_with_its_network_and_bits(trained_base: nn.Module, tmp_path: Path) -> None:
    path, again = tmp_path / "base.safetensors", tmp_path / "again.safetensors"
    loraio.save_base(trained_base, path, training={"note": 1})
    model = loraio.load_base(path)
    assert not model.training
    assert network_of(model) == "digit-cnn"
    state, expected = model.state_dict(), trained_base.state_dict()
    assert list(state) == list(expected)
    assert all(state[name].equal(expected[name]) for name in expected)
    assert all(parameter.requires_grad for parameter in model.parameters())
    document = loraio.read_base(path).document
    assert document["training"] == {"note": 1}
    assert document["sha256"] == identity.state_sha256(expected)
    assert "network_args" not in document
    with pytest.raises(OutputExistsError):
        loraio.save_base(trained_base, path)
    loraio.save_base(trained_base, again, training={"note": 1})
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("kind", ["safetensors", "pt", "wrapped.pth"])
def test_a_plain_state_dict_needs_its_network_named_and_keeps_its_dtype(
    trained_base: nn.Module, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / f"plain.{kind}"
    state = {name: tensor.half() for name, tensor in trained_base.state_dict().items()}
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if "wrapped" in kind else state, path)
    with pytest.raises(UnknownNameError, match="does not say which network"):
        loraio.load_base(path)
    loaded = loraio.load_base(path, model="digit-cnn").state_dict()
    assert all(loaded[name].equal(state[name]) and loaded[name].dtype == torch.float16 for name in state)


def test_a_checkpoint_that_does_not_fit_lists_every_difference_and_changes_nothing(base: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    state = {name: tensor + 1 for name, tensor in before.items()}
    state["conv_1.weight"] = state.pop("conv1.weight")
    state |= {"fc.bias": torch.zeros(11), "conv2.bias": state["conv2.bias"].int()}
    with pytest.raises(BaseMismatchError) as caught:
        models.load_state(base, state, where="here")
    assert len(caught.value.problems) == 4
    for line in (
        "'conv1.weight' is missing; did you mean 'conv_1.weight'?",
        "'fc.bias' is (11,), the network has (10,)",
        "'conv2.bias' is torch.int32, the network has torch.float32",
    ):
        assert line in str(caught.value)
    assert all(base.state_dict()[name].equal(before[name]) for name in before)


def test_loading_copies_so_that_later_training_does_not_reach_the_state_dict(base: nn.Module) -> None:
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    models.load_state(base, state)
    bias = base.get_parameter("fc.bias")
    bias.data.add_(1)
    assert not bias.equal(state["fc.bias"])


def test_models_and_metadata_that_cannot_be_saved_are_refused(base: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="not plain JSON"):
        loraio.save_base(base, tmp_path / "base.safetensors", training={"loss": float("nan")})
    base.fc = nn.Linear(2048, 5)
    with pytest.raises(BaseMismatchError, match="no longer a 'digit-cnn'"):
        loraio.save_base(base, tmp_path / "base.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_base_remembers_the_options_of_its_network(tmp_path: Path) -> None:
    path, args = tmp_path / "base.safetensors", {"num_classes": 5}
    loraio.save_base(loraio.build_network("torchvision:squeezenet1_1", args=args, seed=3), path)
    checkpoint = loraio.read_base(path)
    assert (checkpoint.network, checkpoint.network_args) == ("torchvision:squeezenet1_1", args)
    model = loraio.load_base(path)
    assert network_args_of(model) == args
    assert model.state_dict()["classifier.1.bias"].shape == (5,)
    with pytest.raises(BaseMismatchError, match="the network has \\(6"):
        loraio.load_base(path, model_args={"num_classes": 6})
    with pytest.raises(BaseMismatchError):  # the file's options are those of the file's network
        loraio.load_base(path, model="digit-cnn")


TRAP = """
from torch import nn

ran = []


def make(bias=True):
    ran.append(1)
    return nn.Linear(2, 2, bias=bias)
"""


def test_a_file_alone_never_makes_code_run(tmp_path: Path, write_module: Callable[[str, str], None]) -> None:
    write_module("own_trap", TRAP)
    path = tmp_path / "base.safetensors"
    document = {"format_version": 1, "network": "own_trap:make", "network_args": {"bias": False}}
    tensorfile.write({"weight": torch.ones(2, 2)}, path, document=document)
    with pytest.raises(ConfigError, match="does not get to run") as caught:
        loraio.load_base(path)
    assert "--model own_trap:make" in str(caught.value)
    assert "own_trap" not in sys.modules
    model = loraio.load_base(path, model="own_trap:make")
    assert network_args_of(model) == {"bias": False}
    adapter = loraio.new_adapter(model, loraio.TrainConfig(rank=1, targets=("all",)))
    state, ran = model.state_dict(), len(sys.modules["own_trap"].ran)
    with pytest.raises(ConfigError, match="does not get to run"):
        loraio.verify(state, adapter, state, inputs=torch.ones(1, 2))
    assert len(sys.modules["own_trap"].ran) == ran
    assert loraio.verify(state, adapter, state, model="own_trap:make", inputs=torch.ones(1, 2)).ok


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight


def test_tied_weights_stay_tied_when_a_checkpoint_is_loaded() -> None:
    model, state = Tied(), Tied().state_dict()
    models.load_state(model, state)
    assert model.a.weight is model.b.weight
    assert model.a.weight.equal(state["a.weight"])
    assert [name for name, _ in model.named_parameters()] == ["a.weight", "a.bias"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(BaseMismatchError, match=r"'b\.weight' and 'a\.weight' are one tensor in the network, and two"):
        models.load_state(model, {**state, "b.weight": state["b.weight"] + 1})
    assert all(model.state_dict()[name].equal(before[name]) for name in before)


def test_a_tensor_that_was_compared_with_its_digest_when_it_was_read_is_not_hashed_again(
    files: Path, three: loraio.Adapter, seven: loraio.Adapter, hashed: list[torch.Tensor]
) -> None:
    model = loraio.load_base(files / "base.safetensors")
    with loraio.attach(model, three):
        assert not hashed
    with torch.no_grad():
        model.get_parameter("conv2.weight").view(-1)[5].mul_(1.5)
    with pytest.raises(BaseMismatchError, match="conv2"):
        loraio.attach(model, seven)
    assert len(hashed) == 1


def test_a_tensor_without_a_digest_or_with_other_bytes_is_hashed(
    files: Path, three: loraio.Adapter, tmp_path: Path, hashed: list[torch.Tensor]
) -> None:
    state = dict(loraio.read_base(files / "base.safetensors").state)
    save_file(state, tmp_path / "plain.safetensors")
    model = loraio.load_base(tmp_path / "plain.safetensors", model="digit-cnn")
    with loraio.attach(model, three):
        assert len(hashed) == len(state)
    known, learned = identity.digests(state), identity.BaseIdentity()
    changed = {name: tensor + 1 if name == "fc.bias" else tensor.clone() for name, tensor in state.items()}
    learned.learn(changed, state, known)
    hashed.clear()
    found = learned.digests(changed)
    assert [name for name in found if found[name] != known[name]] == ["fc.bias"]
    assert len(hashed) == 1


def test_a_sharded_base_brings_its_digests_along(
    files: Path, three: loraio.Adapter, tmp_path: Path, hashed: list[torch.Tensor], write_parts: Callable[..., Path]
) -> None:
    state = dict(loraio.read_base(files / "base.safetensors").state)
    parts = write_parts({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "parts")
    loraio.merge_file(parts, files / "three.safetensors", tmp_path / "merged")
    model = loraio.load_base(tmp_path / "merged", model="digit-cnn")
    hashed.clear()
    found = identity.identity_of(model).digests(model.state_dict())
    assert not hashed
    assert found == identity.digests(loraio.merge(state, three))

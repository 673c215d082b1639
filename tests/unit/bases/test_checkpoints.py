"""Base models by name, and base checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import loraio
from loraio.bases import identity, models, networks
from loraio.bases.checkpoints import fitted
from loraio.bases.models import stripped_of
from loraio.bases.networks import NETWORKS, network_args_of
from loraio.errors import (
    BaseMismatchError,
    ConfigError,
    FormatError,
    MissingFileError,
    OutputExistsError,
    UnknownNameError,
)
from loraio.files import tensorfile

WriteParts = Callable[..., Path]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_takes_its_input_shape_and_gives_its_classes(name: str) -> None:
    network = NETWORKS[name]
    model = loraio.build_network(name, seed=0)
    assert not model.training
    assert networks.network_of(model) == name
    with torch.no_grad():
        assert model(torch.rand(2, *network.input_shape)).shape == (2, network.classes)


def test_digit_cnn_is_the_networks_three_convolutions_and_one_linear_layer() -> None:
    model = loraio.build_network("digit-cnn", seed=0)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == {
        "conv1.weight": (32, 1, 3, 3), "conv1.bias": (32,),
        "conv2.weight": (64, 32, 3, 3), "conv2.bias": (64,),
        "conv3.weight": (128, 64, 3, 3), "conv3.bias": (128,),
        "fc.weight": (10, 2048), "fc.bias": (10,),
    }  # fmt: skip
    for conv in (model.conv1, model.conv2, model.conv3):
        assert isinstance(conv, nn.Conv2d)
        assert (conv.stride, conv.padding) == ((2, 2), (1, 1))


def test_a_seed_gives_the_same_weights_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    a, b, c = (loraio.build_network("digit-cnn", seed=seed).state_dict() for seed in (5, 5, 6))
    assert torch.get_rng_state().equal(state)
    assert all(a[name].equal(b[name]) for name in a)
    assert not a["conv1.weight"].equal(c["conv1.weight"])
    loraio.build_network("digit-cnn")
    assert not torch.get_rng_state().equal(state)


def test_an_unknown_network_answers_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'digit-cnn'"):
        loraio.build_network("digits-cnn")


def test_a_saved_base_comes_back_with_its_network_and_bits(trained_base: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    loraio.save_base(trained_base, path, training={"note": 1})
    model = loraio.load_base(path)
    assert not model.training
    assert networks.network_of(model) == "digit-cnn"
    state, expected = model.state_dict(), trained_base.state_dict()
    assert list(state) == list(expected)
    assert all(state[name].equal(expected[name]) for name in expected)
    assert all(parameter.requires_grad for parameter in model.parameters())
    checkpoint = loraio.read_base(path)
    assert checkpoint.document["training"] == {"note": 1}
    assert checkpoint.document["sha256"] == loraio.bases.identity.state_sha256(expected)
    with pytest.raises(OutputExistsError):
        loraio.save_base(trained_base, path)
    again = tmp_path / "again.safetensors"
    loraio.save_base(trained_base, again, training={"note": 1})
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("kind", ["safetensors", "pt", "wrapped.pth"])
def test_a_plain_state_dict_needs_its_network_named(trained_base: nn.Module, tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"plain.{kind}"
    state = trained_base.state_dict()
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if "wrapped" in kind else state, path)
    with pytest.raises(UnknownNameError, match="does not say which network"):
        loraio.load_base(path)
    model = loraio.load_base(path, model="digit-cnn")
    assert all(model.state_dict()[name].equal(state[name]) for name in state)


def test_half_precision_checkpoints_keep_their_dtype(trained_base: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    save_file({name: tensor.half() for name, tensor in trained_base.state_dict().items()}, path)
    assert loraio.load_base(path, model="digit-cnn").conv1.weight.dtype == torch.float16  # type: ignore[union-attr]


class Hostile:
    """Unpickling this would call print."""

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
    with pytest.raises(FormatError, match="is an adapter, not a base model"):
        loraio.read_base(files / "three.safetensors")
    for name in ("missing.safetensors", "missing.pt"):
        with pytest.raises(MissingFileError, match="does not exist"):
            loraio.read_base(tmp_path / name)
    junk = tmp_path / "junk.pt"
    junk.write_bytes(b"junk")
    with pytest.raises(FormatError, match=r"not a file of torch\.save"):
        loraio.read_base(junk)
    empty = tmp_path / "empty.safetensors"
    save_file({}, empty)
    with pytest.raises(FormatError, match="holds no tensors"):
        loraio.read_base(empty)


@pytest.mark.parametrize(
    ("document", "message"),
    [({"format_version": 3}, "format version 3"), ({"format_version": 1, "network": 5}, "the network is 5")],
)
def test_metadata_that_is_not_understood_is_refused(tmp_path: Path, document: dict[str, Any], message: str) -> None:
    path = tmp_path / "base.safetensors"
    tensorfile.write({"a": torch.zeros(1)}, path, document=document)
    with pytest.raises(FormatError, match=message):
        loraio.read_base(path)


def test_a_checkpoint_that_does_not_fit_lists_every_difference_and_changes_nothing(base: nn.Module) -> None:
    kept = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    state = {name: tensor + 1 for name, tensor in kept.items()}
    state["conv_1.weight"] = state.pop("conv1.weight")
    state["fc.bias"] = torch.zeros(11)
    with pytest.raises(BaseMismatchError) as caught:
        models.load_state(base, state, where="here")
    assert len(caught.value.problems) == 3
    text = str(caught.value)
    assert "'conv1.weight' is missing; did you mean 'conv_1.weight'?" in text
    assert "'fc.bias' is (11,), the network has (10,)" in text
    assert all(base.state_dict()[name].equal(kept[name]) for name in kept)


def test_loading_copies_so_that_later_training_does_not_reach_the_state_dict(base: nn.Module) -> None:
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    models.load_state(base, state)
    with torch.no_grad():
        base.fc.bias.add_(1)  # type: ignore[union-attr, operator]
    assert not base.fc.bias.equal(state["fc.bias"])  # type: ignore[union-attr, operator, arg-type]


def test_a_model_that_is_no_longer_its_network_is_not_saved_under_its_name(base: nn.Module, tmp_path: Path) -> None:
    base.fc = nn.Linear(2048, 5)
    with pytest.raises(BaseMismatchError, match="no longer a 'digit-cnn'"):
        loraio.save_base(base, tmp_path / "base.safetensors")


def test_whole_numbers_for_weights_are_refused(base: nn.Module) -> None:
    state = {name: tensor.int() for name, tensor in base.state_dict().items()}
    with pytest.raises(BaseMismatchError, match=r"int32, the network has torch\.float32"):
        models.load_state(base, state)


def test_receipts_that_are_no_list_of_objects_are_refused(tmp_path: Path) -> None:
    for number, merged in enumerate((7, "ab", [1])):
        path = tmp_path / f"{number}.safetensors"
        tensorfile.write({"a": torch.zeros(1)}, path, document={"format_version": 1, "merged": merged})
        with pytest.raises(FormatError, match="the receipts are"):
            loraio.read_base(path)


def test_metadata_that_is_not_json_is_refused(base: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="not plain JSON"):
        loraio.save_base(base, tmp_path / "base.safetensors", training={"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_base_remembers_the_options_of_its_network(tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    args = {"num_classes": 5}
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


def test_a_base_without_options_has_no_key_for_them(trained_base: nn.Module, tmp_path: Path) -> None:
    loraio.save_base(trained_base, tmp_path / "base.safetensors")
    assert "network_args" not in loraio.read_base(tmp_path / "base.safetensors").document
    path = tmp_path / "wrong.safetensors"
    tensorfile.write({"a": torch.zeros(1)}, path, document={"format_version": 1, "network_args": [1]})
    with pytest.raises(FormatError, match=r"the network's options are \[1\]"):
        loraio.read_base(path)


def test_a_file_alone_never_makes_code_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_trap.py").write_text(
        "from torch import nn\n\nran = []\n\n\n"
        "def make(bias=True):\n    ran.append(1)\n    return nn.Linear(2, 2, bias=bias)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_trap", raising=False)
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


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "model.module._orig_mod."])
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_a_prefix_of_all_names_is_taken_off(base: nn.Module, tmp_path: Path, prefix: str, ending: str) -> None:
    path = tmp_path / f"base.{ending}"
    state = base.state_dict()
    write_state({prefix + name: tensor for name, tensor in state.items()}, path)
    checkpoint = loraio.read_base(path)
    assert checkpoint.stripped == prefix
    assert checkpoint.state.keys() == state.keys()
    model = loraio.load_base(path, model="digit-cnn")
    assert stripped_of(model) == prefix
    assert all(model.state_dict()[name].equal(state[name]) for name in state)


def test_a_prefix_of_some_names_stays(tmp_path: Path) -> None:
    path = tmp_path / "base.pt"
    write_state({"module.a": torch.zeros(1), "b": torch.zeros(1)}, path)
    checkpoint = loraio.read_base(path)
    assert (checkpoint.stripped, list(checkpoint.state)) == ("", ["module.a", "b"])
    write_state({"module.": torch.zeros(1)}, path)
    assert list(loraio.read_base(path).state) == ["module."]


def test_names_of_our_own_files_are_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    models.write_base({"model.a": torch.zeros(1)}, path, network=None)
    assert loraio.read_base(path).stripped == ""


WRAPPER = """
from torch import nn


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(1, 2, 3))

    def forward(self, x):
        return self.model(x)
"""


def test_what_looks_like_a_prefix_stays_where_the_network_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_wrapper.py").write_text(WRAPPER)
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "base.pt"
    network = loraio.build_network("own_wrapper:Wrapper", seed=1)
    write_state({f"module.{name}": tensor for name, tensor in network.state_dict().items()}, path)
    assert loraio.read_base(path).stripped == "module.model."
    model = loraio.load_base(path, model="own_wrapper:Wrapper")
    assert stripped_of(model) == "module."
    adapter = loraio.new_adapter(model, loraio.TrainConfig(rank=1))
    noisy = {name: torch.ones_like(tensor) for name, tensor in adapter.factors.items()}
    adapter = loraio.Adapter(targets=adapter.targets, factors=noisy, base=adapter.base)
    loraio.save(adapter, tmp_path / "adapter.safetensors")
    merged = loraio.merge_file(path, tmp_path / "adapter.safetensors", tmp_path / "merged.safetensors")
    assert merged.stripped == "module."
    assert loraio.read_base(merged.path).state.keys() == model.state_dict().keys()
    checkpoint = loraio.read_base(path)
    assert fitted(checkpoint, ["nowhere"]) is checkpoint


def test_merging_onto_a_prefixed_base_writes_the_names_without_it(
    files: Path, trained_base: nn.Module, tmp_path: Path
) -> None:
    path, output = tmp_path / "base.pt", tmp_path / "merged.safetensors"
    write_state({f"module.{name}": tensor for name, tensor in trained_base.state_dict().items()}, path)
    merged = loraio.merge_file(path, files / "three.safetensors", output)
    assert merged.stripped == "module."
    found, expected = loraio.read_base(output), loraio.read_base(files / "merged.safetensors")
    assert found.network == "digit-cnn"
    assert found.document["sha256"] == expected.document["sha256"]


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_the_state_dict_is_found_inside_a_training_checkpoint(base: nn.Module, tmp_path: Path, key: str) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save({key: base.state_dict(), "epoch": 3, "optimizer": {"state": {}}}, path)
    assert loraio.read_base(path).state.keys() == base.state_dict().keys()


def write_state(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """A plain state dict from elsewhere."""
    if path.suffix == ".pt":
        torch.save(dict(state), path)
    else:
        save_file(dict(state), path)


def test_a_parted_checkpoint_is_read_by_its_index_or_its_folder(
    write_parts: WriteParts, files: Path, trained_base: nn.Module, tmp_path: Path
) -> None:
    state = trained_base.state_dict()
    index = write_parts({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "parts")
    for path in (index, index.parent):
        checkpoint = loraio.read_base(path)
        assert checkpoint.path == index
        assert [part.name for part in checkpoint.parts] == ["a-1-of-2.safetensors", "a-2-of-2.safetensors"]
        assert list(checkpoint.state) == list(state)
        model = loraio.load_base(path, model="digit-cnn")
        assert stripped_of(model) == "module."
        assert all(model.state_dict()[name].equal(state[name]) for name in state)
        merged = loraio.merge_file(path, files / "three.safetensors", tmp_path / "merged.safetensors", overwrite=True)
        expected = loraio.read_base(files / "merged.safetensors")
        assert merged.sha256 == expected.document["sha256"]
    with pytest.raises(OutputExistsError, match="is also an input"):
        loraio.merge_file(index, files / "three.safetensors", index.parent / "a-1-of-2.safetensors", overwrite=True)


def test_random_inputs_have_the_shape_that_the_network_takes() -> None:
    model = loraio.build_network("torchvision:squeezenet1_1", args={"num_classes": 3}, seed=0)
    adapter = loraio.new_adapter(model, loraio.TrainConfig(rank=1, targets=("features.0",)))
    state = model.state_dict()
    report = loraio.verify(state, adapter, loraio.merge(state, adapter), samples=2)
    assert report.ok
    assert report.outputs is not None
    assert report.outputs.samples == 2
    other = loraio.build_network("torchvision:lraspp_mobilenet_v3_large", seed=0)
    adapter = loraio.new_adapter(other, loraio.TrainConfig(rank=1, targets=("backbone.0.0",)))
    with pytest.raises(
        ConfigError, match="the input shape of 'torchvision:lraspp_mobilenet_v3_large' is not known"
    ) as caught:
        loraio.verify(other.state_dict(), adapter, other.state_dict(), samples=2)
    assert caught.value.hint == "pass inputs= of the shape it takes"


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight


def test_weights_that_are_one_stay_one_when_a_checkpoint_is_loaded() -> None:
    model, state = Tied(), Tied().state_dict()
    models.load_state(model, state)
    assert model.a.weight is model.b.weight
    assert model.a.weight.equal(state["a.weight"])
    assert [name for name, _ in model.named_parameters()] == ["a.weight", "a.bias"]
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(BaseMismatchError, match=r"'b\.weight' and 'a\.weight' are one tensor in the network, and two"):
        models.load_state(model, {**state, "b.weight": state["b.weight"] + 1})
    assert all(model.state_dict()[name].equal(kept[name]) for name in kept)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The tensors of models that were hashed."""
    seen: list[torch.Tensor] = []
    real = identity.tensor_sha256

    def counted(tensor: torch.Tensor) -> str:
        seen.append(tensor)
        return real(tensor)

    monkeypatch.setattr(identity, "tensor_sha256", counted)
    return seen


def test_what_was_compared_with_its_digest_when_it_was_read_is_not_hashed_again(
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


def test_what_a_file_does_not_say_or_a_network_changed_is_hashed(
    files: Path, three: loraio.Adapter, tmp_path: Path, hashed: list[torch.Tensor]
) -> None:
    state = dict(loraio.read_base(files / "base.safetensors").state)
    save_file(state, tmp_path / "plain.safetensors")
    model = loraio.load_base(tmp_path / "plain.safetensors", model="digit-cnn")
    with loraio.attach(model, three):
        assert len(hashed) == len(state)
    known = identity.digests(state)
    changed = {name: tensor + 1 if name == "fc.bias" else tensor.clone() for name, tensor in state.items()}
    learned = identity.BaseIdentity()
    learned.learn(changed, state, known)
    hashed.clear()
    found = learned.digests(changed)
    assert found["fc.bias"] != known["fc.bias"]
    assert [name for name in found if found[name] != known[name]] == ["fc.bias"]
    assert len(hashed) == 1


def test_a_parted_base_brings_its_digests_along(
    files: Path, three: loraio.Adapter, tmp_path: Path, hashed: list[torch.Tensor], write_parts: WriteParts
) -> None:
    state = dict(loraio.read_base(files / "base.safetensors").state)
    parts = write_parts({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "parts")
    loraio.merge_file(parts, files / "three.safetensors", tmp_path / "merged")
    model = loraio.load_base(tmp_path / "merged", model="digit-cnn")
    hashed.clear()
    found = identity.identity_of(model).digests(model.state_dict())
    assert not hashed
    assert found == identity.digests(loraio.merge(state, three))

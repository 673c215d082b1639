"""torchtune's LoRALinear, in a few lines, gives the same outputs: torchtune needs packages that not every torch allows.

The output is the base layer's plus ``alpha / rank`` times that of two Linear layers without bias, lora_a and lora_b.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from peers import adapter_for, assert_attached_is, in_sixteenths_, refused
from torch import Tensor, nn

import loraio
from loraio.errors import AdapterError, BaseMismatchError
from loraio.formats import dialects
from loraio.formats.exported import ORIGIN
from loraio.formats.foreign import Context
from loraio.formats.torchtune import Torchtune

X = peers.random((4, 5))


class LoRALinear(nn.Module):
    """A Linear layer's own parameters, and a pair of layers beside them."""

    def __init__(self, linear: nn.Linear, *, rank: int, alpha: float) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_a = nn.Linear(linear.in_features, rank, bias=False)
        self.lora_b = nn.Linear(rank, linear.out_features, bias=False)
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias) + self.scale * self.lora_b(self.lora_a(x))


class DoRALinear(LoRALinear):
    """Each output, with its bias, is scaled to the length of its magnitude."""

    def __init__(self, linear: nn.Linear, *, rank: int, alpha: float) -> None:
        super().__init__(linear, rank=rank, alpha=alpha)
        self.magnitude = nn.Parameter(torch.rand(linear.out_features) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        change = self.scale * self.lora_b.weight @ self.lora_a.weight
        return super().forward(x) * (self.magnitude / (self.weight + change).norm(dim=1))


@pytest.fixture
def base() -> nn.Module:
    torch.manual_seed(0)
    inner = nn.ModuleDict({"q_proj": nn.Linear(6, 4, bias=False), "out": nn.Linear(4, 3)})
    return nn.Sequential(nn.Linear(5, 6), inner["q_proj"], nn.ReLU(), inner["out"], nn.Sequential(nn.Linear(3, 2)))


def adapted(base: nn.Module, *, rank: int, alpha: float, layer: type[LoRALinear] = LoRALinear) -> nn.Module:
    net = copy.deepcopy(base)
    for path, module in list(net.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, name = path.rpartition(".")
            setattr(net.get_submodule(parent), name, layer(module, rank=rank, alpha=alpha))
    return net


def pairs(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in net.state_dict().items() if "lora" in name or "magnitude" in name}


def written(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir()
    torch.save(tensors, folder / "adapter_model.pt")
    if config:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


CONFIG: dict[str, Any] = {"r": 2, "lora_alpha": 16, "target_modules": ["q_proj"], "peft_type": "LORA"}


@pytest.mark.parametrize("config", [CONFIG, {}])
def test_a_file_of_torchtune_gives_its_outputs_here(config: dict[str, Any], base: nn.Module, tmp_path: Path) -> None:
    net = adapted(base, rank=2, alpha=16)
    path = written(tmp_path / "folder", pairs(net), **config)
    assert dialects.identify(path).dialect is dialects.DIALECTS["torchtune"]
    adapter = loraio.load(path, base=base, alpha=None if config else 16)
    assert adapter.training[ORIGIN] == {"dialect": "torchtune", "settings": config}
    assert_attached_is(base, adapter, net, X)
    if not config:
        refused(path, base, "in torchtune it stands in the recipe's configuration")


def test_a_file_of_torchtune_merges_to_its_bits_if_nothing_is_rounded(base: nn.Module, tmp_path: Path) -> None:
    net = adapted(base, rank=2, alpha=16)
    in_sixteenths_(net)
    for name, parameter in base.named_parameters():
        parameter.data = net.state_dict()[name]
    adapter = loraio.load(written(tmp_path / "folder", pairs(net), **CONFIG), base=base)
    x = torch.randint(-4, 5, (4, 5)) / 16.0
    first = net[0](x)
    with loraio.attach(base, adapter):
        assert base[0](x).equal(first)


def test_our_file_gives_our_outputs_there_and_comes_back(base: nn.Module, tmp_path: Path) -> None:
    adapter = adapter_for(base, alpha=5)
    peers.assert_written_twice_alike(Torchtune(), adapter, None, tmp_path / "one.pt")
    net = adapted(base, rank=2, alpha=5)
    peers.assert_all_loaded(net, tmp_path / "one.pt")
    assert_attached_is(base, adapter, net, X)
    again = loraio.load(tmp_path / "one.pt", base=base, alpha=5)
    assert dict(again.targets) == dict(sorted(adapter.targets.items()))
    assert all(again.factors[name].equal(factor) for name, factor in adapter.factors.items())


def test_dora_of_layers_without_a_bias_gives_the_outputs_of_both(base: nn.Module, tmp_path: Path) -> None:
    net = adapted(base, rank=2, alpha=16, layer=DoRALinear)
    path = written(tmp_path / "biased", pairs(net), **CONFIG)
    refused(path, base, "multiplies the layer's bias too", BaseMismatchError)
    bare = nn.Sequential(nn.Linear(5, 6, bias=False), nn.ReLU(), nn.Linear(6, 4, bias=False))
    net = adapted(bare, rank=2, alpha=16, layer=DoRALinear)
    adapter = loraio.load(written(tmp_path / "bare", pairs(net), **CONFIG), base=bare)
    assert {target.kind for target in adapter.targets.values()} == {"dora"}
    assert_attached_is(bare, adapter, net, X)
    encoded = Torchtune().encode(adapter, Context(network=bare))
    assert encoded.tensors.keys() == pairs(net).keys()
    assert all(encoded.tensors[name].equal(tensor) for name, tensor in pairs(net).items())
    with pytest.raises(AdapterError, match="where the network is known"):
        Torchtune().encode(adapter, Context())


@pytest.mark.parametrize(
    ("tensors", "config", "says"),
    [
        ({"0.lora_b.weight": None}, CONFIG, "'0': lora_b.weight is missing"),
        ({"0.lora_b.weight": torch.ones(6, 3)}, CONFIG, "which is no pair"),
        ({"0.lora_b.weight": torch.ones(7, 2)}, CONFIG, "lora_B is (7, 2)"),
        ({}, CONFIG | {"r": 4}, "the configuration says rank 4, the tensors have 2"),
        ({}, CONFIG | {"lora_alpha": "16"}, "lora_alpha is '16', not a number"),
        ({}, CONFIG | {"use_rslora": True}, "unknown setting 'use_rslora': True"),
        ({"0.magnitude": torch.ones(6)}, CONFIG, "multiplies the layer's bias too"),
        ({"0.experts.lora_gate_a": torch.ones(2, 2, 2)}, CONFIG, "a layer of experts has a pair for each"),
        ({"0.lora_c": torch.ones(2)}, CONFIG, "the base has no '0.lora_c'"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    tensors: dict[str, Tensor | None], config: dict[str, Any], says: str, base: nn.Module, tmp_path: Path
) -> None:
    good: dict[str, Tensor | None] = {"0.lora_a.weight": torch.ones(2, 5), "0.lora_b.weight": torch.ones(6, 2)}
    found = {name: tensor for name, tensor in (good | tensors).items() if tensor is not None}
    refused(written(tmp_path / "folder", found, **config), base, says, AdapterError, BaseMismatchError)


def test_adapters_of_several_ranks_are_not_written(base: nn.Module) -> None:
    config = loraio.TrainConfig(digit=0, targets=("all",), rank=2, rank_pattern={"0": 1}, alpha_pattern={"3": 7})
    with pytest.raises(AdapterError, match=r"one rank for all layers, the adapter has \[1, 2\]") as caught:
        Torchtune().encode(loraio.new_adapter(base, config), Context())
    assert "one alpha for all layers" in str(caught.value)

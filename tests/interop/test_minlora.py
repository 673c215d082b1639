"""minLoRA's published maths gives the same outputs: a parametrization adds a scaled product. No package index has it.

The product is ``B @ A`` in the memory order of the weight; of an embedding it is ``A @ B``, with both shapes exchanged.
alpha / rank scales it, and neither number is saved.
"""

from __future__ import annotations

import copy
from pathlib import Path

import peers
import pytest
import torch
from peers import adapter_for, assert_attached_is, base_of, in_sixteenths_, refused
from torch import Tensor, nn
from torch.nn.utils import parametrize

import loraio
from loraio.errors import AdapterError, BaseMismatchError
from loraio.formats import dialects
from loraio.formats.minlora import MinLora

ALPHA = 3

WEIGHTS = dict.fromkeys(("emb", "line", "conv", "halves", "cube", "pair", "at", "at.out_proj", "fc"), "weight")
WEIGHTS["at"] = "in_proj_weight"


class Net(nn.Module):
    """One layer of each type that it adapts, and others."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.line = nn.Conv1d(6, 6, 3, padding=1)
        self.conv = nn.Conv2d(1, 4, (3, 2), padding=1)
        self.halves = nn.Conv2d(4, 8, 3, groups=2, padding=2, dilation=2, padding_mode="reflect")
        self.cube = nn.Conv3d(1, 3, (1, 2, 3))
        self.norm = nn.BatchNorm1d(6)
        self.at = nn.MultiheadAttention(6, 2, batch_first=True)
        self.pair = nn.Bilinear(8, 6, 5)
        self.fc = nn.Linear(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.line(self.emb(tokens).transpose(1, 2))).transpose(1, 2)
        x = x + self.at(x, x, x, need_weights=False)[0]
        plane = self.halves(self.conv(x.unsqueeze(1))).mean((2, 3))
        cube = self.cube(x.unsqueeze(1).unsqueeze(1)).mean((2, 3, 4))
        return self.fc(self.pair(plane, x.mean(1)).relu()) + cube


class Pair(nn.Module):
    """The published parametrization, in eval mode."""

    def __init__(self, weight: Tensor, *, rank: int, exchanged: bool, generator: torch.Generator, dyadic: bool) -> None:
        super().__init__()
        ins, outs = weight[0].numel(), len(weight)
        shapes = ((outs, rank), (rank, ins)) if exchanged else ((rank, ins), (outs, rank))
        small = [torch.randint(-4, 5, shape, generator=generator) / 16.0 for shape in shapes]
        free = [torch.randn(shape, generator=generator) / 4 for shape in shapes]
        self.lora_A, self.lora_B = map(nn.Parameter, small if dyadic else free)
        self.register_buffer("lora_dropout_mask", torch.ones(1, ins))
        self.exchanged = exchanged
        self.scale = ALPHA / rank

    def forward(self, weight: Tensor) -> Tensor:
        product = self.lora_A @ self.lora_B if self.exchanged else self.lora_B @ self.lora_A
        return weight + product.view(weight.shape) * self.scale


base = base_of(Net)


def adapted(base: nn.Module, *ranks: int, dyadic: bool = False, unlike: bool = False) -> nn.Module:
    """Put one pair on each weight for each rank; with ``unlike`` the embedding's is like any other layer's."""
    net = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(2)
    for rank in ranks:
        for path, parameter in WEIGHTS.items():
            module = net.get_submodule(path)
            exchanged = path == "emb" and not unlike
            weight = getattr(module, parameter).detach()
            part = Pair(weight, rank=rank, exchanged=exchanged, generator=generator, dyadic=dyadic)
            parametrize.register_parametrization(module, parameter, part)
    return net


def saved(net: nn.Module, path: Path, *, whole: bool = False) -> Path:
    """Save the pairs alone, as its own filter leaves them, or everything."""
    state = net.state_dict()
    pairs = {name: tensor for name, tensor in state.items() if name.endswith((".lora_A", ".lora_B"))}
    torch.save(state if whole else pairs, path)
    return path


def folded(net: nn.Module) -> dict[str, Tensor]:
    """Return the weights as the network sees them, by the base's names."""
    return {
        f"{path}.{parameter}": getattr(net.get_submodule(path), parameter).detach()
        for path, parameter in WEIGHTS.items()
    }


TOKENS = torch.randint(0, 11, (5, 8), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("unlike", [False, True])
@pytest.mark.parametrize("ranks", [(2,), (1,), (2, 2), (2, 4, 2)])
def test_its_file_merges_to_its_bits_if_nothing_is_rounded(
    ranks: tuple[int, ...], unlike: bool, whole: bool, base: nn.Module, tmp_path: Path
) -> None:
    in_sixteenths_(base)
    net = adapted(base, *ranks, dyadic=True, unlike=unlike)
    adapter = loraio.load(saved(net, tmp_path / "file.pt", whole=whole), base=base, alpha=ALPHA)
    assert not adapter.whole
    merged = loraio.merge(base.state_dict(), adapter)
    for name, weight in folded(net).items():
        assert merged[name].equal(weight), name
        assert not weight.equal(base.state_dict()[name]), name
    with loraio.attach(base, adapter):
        assert base(TOKENS).equal(net(TOKENS))


@pytest.mark.parametrize("ranks", [(3,), (2, 3), (3, 2, 5)])
def test_its_file_gives_its_outputs_here(ranks: tuple[int, ...], base: nn.Module, tmp_path: Path) -> None:
    net = adapted(base, *ranks)
    adapter = loraio.load(saved(net, tmp_path / "file.pt"), base=base, alpha=ALPHA)
    assert_attached_is(base, adapter, net, TOKENS)
    peers.assert_merged_close(base, adapter, folded(net))


def test_our_file_gives_our_outputs_there_and_comes_back(base: nn.Module, tmp_path: Path) -> None:
    adapter = adapter_for(base, alpha=ALPHA)
    peers.assert_written_twice_alike(MinLora(), adapter, None, tmp_path / "one.pt")
    net = adapted(base, 2)
    peers.assert_all_loaded(net, tmp_path / "one.pt")
    assert_attached_is(base, adapter, net, TOKENS)
    again = loraio.load(tmp_path / "one.pt", base=base, alpha=ALPHA)
    peers.assert_merged_alike(base, adapter, again)
    assert dict(again.targets) == dict(sorted(adapter.targets.items()))


def test_its_own_alpha_is_named_if_none_is_given(base: nn.Module, tmp_path: Path) -> None:
    path = saved(adapted(base, 2), tmp_path / "file.pt")
    refused(path, base, "minLoRA's lora_alpha is 1 unless")
    assert dialects.identify(path).dialect is dialects.DIALECTS["minlora"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lora_A": None}, "'fc.weight': lora_A of parametrization 0 is missing"),
        ({"lora_A": torch.ones(3, 5)}, "which is no pair"),
        ({"lora_A": torch.ones(2, 4)}, "needs (r, 5) and (3, r)"),
        ({"original": torch.ones(3, 5)}, "the adapter belongs to another base"),
        ({"original0": torch.ones(3, 5)}, "the base has no 'fc.parametrizations.weight.original0'"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    changes: dict[str, Tensor | None], says: str, base: nn.Module, tmp_path: Path
) -> None:
    pair = {"0.lora_A": torch.ones(2, 5), "0.lora_B": torch.ones(3, 2)}
    for name, tensor in changes.items():
        key = name if name.startswith("original") else f"0.{name}"
        pair = {k: t for k, t in pair.items() if k != key} | ({} if tensor is None else {key: tensor})
    torch.save({f"fc.parametrizations.weight.{key}": tensor for key, tensor in pair.items()}, tmp_path / "file.pt")
    refused(tmp_path / "file.pt", base, says, AdapterError, BaseMismatchError, alpha=ALPHA)


def test_pairs_of_several_ranks_need_a_dtype_that_holds_them(base: nn.Module, tmp_path: Path) -> None:
    """float32 times a small whole number fits float64; float64 need not."""
    found = {}
    for at, rank in enumerate((2, 3)):
        found[f"fc.parametrizations.weight.{at}.lora_A"] = torch.randn(rank, 5)
        found[f"fc.parametrizations.weight.{at}.lora_B"] = torch.randn(3, rank)
    torch.save(found, tmp_path / "file.pt")
    adapter = loraio.load(tmp_path / "file.pt", base=base, alpha=ALPHA)
    assert adapter.factors["fc.weight.lora_B"].dtype == torch.float64
    assert adapter.targets["fc.weight"].scale == ALPHA / 6
    torch.save({name: tensor.double() for name, tensor in found.items()}, tmp_path / "wide.pt")
    refused(tmp_path / "wide.pt", base, "float64 cannot hold lora_B times 3", BaseMismatchError, alpha=ALPHA)

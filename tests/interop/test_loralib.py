"""loralib loads our files and gives our outputs, and we load its files and give its outputs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import loralib
import peers
import pytest
import torch
from peers import assert_attached_is, in_sixteenths_, read, refused
from torch import Tensor, nn

import loraio
from loraio.errors import BaseMismatchError
from loraio.formats.loralib import Loralib

LORALIB = Loralib()
ALPHA = 3
FLAGS = (True, False, True)

CONVOLUTIONS: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "conv": ((6, 8, 3), {"padding": 1}),
    "halves": ((8, 8, 3), {"groups": 2, "padding": 2, "dilation": 2, "padding_mode": "circular"}),
    "thirds": ((8, 6, 1), {"bias": False}),
    "point": ((6, 6, 3), {"groups": 3, "padding": 1}),
    "depthwise": ((6, 6, 2), {"groups": 6, "padding": 1, "stride": 2}),
    "quarters": ((6, 8, 2), {"groups": 2, "padding": 1}),
    "sixths": ((8, 8, 6), {"groups": 4, "padding": 3}),
}
"""Kernels and groups that divide each other, that do not, and that share a divisor."""

Make = Callable[..., nn.Module]


class Net(nn.Module):
    """One layer of each type that loralib adapts, and others."""

    def __init__(self, embedding: Make, conv: Make, linear: Make, merged: Make) -> None:
        super().__init__()
        self.emb = embedding("emb", 11, 6)
        for name, (sizes, settings) in CONVOLUTIONS.items():
            self.add_module(name, conv(name, *sizes, **settings))
        self.norm = nn.BatchNorm2d(8)
        self.qkv = merged("qkv", 8, 15)
        self.fc = linear("fc", 15, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.emb(tokens).transpose(1, 2).unflatten(2, (2, 4))
        for name in CONVOLUTIONS:
            x = self.get_submodule(name)(x)
        return self.fc(self.qkv(self.norm(x).mean((2, 3))).relu())


def plain() -> nn.Module:
    torch.manual_seed(0)
    makes = [lambda name, *sizes, make=make, **settings: make(*sizes, **settings) for make in (nn.Embedding, nn.Conv2d)]
    linear = [lambda name, *sizes: nn.Linear(*sizes)] * 2
    return Net(*makes, *linear).eval()


def theirs_for(base: nn.Module, ranks: dict[str, int], *, merged: bool) -> nn.Module:
    """Put loralib's layers around the base's weights, in training mode, in which it does not merge its pairs."""

    def made(make: Make, **more: Any) -> Make:
        return lambda name, *sizes, **settings: make(*sizes, r=ranks[name], lora_alpha=ALPHA, **more, **settings)

    last = made(loralib.MergedLinear, enable_lora=list(FLAGS)) if merged else made(loralib.Linear)
    net = Net(made(loralib.Embedding), made(loralib.Conv2d), made(loralib.Linear), last)
    state = base.state_dict()
    own = {name: state[name.replace(".conv.", ".")] for name in net.state_dict() if "lora_" not in name}
    net.load_state_dict(own, strict=False)
    return net


def trained(
    base: nn.Module, path: Path, *, dyadic: bool = False, bias: str = "none"
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a network of loralib's with values in all its pairs, and the state that its own function saves."""
    net = theirs_for(base, dict.fromkeys([*CONVOLUTIONS, "emb", "qkv", "fc"], 2), merged=True)
    loralib.mark_only_lora_as_trainable(net, bias=bias)
    generator = torch.Generator().manual_seed(2)
    for parameter in net.parameters():
        if parameter.requires_grad:
            values = torch.randint(-4, 5, parameter.shape, generator=generator) / 16.0
            parameter.data = values if dyadic else torch.randn(parameter.shape, generator=generator) / 4
    saved = copy.deepcopy(loralib.lora_state_dict(net, bias=bias))
    torch.save(saved, path)
    return net, saved


TOKENS = torch.randint(0, 11, (5, 8), generator=torch.Generator().manual_seed(1))
adapter_for = partial(peers.adapter_for, alpha=ALPHA)


def test_a_file_of_loralib_merges_to_its_bits_if_nothing_is_rounded(tmp_path: Path) -> None:
    base = in_sixteenths_(plain())
    net, _ = trained(base, tmp_path / "theirs.pt", dyadic=True)
    adapter = loraio.load(tmp_path / "theirs.pt", base=base, alpha=ALPHA, enable_lora=FLAGS)
    merged = loraio.merge(base.state_dict(), adapter)
    state = net.eval().state_dict()  # which merges
    for name, tensor in merged.items():
        inner = name if name in state else name.replace(".", ".conv.")
        assert tensor.equal(state[inner]), name
        assert tensor.equal(base.state_dict()[name]) == (name.split(".")[0] == "norm" or "bias" in name), name
    with loraio.attach(base, adapter):
        assert base(TOKENS).equal(net(TOKENS))


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_a_file_of_loralib_gives_its_outputs_here(bias: str, tmp_path: Path) -> None:
    base = plain()
    net, saved = trained(base, tmp_path / "theirs.pt", bias=bias)
    if bias == "lora_only":  # its own function leaves these out, because it looks for them elsewhere
        saved |= {f"{name}.bias": net.state_dict()[f"{name}.conv.bias"] for name in ("conv", "halves")}
        torch.save(saved, tmp_path / "theirs.pt")
    adapter, report = read(tmp_path / "theirs.pt", base, alpha=ALPHA, enable_lora=FLAGS)
    assert {line.name for line in report.lines if line.what == "tensor"} == set(saved)
    for name, (sizes, settings) in CONVOLUTIONS.items():
        kernel, groups = sizes[2], settings.get("groups", 1)
        overlaps = (kernel + groups) // math.gcd(kernel, groups) - 1  # of rows of the weight with rows of B @ A
        assert adapter.targets[f"{name}.weight"].rank == 2 * kernel * overlaps
    assert ("qkv.bias" in adapter.whole) == (bias != "none")
    assert_attached_is(base, adapter, net, TOKENS)


def test_a_whole_state_dict_is_read_too(tmp_path: Path) -> None:
    base = plain()
    net, _ = trained(base, tmp_path / "pairs.pt")
    torch.save(net.state_dict(), tmp_path / "whole.pt")
    whole, pairs = (
        loraio.load(tmp_path / name, base=base, alpha=ALPHA, enable_lora=FLAGS) for name in ("whole.pt", "pairs.pt")
    )
    assert whole == pairs


def test_our_file_gives_our_outputs_in_loralib_and_comes_back(tmp_path: Path) -> None:
    """The pairs of grouped convolutions may come back with lora_B and alpha moved by a power of two."""
    base = plain()
    adapter = adapter_for(base)
    peers.assert_written_twice_alike(LORALIB, adapter, None, tmp_path / "ours.pt")
    loaded = torch.load(tmp_path / "ours.pt", weights_only=True)
    kernels = {name: sizes[2] for name, (sizes, _) in CONVOLUTIONS.items()}
    ranks = {key[:-7]: len(A) // kernels.get(key[:-7], 1) for key, A in loaded.items() if key.endswith(".lora_A")}
    assert ranks["conv"] == ranks["point"] == ranks["sixths"] == 2 < ranks["halves"]
    net = theirs_for(base, ranks, merged=False)
    assert not net.load_state_dict(loaded, strict=False).unexpected_keys
    assert_attached_is(base, adapter, net, TOKENS)
    weights = {name.replace(".conv.", "."): one for name, one in net.state_dict().items() if "lora_" not in name}
    peers.assert_merged_close(base, adapter, weights)
    again = loraio.load(tmp_path / "ours.pt", base=base, alpha=ALPHA)
    for name, target in again.targets.items():
        assert target.rank == 2
        power = ALPHA / target.alpha
        assert target.groups > 1 or power == 1
        assert again.factors[f"{name}.lora_A"].equal(adapter.factors[f"{name}.lora_A"])
        assert again.factors[f"{name}.lora_B"].equal(adapter.factors[f"{name}.lora_B"] * power)
    peers.assert_merged_alike(base, adapter, again)


def test_many_groups_take_no_memory_that_grows_with_their_square(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Conv2d(384, 384, 3, groups=384, bias=False))
    adapter = adapter_for(base)
    peers.write(LORALIB, adapter, None, tmp_path / "ours.pt")
    again = loraio.load(tmp_path / "ours.pt", base=base, alpha=ALPHA)
    assert again.targets["0.weight"].rank == 2
    peers.assert_merged_alike(base, adapter, again)


@pytest.mark.parametrize("flags", [None, (), (False,), (True, True, True), (True, False), (True, False, True, True)])
def test_the_flags_of_a_merged_linear_are_asked_for_and_checked(flags: tuple[bool, ...] | None, tmp_path: Path) -> None:
    base = plain()
    trained(base, tmp_path / "theirs.pt")
    settings = {"alpha": ALPHA, "enable_lora": flags}
    text = refused(tmp_path / "theirs.pt", base, "MergedLinear", BaseMismatchError, **settings)
    assert "'qkv': lora_A is (4, 8) and lora_B (10, 2), the base's weight (15, 8)" in text
    if flags is None:
        assert "--enable-lora 1,0,1" in text


def test_its_own_alpha_is_named_if_none_is_given(tmp_path: Path) -> None:
    base = plain()
    trained(base, tmp_path / "theirs.pt")
    refused(tmp_path / "theirs.pt", base, "loralib's lora_alpha is 1 unless")

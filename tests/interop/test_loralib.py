"""loralib itself: it loads what we write and gives our outputs, and we load what it writes and give its outputs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
from torch import Tensor, nn

import loraio
from loraio.adapter import Adapter
from loraio.errors import AdapterError, BaseMismatchError
from loraio.formats import loading
from loraio.formats.foreign import Options
from loraio.formats.loralib import Loralib

ULP = 32
"""loralib multiplies, scales and adds in float32, ours is rounded once: so many eps of the largest number at most."""

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
    """loralib's layers around the base's weights, in training mode, in which it keeps them apart from its pairs."""

    def made(make: Make, **more: Any) -> Make:
        return lambda name, *sizes, **settings: make(*sizes, r=ranks[name], lora_alpha=ALPHA, **more, **settings)

    last = made(loralib.MergedLinear, enable_lora=list(FLAGS)) if merged else made(loralib.Linear)
    net = Net(made(loralib.Embedding), made(loralib.Conv2d), made(loralib.Linear), last)
    state = base.state_dict()
    own = {name: state[name.replace(".conv.", ".")] for name in net.state_dict() if "lora_" not in name}
    net.load_state_dict(own, strict=False)
    return net


def trained(base: nn.Module, *, dyadic: bool, bias: str = "none") -> tuple[nn.Module, dict[str, Tensor]]:
    """A network of loralib's with values in all its pairs, and what its own function saves of it."""
    net = theirs_for(base, dict.fromkeys([*CONVOLUTIONS, "emb", "qkv", "fc"], 2), merged=True)
    loralib.mark_only_lora_as_trainable(net, bias=bias)
    generator = torch.Generator().manual_seed(2)
    for parameter in net.parameters():
        if parameter.requires_grad:
            values = torch.randint(-4, 5, parameter.shape, generator=generator) / 16.0
            parameter.data = values if dyadic else torch.randn(parameter.shape, generator=generator) / 4
    return net, copy.deepcopy(loralib.lora_state_dict(net, bias=bias))


def dyadic_(model: nn.Module) -> nn.Module:
    """Weights in sixteenths, with which no sum of either tool is rounded."""
    for name, parameter in model.named_parameters():
        if not name.startswith("norm"):
            parameter.data = (parameter.data * 16).round() / 16
    return model


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= ULP * torch.finfo(torch.float32).eps * expected.abs().max())


def tokens() -> Tensor:
    return torch.randint(0, 11, (5, 8), generator=torch.Generator().manual_seed(1))


def random_adapter(base: nn.Module, *targets: str) -> Adapter:
    config = loraio.TrainConfig(digit=0, targets=targets, rank=2, alpha=ALPHA)
    fresh = loraio.new_adapter(base, config)
    generator = torch.Generator().manual_seed(5)
    factors = {name: torch.randn(factor.shape, generator=generator) / 4 for name, factor in fresh.factors.items()}
    return Adapter(targets=fresh.targets, factors=factors, base=fresh.base)


def test_what_loralib_trained_merges_to_its_bits_where_nothing_is_rounded(tmp_path: Path) -> None:
    base = dyadic_(plain())
    net, saved = trained(base, dyadic=True)
    torch.save(saved, tmp_path / "theirs.pt")
    adapter = loraio.load(tmp_path / "theirs.pt", base=base, alpha=ALPHA, enable_lora=FLAGS)
    merged = loraio.merge(base.state_dict(), adapter)
    state = net.eval().state_dict()  # which merges
    for name, tensor in merged.items():
        inner = name if name in state else name.replace(".", ".conv.")
        assert tensor.equal(state[inner]), name
        assert tensor.equal(base.state_dict()[name]) == (name.split(".")[0] == "norm" or "bias" in name), name
    with loraio.attach(base, adapter):
        assert base(tokens()).equal(net(tokens()))


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_what_loralib_trained_gives_its_outputs_here(bias: str, tmp_path: Path) -> None:
    base = plain()
    net, saved = trained(base, dyadic=False, bias=bias)
    if bias == "lora_only":  # its own function leaves these out, because it looks for them elsewhere
        saved |= {f"{name}.bias": net.state_dict()[f"{name}.conv.bias"] for name in ("conv", "halves")}
    torch.save(saved, tmp_path / "theirs.pt")
    adapter, report = loading.load_reported(
        tmp_path / "theirs.pt", base=base, options=Options(alpha=ALPHA, enable_lora=FLAGS)
    )
    assert report is not None
    assert {line.name for line in report.lines if line.what == "tensor"} == set(saved)
    for name, (sizes, settings) in CONVOLUTIONS.items():
        kernel, groups = sizes[2], settings.get("groups", 1)
        overlaps = (kernel + groups) // math.gcd(kernel, groups) - 1  # of rows of the weight with rows of B @ A
        assert adapter.targets[f"{name}.weight"].rank == 2 * kernel * overlaps
    before = base(tokens())
    net.eval()
    with loraio.attach(base, adapter):
        assert close(base(tokens()), net(tokens()))
        assert not close(before, base(tokens()))
        assert ("qkv.bias" in adapter.whole) == (bias != "none")
    assert base(tokens()).equal(before)


def test_a_whole_state_dict_is_read_too(tmp_path: Path) -> None:
    base = plain()
    net, saved = trained(base, dyadic=False)
    torch.save(net.state_dict(), tmp_path / "whole.pt")
    torch.save(saved, tmp_path / "pairs.pt")
    whole, pairs = (
        loraio.load(tmp_path / name, base=base, alpha=ALPHA, enable_lora=FLAGS) for name in ("whole.pt", "pairs.pt")
    )
    assert whole == pairs


def test_what_we_write_gives_our_outputs_in_loralib(tmp_path: Path) -> None:
    base = plain()
    adapter = random_adapter(base, "all")
    dialect = Loralib()
    encoded = dialect.encode(adapter, network=None, state=None, options=Options())
    loading.write(dialect, encoded, tmp_path / "ours.pt")
    loaded = torch.load(tmp_path / "ours.pt", weights_only=True)
    kernels = {name: sizes[2] for name, (sizes, _) in CONVOLUTIONS.items()}
    ranks = {key[:-7]: len(A) // kernels.get(key[:-7], 1) for key, A in loaded.items() if key.endswith(".lora_A")}
    assert ranks["conv"] == ranks["point"] == ranks["sixths"] == 2 < ranks["halves"]
    net = theirs_for(base, ranks, merged=False)
    assert not net.load_state_dict(loaded, strict=False).unexpected_keys
    with loraio.attach(base, adapter):
        assert close(net.eval()(tokens()), base(tokens()))
    merged = loraio.merge(base.state_dict(), adapter)
    for name, tensor in net.state_dict().items():
        if "lora_" not in name:
            assert close(tensor.double(), merged[name.replace(".conv.", ".")].double()), name


def test_there_and_back_gives_our_own_pairs(tmp_path: Path) -> None:
    """But for grouped convolutions, of whose pairs lora_B may have moved by a power of two, and alpha with it."""
    base = plain()
    adapter = random_adapter(base, "all")
    dialect = Loralib()
    for name in ("one.pt", "two.pt"):
        loading.write(dialect, dialect.encode(adapter, network=None, state=None, options=Options()), tmp_path / name)
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "two.pt").read_bytes()
    again = loraio.load(tmp_path / "one.pt", base=base, alpha=ALPHA)
    for name, target in again.targets.items():
        assert target.rank == 2
        power = ALPHA / target.alpha
        assert target.groups > 1 or power == 1
        assert again.factors[f"{name}.lora_A"].equal(adapter.factors[f"{name}.lora_A"])
        assert again.factors[f"{name}.lora_B"].equal(adapter.factors[f"{name}.lora_B"] * power)
    expected, merged = (loraio.merge(base.state_dict(), one) for one in (adapter, again))
    assert all(merged[name].equal(tensor) for name, tensor in expected.items())


def test_many_groups_take_no_memory_that_grows_with_their_square(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Conv2d(384, 384, 3, groups=384, bias=False))
    adapter = random_adapter(base, "all")
    encoded = Loralib().encode(adapter, network=None, state=None, options=Options())
    loading.write(Loralib(), encoded, tmp_path / "ours.pt")
    again = loraio.load(tmp_path / "ours.pt", base=base, alpha=ALPHA)
    assert again.targets["0.weight"].rank == 2
    expected, merged = (loraio.merge(base.state_dict(), one)["0.weight"] for one in (adapter, again))
    assert merged.equal(expected)


@pytest.mark.parametrize("flags", [None, (), (False,), (True, True, True), (True, False), (True, False, True, True)])
def test_the_flags_of_a_merged_linear_are_asked_for_and_checked(flags: tuple[bool, ...] | None, tmp_path: Path) -> None:
    base = plain()
    torch.save(trained(base, dyadic=False)[1], tmp_path / "theirs.pt")
    with pytest.raises(BaseMismatchError, match="MergedLinear") as caught:
        loraio.load(tmp_path / "theirs.pt", base=base, alpha=ALPHA, enable_lora=flags)
    assert "'qkv': lora_A is (4, 8) and lora_B (10, 2), the base's weight (15, 8)" in str(caught.value)
    if flags is None:
        assert "--enable-lora 1,0,1" in str(caught.value)


def test_its_own_alpha_is_said_where_none_is_given(tmp_path: Path) -> None:
    base = plain()
    torch.save(trained(base, dyadic=False)[1], tmp_path / "theirs.pt")
    with pytest.raises(AdapterError, match="loralib's lora_alpha is 1 unless"):
        loraio.load(tmp_path / "theirs.pt", base=base)

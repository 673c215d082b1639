"""Dialects that are state dicts share their alphas and replaced tensors; loralib has a layout of its own."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from peers import adapter_for, base_of
from torch import Tensor, nn

import loraio
from loraio.adapter import Adapter
from loraio.errors import AdapterError, BaseMismatchError
from loraio.formats import dialects
from loraio.formats.dialects import DIALECTS
from loraio.formats.foreign import Context, Encoded
from loraio.formats.statedicts import alpha_for, at_other_rank, joined, lone_biases


class Net(nn.Module):
    """Layers that all of them hold, and others."""

    def __init__(self) -> None:
        super().__init__()
        self.plane = nn.Conv2d(2, 4, 3)
        self.halves = nn.Conv2d(4, 8, 3, groups=2)
        self.oblong = nn.Conv2d(4, 8, (3, 2))
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 6)
        self.head = nn.Linear(6, 3)


base = base_of(Net)


on = partial(adapter_for, alpha=2)


def encode(dialect: str, adapter: Adapter) -> Encoded:
    return DIALECTS[dialect].encode(adapter, Context())


def read(dialect: str, tensors: dict[str, Tensor], base: nn.Module, path: Path, **options: object) -> Adapter:
    torch.save(tensors, path / "file.pt")
    assert dialects.identify(path / "file.pt").dialect is DIALECTS[dialect]
    return loraio.load(path / "file.pt", base=base, **options)  # type: ignore[arg-type]


def test_names_are_taken_apart_and_put_together() -> None:
    assert (joined("a.b", "weight"), joined("", "weight")) == ("a.b.weight", "weight")
    assert lone_biases(["a.bias", "b.weight", "b.bias", "bias", "c.running_mean"]) == {"a.bias", "bias"}


@pytest.mark.parametrize("size", [1, 3, 7, 9, 36])
def test_the_scale_stays_the_same_to_the_bit_at_any_rank(size: int) -> None:
    A, B = torch.randn(size, 5), torch.randn(4, size)
    padded = False
    for alpha, rank in itertools.product([1, 3, 0.1, 0.7, 1.3, 1e-9], [1, 2, 3, 4]):
        made = at_other_rank(A, B, alpha=alpha, rank=rank, note="")
        assert made.rank is not None
        assert made.alpha is not None
        assert made.alpha / made.rank == alpha / rank
        down, up = made.values["lora_A"], made.values["lora_B"]
        assert len(down) == up.shape[1] == made.rank
        assert down[:size].equal(A)
        assert up[:, :size].equal(B)
        assert not down[size:].any()
        assert not up[:, size:].any()
        padded |= made.rank > size
    assert padded == (size > 1)  # some scale needs more rank


@pytest.mark.parametrize("dialect", ["loralib", "minlora", "torchtune"])
def test_tensors_that_replace_the_bases_come_back(dialect: str, base: nn.Module, tmp_path: Path) -> None:
    adapter = on(base, "fc", norm="affine", heads={"head": 5})
    tensors = {name: tensor + 1 for name, tensor in adapter.tensors.items()}
    adapter = replace(adapter, tensors=tensors)
    again = read(dialect, dict(encode(dialect, adapter).tensors), base, tmp_path, alpha=2)
    assert again.heads == {"head": 5}
    assert {n: w.role for n, w in again.whole.items()} == {n: w.role for n, w in adapter.whole.items()}
    assert all(again.tensors[name].equal(tensor) for name, tensor in tensors.items())


def test_the_bias_of_a_convolution_has_both_of_loralibs_names(base: nn.Module, tmp_path: Path) -> None:
    ones = {"plane.lora_A": torch.ones(3, 6), "plane.lora_B": torch.ones(12, 3)}
    one = read("loralib", ones | {"plane.conv.bias": torch.ones(4)}, base, tmp_path, alpha=1)
    assert one.tensors["plane.bias"].equal(torch.ones(4))
    assert one.whole["plane.bias"].role == "bias"
    written = encode("loralib", one).tensors
    assert written["plane.bias"].equal(written["plane.conv.bias"])
    assert read("loralib", dict(written), base, tmp_path, alpha=3) == one


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"fc.lora_A": torch.ones(2, 8)}, "'fc': lora_B is missing"),
        ({"fc.lora_A": torch.ones(2, 8), "fc.lora_B": torch.ones(6, 3)}, "which is no pair"),
        ({"fc.lora_A": torch.ones(2, 8, 1), "fc.lora_B": torch.ones(6, 2)}, "which is no pair"),
        ({"fc.lora_A": torch.ones(2, 7), "fc.lora_B": torch.ones(6, 2)}, r"lora_A is \(2, 7\)"),
        ({"plane.lora_A": torch.ones(2, 18), "plane.lora_B": torch.ones(4, 2)}, "which is no pair of loralib's"),
        ({"oblong.lora_A": torch.ones(6, 12), "oblong.lora_B": torch.ones(24, 6)}, "which is no pair of loralib's"),
        ({"halves.lora_A": torch.ones(3, 6), "halves.lora_B": torch.ones(24, 3)}, "with groups=2"),
        ({"fd.lora_A": torch.ones(2, 8), "fd.lora_B": torch.ones(6, 2)}, "'fd' is no layer"),
    ],
)
def test_a_pair_of_another_layout_is_refused(
    tensors: dict[str, Tensor], says: str, base: nn.Module, tmp_path: Path
) -> None:
    with pytest.raises((AdapterError, BaseMismatchError), match=says):
        read("loralib", tensors, base, tmp_path, alpha=1)


def test_kernels_that_are_not_square_are_not_written_for_loralib(base: nn.Module) -> None:
    with pytest.raises(AdapterError, match=r"'oblong\.weight': loralib's kernels are square, this one is \(3, 2\)"):
        encode("loralib", on(base, "oblong", "plane"))


def test_values_that_would_overflow_are_not_written(base: nn.Module) -> None:
    adapter = on(base, "halves")
    factors = {name: torch.full_like(factor, 3e38) for name, factor in adapter.factors.items()}
    with pytest.raises(AdapterError, match="values too large to be multiplied by 2"):
        encode("loralib", replace(adapter, factors=factors))


def test_an_untrained_pair_comes_back_without_an_effect(base: nn.Module, tmp_path: Path) -> None:
    adapter = loraio.new_adapter(base, loraio.TrainConfig(digit=0, targets=("plane", "halves"), rank=2))
    again = read("loralib", dict(encode("loralib", adapter).tensors), base, tmp_path, alpha=2)
    assert {target.rank for target in again.targets.values()} == {1}
    state = base.state_dict()
    assert all(tensor.equal(state[name]) for name, tensor in loraio.merge(state, again).items())


@pytest.mark.parametrize("dialect", ["loralib", "minlora", "torchtune"])
def test_the_report_has_each_alpha_under_alpha_over_r(dialect: str, base: nn.Module) -> None:
    adapter = on(base, "fc", "head", alpha=4)
    report = encode(dialect, adapter).report
    assert next(line.how for line in report.lost if line.name == "alpha").endswith(": 4")
    rooted = {name: replace(t, scale_rule="alpha/sqrt(r)", alpha=2**0.5 * 3) for name, t in adapter.targets.items()}
    changed = encode(dialect, replace(adapter, targets=rooted)).report.of_fate("changed")
    assert {line.name for line in changed} == {"fc.weight.scale_rule", "head.weight.scale_rule"}
    alpha = alpha_for(rooted["fc.weight"].scale, 2)
    assert all(f"alpha {alpha!r} for alpha / r" in line.how for line in changed)


def test_alphas_that_differ_are_reported_for_each_weight(base: nn.Module) -> None:
    report = encode("loralib", on(base, "fc", "head", alpha=4, alpha_pattern={"head": 5})).report
    how = next(line.how for line in report.lost if line.name == "alpha")
    assert "4 of 'fc.weight'" in how
    assert "5 of 'head.weight'" in how

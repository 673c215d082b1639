"""Folding in blocks: the numbers of one plain float64 sum, whatever the memory, the threads and the way in."""

from __future__ import annotations

import math

import pytest
import torch
from strategies import exact_fold, nearest_float, tensor
from torch import Tensor

from loraio.adapter import Target
from loraio.adapter.folding import BLOCK, slices
from loraio.adapter.kinds import KINDS
from loraio.adapter.layers import LAYER_TYPES
from loraio.adapter.rounding import round_once

SHA = "0" * 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
SHAPES = {
    "Conv2d": (300, 130, 3, 3),
    "ConvTranspose2d": (130, 300, 3, 3),
    "Linear": (70, 9000),
    "Embedding": (9000, 70),
}
"""Each larger than a block, with a shorter last slice where it is cut."""


def target_of(layer: str, shape: tuple[int, ...], *, kind: str = "lora", rank: int = 3) -> Target:
    return Target(rank=rank, alpha=2.5, shape=shape, dtype="F32", layer=layer, kind=kind, base_sha256=SHA)


def case(layer: str, dtype: torch.dtype, kind: str = "lora") -> tuple[Target, Tensor, dict[str, Tensor]]:
    target = target_of(layer, SHAPES[layer], kind=kind)
    factors = {
        name: tensor(shape, torch.float32, seed, 0.2) for seed, (name, shape) in enumerate(target.factor_shapes.items())
    }
    return target, tensor(target.shape, dtype, 7), factors


def in_one_sum(target: Target, weight: Tensor, factors: dict[str, Tensor]) -> Tensor:
    """The float64 sum of the whole matrix at once."""
    layer = LAYER_TYPES[target.layer]
    wide = {name: factor.double() for name, factor in factors.items()}
    folded = KINDS[target.kind].fold(layer.to_matrix(weight.double()), wide, scale=target.scale, strength=0.7)
    return layer.from_matrix(folded, weight.shape)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("layer", sorted(SHAPES))
def test_slices_cover_a_weight_once_and_fit_a_block(layer: str, kind: str) -> None:
    found = slices(SHAPES[layer], LAYER_TYPES[layer], KINDS[kind])
    assert [at.start for at in found] == [0, *(at.stop for at in found[:-1])]
    assert found[-1].stop == SHAPES[layer][0]
    apart = layer in ("Conv2d", "Linear") or (layer == "Embedding" and KINDS[kind].columns_apart)
    assert (len(found) > 1) == apart
    assert not apart or all((at.stop - at.start) * math.prod(SHAPES[layer][1:]) <= BLOCK for at in found)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", sorted(SHAPES))
def test_blocks_give_the_float64_sum_of_the_whole_rounded_once(layer: str, dtype: torch.dtype, kind: str) -> None:
    target, weight, factors = case(layer, dtype, kind)
    exact = in_one_sum(target, weight, factors)
    folded = target.fold(weight, factors, strength=0.7)
    assert (folded.dtype, folded.stride()) == (dtype, weight.stride())
    doubt = exact.abs() * 2.0**-49 + 2.0**-49  # the two sums may differ by their own rounding, and only near a tie
    low, high = round_once(exact - doubt, dtype), round_once(exact + doubt, dtype)
    assert ((low <= folded) & (folded <= high)).all()
    assert (low == high).double().mean() > 0.999


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("layer", sorted(SHAPES))
def test_the_bits_do_not_depend_on_where_and_how_the_weight_lies(layer: str, dtype: torch.dtype, kind: str) -> None:
    target, weight, factors = case(layer, dtype, kind)
    expected = target.fold(weight, factors, strength=0.7)
    shifted = torch.empty(weight.numel() + 1, dtype=dtype)[1:].view(weight.shape).copy_(weight)
    backwards = weight.permute(*reversed(range(weight.ndim))).contiguous().permute(*reversed(range(weight.ndim)))
    odd_factors = {
        name: torch.empty(f.numel() + 1)[1:].view(f.shape[::-1]).permute(*reversed(range(f.ndim))).copy_(f)
        for name, f in factors.items()
    }
    forms = [shifted, backwards, *([weight.to(memory_format=torch.channels_last)] if weight.ndim == 4 else [])]
    for form in forms:
        folded = target.fold(form, odd_factors, strength=0.7)
        assert folded.stride() == form.stride()
        assert folded.equal(expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fast_fold_is_within_its_bound_and_not_exact(dtype: torch.dtype) -> None:
    target, weight, factors = case("Linear", dtype)
    exact = in_one_sum(target, weight, factors)
    fast = target.fold(weight, factors, strength=0.7, exact=False)
    A, B = (factors[name].double().abs() for name in ("lora_A", "lora_B"))
    sizes = weight.double().abs() + target.scale * 0.7 * (B @ A)
    bound = (target.rank + 3) * 2.0**-24 * sizes + exact.abs() * torch.finfo(dtype).eps / 2 + torch.finfo(dtype).tiny
    assert ((fast.double() - exact).abs() <= bound).all()
    assert dtype != torch.float32 or not fast.equal(target.fold(weight, factors, strength=0.7))
    assert target.fold(weight.double(), factors, exact=False).equal(target.fold(weight.double(), factors))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_subnormal_numbers_and_both_ends_of_the_range_round_as_they_should(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    tiny = info.tiny * info.eps
    starts = [1.0, 1 + info.eps, -1.0, 0.0, -0.0, tiny, -3 * tiny, info.tiny, info.max / 2, -info.max / 4]
    moves = [0.0, info.eps / 2, info.eps / 2 + 2.0**-40, -info.eps / 4, tiny / 2, tiny / 2 * (1 + 2.0**-20), 2.0**-60]
    weight = torch.tensor(starts, dtype=dtype)[:, None].repeat(1, len(moves))
    target = target_of("Linear", tuple(weight.shape), rank=1)
    factors = {"lora_A": torch.tensor([moves], dtype=torch.float64), "lora_B": torch.ones(len(starts), 1)}
    strength = 1 / target.scale
    assert target.scale * strength == 1.0
    folded = target.fold(weight, factors, strength=strength)
    exact = exact_fold(weight, factors["lora_A"], factors["lora_B"], 1.0)
    assert folded.double().flatten().tolist() == [nearest_float(value, dtype) for value in exact]


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinities_of_a_weight_stay_where_they_are(dtype: torch.dtype) -> None:
    target, weight, factors = case("Linear", dtype)
    kept = target.fold(weight, factors)
    weight[0, 0], weight[3, 8500], weight[69, 1] = math.nan, math.inf, -math.inf
    folded = target.fold(weight, factors)
    assert folded[0, 0].isnan()
    assert (folded[3, 8500].item(), folded[69, 1].item()) == (math.inf, -math.inf)
    assert (folded != kept).sum() == 3


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="vmap of torch 2.6 has no rule for view(dtype)")
@pytest.mark.parametrize("dtype", HALVES)
def test_folding_goes_through_transforms_of_a_program(dtype: torch.dtype) -> None:
    target, weight, factors = case("Linear", dtype)
    expected = target.fold(weight, factors)
    many = torch.func.vmap(lambda one: target.fold(one, factors))(torch.stack([weight, weight]))
    assert (many == expected).double().mean() > 1 - 1e-6

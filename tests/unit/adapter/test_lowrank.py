"""Compare factor matrices and rounding with exact rational arithmetic and NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from strategies import nearest_float

from loraio.adapter.lowrank import effective_rank, truncated_svd
from loraio.adapter.rounding import round_once, ulp
from loraio.errors import ConfigError, ShapeError

HALVES = (torch.float16, torch.bfloat16)
ALL = (torch.float64, torch.float32, *HALVES)


def grid(dtype: torch.dtype) -> torch.Tensor:
    """Return float64 values that are hard to round to 16 bits: ties in all binades, and values just beside them."""
    bits = torch.arange(0, 2**16, 97, dtype=torch.int32).to(torch.uint16)
    values = bits.view(dtype).double()
    values = values[values.isfinite()]
    spacing = ulp(values, dtype)
    ties = values + spacing / 2
    quarter = values + spacing / 4
    hairs = [point + sign * spacing * 2.0**-25 for point in (values, ties) for sign in (-1, 1)]
    far = [ties * (1 + sign * 2.0**-50) for sign in (-1, 1)]
    return torch.cat([values, ties, quarter, *hairs, *far])


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_agrees_with_exact_arithmetic_around_every_kind_of_tie(dtype: torch.dtype) -> None:
    values = grid(dtype)
    found = round_once(values, dtype)
    assert found.dtype == dtype
    wrong = [
        value
        for value, got in zip(values.tolist(), found.double().tolist(), strict=True)
        if got != nearest_float(Fraction(value), dtype)
    ]
    assert not wrong
    assert not values.to(torch.float32).to(dtype).equal(found)  # rounding twice gets some wrong


def test_rounding_to_float16_agrees_with_numpy() -> None:
    generator = torch.Generator().manual_seed(3)
    spread = torch.randn(20_000, generator=generator, dtype=torch.float64) * 2.0 ** torch.randint(
        -30, 17, (20_000,), generator=generator
    )
    values = torch.cat([grid(torch.float16), spread])
    with np.errstate(over="ignore"):
        expected = torch.from_numpy(values.numpy().astype(np.float16))
    assert round_once(values, torch.float16).view(torch.int16).equal(expected.view(torch.int16))


@pytest.mark.parametrize("dtype", ALL)
def test_values_of_the_dtype_itself_stay_to_the_bit(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    values = torch.tensor(
        [0.0, -0.0, 1.0, -1.5, info.max, info.min, info.tiny, info.tiny * info.eps, math.inf, -math.inf],
        dtype=torch.float64,
    )
    found = round_once(values, dtype).double()
    assert found.equal(values)
    assert found.signbit().equal(values.signbit())
    assert round_once(torch.full((2, 0, 3), math.nan, dtype=torch.float64), dtype).shape == (2, 0, 3)
    assert round_once(torch.tensor(math.nan, dtype=torch.float64), dtype).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_overflow_begins_half_an_ulp_above_the_largest_number(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    limit = info.max * (1 + info.eps / (2 - info.eps) / 2)  # half an ulp above: a tie that rounds to infinity
    values = torch.tensor([limit, math.nextafter(limit, 0.0), -limit, 1e300], dtype=torch.float64)
    assert round_once(values, dtype).double().tolist() == [math.inf, info.max, -math.inf, math.inf]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_values_below_the_smallest_number_round_to_zero_or_to_it_and_keep_their_sign(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    smallest = info.tiny * info.eps
    half = smallest / 2
    values = torch.tensor(
        [half, math.nextafter(half, 1.0), -math.nextafter(half, 1.0), -half, 1e-300, -1e-300], dtype=torch.float64
    )
    found = round_once(values, dtype).double()
    assert found.tolist() == [0.0, smallest, -smallest, 0.0, 0.0, 0.0]
    assert found.signbit().tolist() == [False, False, True, True, False, True]


@pytest.mark.parametrize("dtype", ALL)
def test_an_ulp_is_the_distance_to_the_next_number(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    generator = torch.Generator().manual_seed(1)
    scale = torch.logspace(math.log2(info.tiny) - 4, math.log2(info.max) - 2, 400, base=2, dtype=torch.float64)
    values = (torch.rand(400, generator=generator, dtype=torch.float64) + 0.5) * scale
    values = torch.cat([values.to(dtype), torch.tensor([1.0, 2.0, info.tiny, info.tiny / 2], dtype=dtype)])
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[values.element_size()]
    above = (values.view(integer) + 1).view(dtype)
    spacing = above.double() - values.double()
    assert ulp(values.double(), dtype).equal(spacing)
    assert ulp(-values.double(), dtype).equal(spacing)


@pytest.mark.parametrize("dtype", ALL)
def test_the_ulp_of_zero_is_the_smallest_number(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    assert ulp(torch.tensor([0.0, -0.0], dtype=torch.float64), dtype).tolist() == [info.tiny * info.eps] * 2
    assert ulp(torch.tensor([math.inf, -math.inf, math.nan], dtype=torch.float64), dtype).isnan().all()


def rank_two(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    return (left @ torch.randn(2, 9, generator=generator, dtype=torch.float64)).to(dtype)


def test_svd_factors_give_a_low_rank_matrix_back_and_share_the_singular_values_evenly() -> None:
    matrix = rank_two()
    B, A = truncated_svd(matrix, 2)
    assert (B.shape, A.shape) == ((6, 2), (2, 9))
    assert (B @ A - matrix).abs().max() < 1e-13
    assert torch.allclose(B.norm(dim=0), A.norm(dim=1))
    assert torch.allclose(B.T @ B, torch.diag(B.norm(dim=0) ** 2))
    assert {factor.dtype for factor in truncated_svd(rank_two(torch.float32), 1)} == {torch.float32}


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_the_error_of_truncation_is_what_eckart_and_young_say(rank: int) -> None:
    generator = torch.Generator().manual_seed(5)
    matrix = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    B, A = truncated_svd(matrix, rank)
    dropped = torch.linalg.svdvals(matrix)[rank:]
    assert torch.allclose((matrix - B @ A).norm(), dropped.norm(), atol=1e-12)
    for _ in range(20):  # any nudge makes it worse
        nudged = (B + 0.01 * torch.randn(B.shape, generator=generator, dtype=torch.float64)) @ A
        assert (matrix - nudged).norm() > (matrix - B @ A).norm()


@pytest.mark.parametrize("rank", [0, -1, 7])
def test_svd_refuses_a_rank_out_of_range(rank: int) -> None:
    with pytest.raises(ConfigError, match=f"rank {rank} is outside 1 to 6"):
        truncated_svd(rank_two(), rank)


@pytest.mark.parametrize("function", [lambda matrix: truncated_svd(matrix, 1), effective_rank])
def test_what_is_no_matrix_is_refused(function: Callable[[torch.Tensor], object]) -> None:
    with pytest.raises(ShapeError, match=r"not the shape \(2, 3, 4\)"):
        function(torch.ones(2, 3, 4))


@pytest.mark.parametrize("dtype", ALL)
def test_effective_rank_sees_through_the_rounding_of_the_dtype(dtype: torch.dtype) -> None:
    assert effective_rank(rank_two(dtype)) == 2
    assert effective_rank(torch.eye(3, dtype=dtype)) == 3
    assert effective_rank(torch.zeros(3, 4, dtype=dtype)) == 0
    steps = torch.diag(torch.tensor([1.0, 0.1, 0.001], dtype=dtype))
    assert [effective_rank(steps, tolerance=t) for t in (0.5, 0.01, 1e-4)] == [1, 2, 3]

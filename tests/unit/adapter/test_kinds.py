"""Check the factors of kinds, their start values, and the matrices that they make."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from strategies import exact_fold

from loraio.adapter.kinds import KINDS, Kind
from loraio.adapter.kinds.lora import INITS, Lora
from loraio.errors import UnknownNameError

LORA = Lora()


def init(
    method: str = "kaiming", seed: int = 1, rank: int = 4, shape: tuple[int, int] = (64, 288)
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return LORA.init(torch.ones(shape), rank, method=method, generator=generator)


def test_the_registry_holds_each_kind_by_its_own_name() -> None:
    assert KINDS["lora"].name == "lora"
    assert all(kind.name == name for name, kind in KINDS.items())


@pytest.mark.parametrize("method", sorted(INITS))
def test_a_starts_random_by_the_seed_alone_and_b_starts_at_zero(method: str) -> None:
    before = torch.get_rng_state()
    factors = init(method)
    assert torch.get_rng_state().equal(before)
    assert factors["lora_A"].count_nonzero() == 4 * 288
    assert factors["lora_B"].count_nonzero() == 0
    assert {factor.dtype for factor in factors.values()} == {torch.float32}
    torch.manual_seed(1)
    assert init(method)["lora_A"].equal(factors["lora_A"])
    assert not init(method, seed=2)["lora_A"].equal(factors["lora_A"])


def test_the_kaiming_start_is_uniform_and_the_gaussian_start_standard_normal() -> None:
    A = init("kaiming", rank=64)["lora_A"]
    bound = 1 / math.sqrt(288)
    assert 0.99 * bound < A.abs().max() <= bound
    assert abs(float(A.std()) / (bound / math.sqrt(3)) - 1) < 0.02  # 18,432 draws
    A = init("gaussian", rank=64)["lora_A"]
    assert abs(float(A.mean())) < 0.03  # 18,432 draws: four standard errors
    assert abs(float(A.std()) - 1) < 0.03


def test_an_unknown_start_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="no initialisation 'kaming'; did you mean 'kaiming'"):
        init("kaming")


def test_fold_is_the_formula_in_small_numbers() -> None:
    W = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    A, B = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[2.0], [3.0]])
    folded = LORA.fold(W, {"lora_A": A, "lora_B": B}, scale=0.5)
    assert folded.tolist() == [[2.0, 2.0, 2.0], [5.5, 5.0, 4.5]]
    assert W.tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]


def test_the_reference_is_within_half_its_bound_of_the_exact_sum() -> None:
    generator = torch.Generator().manual_seed(2)
    W, A, B = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((5, 7), (3, 7), (5, 3)))
    W = -(B @ A) * 0.3 + W * 1e-12  # the sum cancels almost in full: the worst case for its error
    copies = [matrix.clone() for matrix in (W, A, B)]
    found, bound = LORA.reference(W.numpy(), {"lora_A": A.numpy(), "lora_B": B.numpy()}, scale=0.3)
    assert all(matrix.equal(copy) for matrix, copy in zip((W, A, B), copies, strict=True))
    exact = exact_fold(W, A, B, 0.3)
    distances = np.array([abs(float(e - type(e)(f))) for e, f in zip(exact, found.ravel(), strict=True)])
    assert (distances <= bound.ravel() / 2).all()
    assert distances.max() > 0


@pytest.mark.parametrize("strength", [1.0, 0.3, -2.0, 0.0])
@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if type(kind).unfold is not Kind.unfold])
def test_unfold_gives_the_old_matrix_but_for_roundings(name: str, strength: float) -> None:
    kind, generator = KINDS[name], torch.Generator().manual_seed(3)
    shapes = kind.shapes(5, 7, 3)
    factors = {key: torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5 for key, shape in shapes.items()}
    old = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    side = kind.side(old, factors, scale=0.4)
    assert (0 if side is None else side.numel()) == kind.side_numbers(5)
    new = kind.fold(old, factors, scale=0.4, strength=strength)
    found = kind.unfold(new, factors, scale=0.4, strength=strength, side=side)
    assert (found - old).abs().max() < 1e-12  # of numbers around 1, in float64
    assert strength == 0 or (new - old).abs().max() > 0.1

"""Turn changes of a weight that are no plain pair of factors into pairs: exactly, or nearest at a rank.

Everything here is float64, in which the product of two float32 numbers is exact.

Hyeon-Woo et al. 2022, FedPara, arXiv:2108.06098 (Hadamard products); Edalati et al. 2022, KronA, arXiv:2212.10650
(Kronecker products); Tucker 1966, Some mathematical notes on three-mode factor analysis (cores).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A change of a weight, unscaled.

    Attributes:
        delta: (out, fan_in).
        rank: R, of the pair that its structure gives; it may exceed the rank that a matrix can have.
        pair: makes that pair, (out, R) and (R, fan_in); its product is the delta up to rounding.
    """

    delta: Tensor
    rank: int
    pair: Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A plain pair of factors instead of a product.

    Attributes:
        up: (out, rank), float32 or float64.
        down: (rank, fan_in).
        note: the kind of the pair, with its error.
    """

    up: Tensor
    down: Tensor
    note: str

    @property
    def rank(self) -> int:
        """The inner size."""
        return self.down.shape[0]


def whole(delta: Tensor) -> Product:
    """Return any matrix as a product with an identity on its shorter side."""
    return Product(delta=delta, rank=min(delta.shape), pair=lambda: _as_pair([delta]))


def hadamard(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Product:
    """Return the entry by entry product of two low-rank matrices, each (out, r) and (r, fan_in).

    Column (j, k) of the pair is the product of column j of the first and column k of the second.

    >>> import torch
    >>> a, b = torch.tensor([[2.0], [3.0]]).double(), torch.tensor([[1.0, 5.0]]).double()
    >>> hadamard((a, b), (a, b)).delta.tolist()
    [[4.0, 100.0], [9.0, 225.0]]
    """
    (up_1, down_1), (up_2, down_2) = first, second

    def pair() -> tuple[Tensor, Tensor]:
        up = (up_1[:, :, None] * up_2[:, None, :]).flatten(1)
        return up, (down_1[:, None, :] * down_2[None, :, :]).flatten(0, 1)

    rank = up_1.shape[1] * up_2.shape[1]
    return Product(delta=(up_1 @ down_1) * (up_2 @ down_2), rank=rank, pair=pair)


def kronecker(first: Sequence[Tensor], second: Sequence[Tensor]) -> Product:
    """Return the Kronecker product of two matrices, each given whole or as a pair (rows, r) and (r, columns).

    >>> import torch
    >>> product = kronecker([torch.ones(2, 3).double()], [torch.ones(4, 1).double(), torch.ones(1, 5).double()])
    >>> tuple(product.delta.shape), product.rank
    ((8, 15), 2)
    """

    def pair() -> tuple[Tensor, Tensor]:
        one, two = _as_pair(first), _as_pair(second)
        return _kron(one[0], two[0]), _kron(one[1], two[1])

    rank = math.prod(min(half[0].shape) if len(half) == 1 else half[1].shape[0] for half in (first, second))
    return Product(delta=_kron(_matrix(first), _matrix(second)), rank=rank, pair=pair)


def with_core(core: Tensor, down: Tensor) -> Tensor:
    """Multiply a core (r, s, kernel...) into a factor (s, in); return one factor (r, in * kernel)."""
    import torch

    return torch.einsum("ab...,bi->ai...", core.double(), down.double()).flatten(1)


def nearest_pair(product: Product, rank: int) -> Pair:
    """Return the product as a pair: the exact one if its rank suffices, else the nearest at that rank.

    Args:
        product: the change.
        rank: of the pair, at most; at least 1.

    Eckart and Young 1936, The approximation of one matrix by another of lower rank.
    """
    from loraio.adapter.lowrank import truncated_svd

    full = min(product.delta.shape)
    if rank >= min(product.rank, full):
        exact = product if product.rank <= full else whole(product.delta)
        up, down = (narrow(factor) for factor in exact.pair())
        return Pair(up=up, down=down, note=f"a pair of rank {down.shape[0]} that gives the same change")
    up, down = (factor.float() for factor in truncated_svd(product.delta, rank))
    error = relative_error(product.delta, up.double() @ down.double())
    return Pair(up=up, down=down, note=f"approximated at rank {rank}, relative Frobenius error {error:.3g}")


def narrow(values: Tensor) -> Tensor:
    """Return the values as float32 if that loses nothing."""
    small = values.float()
    return small if small.double().equal(values) else values


def relative_error(exact: Tensor, found: Tensor) -> float:
    """Return the Frobenius norm of the difference over that of the exact values; 0 if both are zero."""
    difference = (exact - found).norm().item()
    return difference / exact.norm().item() if difference else 0.0


def alpha_for(scale: float, rank: int) -> float | None:
    """Return the alpha with which alpha / rank is the scale to the bit; None if there is none."""
    guess = scale * rank
    near = (guess, math.nextafter(guess, math.inf), math.nextafter(guess, -math.inf))
    return next((alpha for alpha in near if alpha / rank == scale), None)


def alpha_at(scale: float, rank: int) -> float:
    """Return an alpha with ``alpha / rank == scale``; if float64 has none, the one nearest to it.

    >>> alpha_at(1.5, 4), alpha_at(1 / 3, 7) / 7 == 1 / 3
    (6.0, True)
    """
    alpha = alpha_for(scale, rank)
    return scale * rank if alpha is None else alpha


def _kron(one: Tensor, two: Tensor) -> Tensor:
    rows, columns = (one.shape[dim] * two.shape[dim] for dim in (0, 1))
    return (one[:, None, :, None] * two[None, :, None, :]).reshape(rows, columns)


def _matrix(given: Sequence[Tensor]) -> Tensor:
    return given[0] if len(given) == 1 else given[0] @ given[1]


def _as_pair(given: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    import torch

    if len(given) == 2:
        return given[0], given[1]
    rows, columns = given[0].shape
    identity = torch.eye(min(rows, columns), dtype=torch.float64)
    return (identity, given[0]) if rows <= columns else (given[0], identity)

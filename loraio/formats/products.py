"""Turn changes of a weight that are no plain pair of factors into pairs: exactly, or nearest at a rank.

LoHa, LoKr and whole changes of LyCORIS are read by their shapes first. Everything else here is float64, in which the
product of two float32 numbers is exact.

Hyeon-Woo et al. 2022, FedPara, arXiv:2108.06098 (Hadamard products); Edalati et al. 2022, KronA, arXiv:2212.10650
(Kronecker products); Tucker 1966, Some mathematical notes on three-mode factor analysis (cores).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraio.formats.reading import Reading, Shape

if TYPE_CHECKING:
    from torch import Tensor


DIFF = "diff"

HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")

HADA_CORES = ("hada_t1", "hada_t2")

KRON = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")

KERNELS = (DIFF, *HADA_CORES, "lokr_w2", "lokr_t2", "lokr_w2_b")
"""Slots with the kernel of a convolution."""


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


def hadamard_rank(name: str, slots: Mapping[str, str], reading: Reading) -> int | None:
    """Return the rank of a LoHa layer; None if its shapes do not go together, and a refusal is noted."""
    missing = [slot for slot in HADA if slot not in slots]
    if missing or len(slots.keys() & set(HADA_CORES)) == 1:
        reading.refusals.append(f"{name!r}: {(missing or ['one of hada_t1 and hada_t2'])[0]} is missing")
        return None
    shapes = [reading.shape(slots[slot]) for slot in HADA]
    cores = [reading.shape(slots[slot]) for slot in HADA_CORES if slot in slots]
    rank = _common_rank(shapes, cores)
    if rank is None:
        reading.refusals.append(f"{name!r}: {', '.join(HADA)} of shapes {[*shapes, *cores]} do not go together")
    return rank


def _common_rank(shapes: Sequence[Shape], cores: Sequence[Shape]) -> int | None:
    """Return the rank of both pairs of a LoHa layer; with cores the first factors are (rank, out)."""
    if any(len(shape) != 2 for shape in shapes):
        return None
    ups, downs = shapes[::2], shapes[1::2]
    inner, outer = (0, 1) if cores else (1, 0)
    rank = downs[0][0]
    alike = downs[0] == downs[1] and len({up[outer] for up in ups}) == 1 and len(set(cores)) <= 1
    fits = rank and all(up[inner] == rank for up in ups) and all(core[:2] == (rank, rank) for core in cores)
    return rank if alike and fits else None


def kronecker_ranks(name: str, slots: Mapping[str, str], reading: Reading) -> tuple[int | None, int] | None:
    """Return the rank of a LoKr layer, None for two whole matrices, and the rank of an exact pair.

    If its shapes do not go together the result is None, and a refusal is noted.
    """
    shapes = {slot: reading.shape(key) for slot, key in slots.items() if slot in KRON}
    ranks, sizes = [], []
    for half in ("lokr_w1", "lokr_w2"):
        up, down, core = (shapes.get(slot) for slot in _slots_of(half))
        if half in shapes and up is None and down is None and core is None and _is_whole(half, shapes[half]):
            sizes.append(min(shapes[half][0], math.prod(shapes[half][1:])))
            continue
        inner = 0
        if half not in shapes and up is not None and down is not None and len(up) == 2 <= len(down):
            inner = up[1 if core is None else 0]
        if not inner or down is None or inner != down[0]:
            reading.refusals.append(f"{name!r}: {half} is neither whole nor a pair, of shapes {shapes}")
            return None
        if core is not None and (core[:2] != (inner, inner) or len(down) != 2):
            reading.refusals.append(f"{name!r}: lokr_t2 is {core}, its factors have rank {inner}")
            return None
        ranks.append(inner)
        sizes.append(inner)
    if len({*ranks}) > 1 or 0 in sizes:
        reading.refusals.append(f"{name!r}: lokr_w1 and lokr_w2 of shapes {shapes} do not go together")
        return None
    return (ranks[0] if ranks else None), math.prod(sizes)


def _slots_of(half: str) -> tuple[str, str, str]:
    """Return the slots of a half that is a pair: only the second half may have a core."""
    return f"{half}_a", f"{half}_b", "lokr_t2" if half == "lokr_w2" else ""


def _is_whole(half: str, shape: Shape) -> bool:
    return len(shape) == 2 or (half == "lokr_w2" and len(shape) > 2)


def matrix_shape(values: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return (out, fan_in) of a product without making it: a small file may ask for a huge one."""
    shapes = {slot: tuple(value.shape) for slot, value in values.items()}
    if DIFF in shapes:
        return shapes[DIFF][0], math.prod(shapes[DIFF][1:])
    if HADA[0] in shapes:
        return _pair_shape(shapes["hada_w1_a"], shapes["hada_w1_b"], shapes.get("hada_t1"))
    halves = []
    for half in ("lokr_w1", "lokr_w2"):
        up, down, core = (shapes.get(slot) for slot in _slots_of(half))
        if up is None or down is None:
            halves.append((shapes[half][0], math.prod(shapes[half][1:])))
        else:
            halves.append(_pair_shape(up, down, core))
    return halves[0][0] * halves[1][0], halves[0][1] * halves[1][1]


def _pair_shape(up: Shape, down: Shape, core: Shape | None) -> tuple[int, int]:
    columns = math.prod(down[1:])
    return (up[0], columns) if core is None else (up[1], columns * math.prod(core[2:]))


def product_of(values: Mapping[str, Tensor]) -> Product:
    """Return the change of a weight that float64 tensors, by slot, make."""
    if DIFF in values:
        return whole(values[DIFF].flatten(1))
    if HADA[0] in values:
        first, second = (
            _factors(values[f"hada_w{half}_a"], values[f"hada_w{half}_b"], values.get(f"hada_t{half}")) for half in "12"
        )
        return hadamard(first, second)
    halves: list[Sequence[Tensor]] = []
    for half in ("lokr_w1", "lokr_w2"):
        up, down, core = (values.get(slot) for slot in _slots_of(half))
        halves.append([values[half].flatten(1)] if up is None or down is None else _factors(up, down, core))
    return kronecker(halves[0], halves[1])


def _factors(up: Tensor, down: Tensor, core: Tensor | None) -> tuple[Tensor, Tensor]:
    return (up, down.flatten(1)) if core is None else (up.T, with_core(core, down))

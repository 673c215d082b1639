"""Read the methods of LyCORIS that multiply matrices, LoHa and LoKr, and whole changes: by shapes, then by values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from loraio.formats.products import Product, hadamard, kronecker, whole, with_core
from loraio.formats.reading import Reading, Shape

if TYPE_CHECKING:
    from torch import Tensor

DIFF = "diff"

HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")

HADA_CORES = ("hada_t1", "hada_t2")

KRON = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")

KERNELS = (DIFF, *HADA_CORES, "lokr_w2", "lokr_t2", "lokr_w2_b")
"""Slots with the kernel of a convolution."""


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
            _pair(values[f"hada_w{half}_a"], values[f"hada_w{half}_b"], values.get(f"hada_t{half}")) for half in "12"
        )
        return hadamard(first, second)
    halves: list[Sequence[Tensor]] = []
    for half in ("lokr_w1", "lokr_w2"):
        up, down, core = (values.get(slot) for slot in _slots_of(half))
        halves.append([values[half].flatten(1)] if up is None or down is None else _pair(up, down, core))
    return kronecker(halves[0], halves[1])


def _pair(up: Tensor, down: Tensor, core: Tensor | None) -> tuple[Tensor, Tensor]:
    return (up, down.flatten(1)) if core is None else (up.T, with_core(core, down))

"""Hypothesis strategies: adapters and base weights of random shapes, names and dtypes. And exact rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from loraio.adapter.adapter import Adapter
from loraio.adapter.kinds import KINDS
from loraio.adapter.layers import LAYER_TYPES
from loraio.adapter.metadata import SCALE_RULES, BaseReference, Target
from loraio.bases.identity import state_sha256
from loraio.files.names import HIDDEN
from loraio.files.tensors import dtype_code, tensor_sha256

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

names = st.text(st.characters(codec="utf-8", exclude_categories=HIDDEN), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
seeds = st.integers(0, 2**32 - 1)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
json_objects = st.dictionaries(st.text(max_size=5), json_values, max_size=3)
extras = st.dictionaries(st.text(max_size=5).map("x-".__add__), json_values, max_size=2)  # keys of no version


def nearest_float(exact: Fraction, dtype: torch.dtype) -> float:
    """The number of a float dtype that is nearest to an exact one, ties to even; infinity where it overflows."""
    info = torch.finfo(dtype)
    size = abs(exact)
    if not size:
        return 0.0
    exponent = size.numerator.bit_length() - size.denominator.bit_length()  # of the leading bit, or one too many
    exponent -= size < Fraction(2) ** exponent
    spacing = Fraction(2) ** max(exponent, round(math.log2(info.tiny))) * Fraction(info.eps)
    rounded = round(size / spacing) * spacing
    return math.copysign(math.inf if rounded > Fraction(info.max) else float(rounded), exact)


def exact_fold(matrix: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float) -> list[Fraction]:
    """``W + scale * (B @ A)`` in rational arithmetic, one number for each element of the matrix in C order."""
    W, A, B = (
        [[Fraction(value) for value in row] for row in tensor.double().tolist()] for tensor in (matrix, lora_A, lora_B)
    )
    columns = list(zip(*A, strict=True))
    return [
        value + Fraction(scale) * sum((b * a for b, a in zip(up, column, strict=True)), Fraction(0))
        for row, up in zip(W, B, strict=True)
        for value, column in zip(row, columns, strict=True)
    ]


def tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int, spread: float = 1.0) -> Tensor:
    """Normal values of a seed, in any float dtype."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * spread).to(dtype)


@st.composite
def states_and_adapters(
    draw: st.DrawFn,
    *,
    base_dtypes: tuple[torch.dtype, ...] = FLOATS,
    with_extras: bool = False,
    kinds: Sequence[str] = tuple(KINDS),
) -> tuple[dict[str, Tensor], Adapter]:
    """A base state dict, with some tensors that are no targets, and an adapter that fits it."""
    state: dict[str, Tensor] = {}
    for name in draw(st.lists(names, min_size=0, max_size=2, unique=True)):
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
        state[name] = tensor(shape, draw(st.sampled_from([*FLOATS])), draw(seeds))
    state["steps"] = torch.tensor(7)
    targets: dict[str, Target] = {}
    factors: dict[str, Tensor] = {}
    for name in draw(st.lists(names, min_size=1, max_size=3, unique=True)):
        name = f"{name}.weight"
        layer = LAYER_TYPES[draw(st.sampled_from(sorted(LAYER_TYPES)))]
        groups = draw(st.sampled_from([1, 1, 2])) if layer.grouped else 1
        out = groups * draw(st.integers(1, 5))
        shape = (out, *draw(st.lists(st.integers(1, 4), min_size=layer.dims - 1, max_size=layer.dims - 1)))
        rank = draw(st.integers(1, min(layer.matrix_shape(shape, groups))))
        weight = tensor(shape, draw(st.sampled_from(base_dtypes)), draw(seeds))
        factor_dtype = draw(st.sampled_from(FLOATS))
        state[name] = weight
        targets[name] = Target(
            rank=rank,
            alpha=draw(st.integers(1, 32) | st.floats(0.125, 32, width=32)),
            kind=draw(st.sampled_from(kinds)),
            scale_rule=draw(st.sampled_from(sorted(SCALE_RULES))),
            shape=shape,
            dtype=dtype_code(weight.dtype),
            layer=layer.name,
            groups=groups,
            base_sha256=tensor_sha256(weight),
            extra=draw(extras) if with_extras else {},
        )
        for short, factor_shape in targets[name].factor_shapes.items():
            factors[f"{name}.{short}"] = tensor(factor_shape, factor_dtype, draw(seeds), 0.3)
    digest = state_sha256(state)
    rest: dict[str, Any] = {}
    if with_extras:
        rest = {"training": draw(json_objects), "extra": draw(extras)}
        base = BaseReference(sha256=digest, network=draw(st.none() | st.text(max_size=8)), extra=draw(extras))
    else:
        base = BaseReference(sha256=digest)
    return state, Adapter(targets=targets, factors=factors, base=base, **rest)

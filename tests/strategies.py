"""Hypothesis strategies: adapters and base weights of random shapes, names and dtypes."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from loraio.adapter import SCALE_RULES, Adapter, BaseReference, Target
from loraio.container import dtype_code
from loraio.identity import state_sha256, tensor_sha256
from loraio.layers import LAYER_TYPES

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
seeds = st.integers(0, 2**32 - 1)


def tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int, spread: float = 1.0) -> Tensor:
    """Normal values of a seed, in any float dtype."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * spread).to(dtype)


@st.composite
def states_and_adapters(draw: st.DrawFn, *, base_dtypes: tuple[torch.dtype, ...] = FLOATS) -> tuple[dict[str, Tensor], Adapter]:
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
        groups = draw(st.sampled_from([1, 1, 2])) if layer.group == "conv" else 1
        out = groups * draw(st.integers(1, 5))
        shape = (out, *draw(st.lists(st.integers(1, 4), min_size=layer.dims - 1, max_size=layer.dims - 1)))
        rank = draw(st.integers(1, min(out, math.prod(shape[1:]))))
        weight = tensor(shape, draw(st.sampled_from(base_dtypes)), draw(seeds))
        factor_dtype = draw(st.sampled_from(FLOATS))
        state[name] = weight
        targets[name] = Target(
            rank=rank,
            alpha=draw(st.integers(1, 32) | st.floats(0.125, 32, width=32)),
            scale_rule=draw(st.sampled_from(sorted(SCALE_RULES))),
            shape=shape,
            dtype=dtype_code(weight.dtype),
            layer=layer.name,
            groups=groups,
            base_sha256=tensor_sha256(weight),
        )
        for short, factor_shape in targets[name].factor_shapes.items():
            factors[f"{name}.{short}"] = tensor(factor_shape, factor_dtype, draw(seeds), 0.3)
    adapter = Adapter(targets=targets, factors=factors, base=BaseReference(sha256=state_sha256(state)))
    return state, adapter

"""Choose the way of a layer's training step for inputs of one form."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from loraio.live.geometry import Geometry, is_channels_last

THIN = 2
"""How much longer a multiplication takes in a product as thin as a rank; measured for rank 8 on one CPU core."""

SMALL = 32
"""The hidden channels are saved if the input has at least this many times as many numbers."""

_EXACT = (torch.float32, torch.float64)
"""Dtypes in which a sum of products is not rounded to less than factors have."""


class Pair(NamedTuple):
    """A weight and its factors: ``weight + scale * (B @ A)``."""

    weight: Tensor
    lora_A: Tensor  # noqa: N815
    lora_B: Tensor  # noqa: N815
    scale: float

    def fold(self, dtype: torch.dtype) -> Tensor:
        """Return the folded weight, rounded to the weight's dtype and then to the one that the layer computes in."""
        weight, lora_A, lora_B = self.weight, self.lora_A, self.lora_B
        if weight.dtype == lora_A.dtype == lora_B.dtype == dtype and dtype in _EXACT:
            return weight.reshape(len(weight), -1).addmm(lora_B, lora_A, alpha=self.scale).view(weight.shape)
        exact = torch.promote_types(weight.dtype, torch.float32)
        matrix = weight.to(exact).reshape(len(weight), -1)
        folded = matrix.addmm(lora_B.to(exact), lora_A.to(exact), alpha=self.scale)
        return folded.view(weight.shape).to(weight.dtype).to(dtype)

    def in_one_dtype(self, x: Tensor) -> bool:
        """Return True if everything has the input's dtype, and that is exact enough to sum products in."""
        return x.dtype == self.weight.dtype == self.lora_A.dtype == self.lora_B.dtype and x.dtype in _EXACT

    def from_full(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of A and B, given that of the folded weight."""
        matrix = gradient.reshape(len(gradient), -1).to(torch.promote_types(gradient.dtype, torch.float32))
        lora_A, lora_B = self.lora_A.to(matrix.dtype), self.lora_B.to(matrix.dtype)
        grad_A = torch.addmm(lora_A, lora_B.t(), matrix, beta=0, alpha=self.scale)
        grad_B = torch.addmm(lora_B, matrix, lora_A.t(), beta=0, alpha=self.scale)
        return grad_A.to(self.lora_A.dtype), grad_B.to(self.lora_B.dtype)


def thin_is_cheaper(*, rank: int, out: int, fan_in: int, groups: int, positions: int) -> bool:
    """Return True if two gradients by way of the rank take less time than the whole gradient and its two products.

    Multiplications, by way of the rank: ``2 * rank * (groups * fan_in + out)`` for each position of the output, each
    counted `THIN` times. In full: ``out * fan_in`` for each position, and ``2 * rank * out * fan_in`` for the products.

    Args:
        rank: r.
        out: number of output channels.
        fan_in: inputs of one of them, in / groups * kernel.
        groups: of the convolution.
        positions: of the output, over the whole batch.

    >>> thin_is_cheaper(rank=8, out=64, fan_in=576, groups=1, positions=3136)
    True
    >>> thin_is_cheaper(rank=8, out=64, fan_in=9, groups=64, positions=3136)
    False
    """
    thin = 2 * rank * (groups * fan_in + out) * positions
    return THIN * thin < out * fan_in * (positions + 2 * rank)


def folding_is_cheaper(*, positions: int, width: int) -> bool:
    """Return True if it takes less time to fold the weight first than to add a product of two thin matrices.

    A fold touches ``out * fan_in`` numbers. The product, one factor of which is there anyhow, touches for each position
    ``out`` numbers in the forward pass and ``fan_in`` in the backward pass.

    Args:
        positions: of the output, over the whole batch.
        width: fan_in in the forward pass, out in the backward pass.

    >>> folding_is_cheaper(positions=196, width=2048), folding_is_cheaper(positions=12544, width=64)
    (False, True)
    """
    return positions > width


class Route(NamedTuple):
    """The way of a convolution for inputs of one form; to choose it takes as long as a small layer.

    Attributes:
        margins: padding that comes first, as `torch.nn.functional.pad` takes it; None for none.
        mode: of that padding.
        geometry: how the convolution is moved over the padded input.
        sizes: of its output, without batch and channels.
        rows: True for one product with a matrix of rows, one for each point: nothing below counts then.
        product: as `Geometry.is_product`.
        thin: True if the factors' gradients come by way of the rank.
        adds: True if the forward pass adds a thin product, False if it folds.
        adds_back: the same of the backward pass.
    """

    margins: tuple[int, ...] | None
    mode: str
    geometry: Geometry
    sizes: tuple[int, ...]
    rows: bool
    product: bool
    thin: bool
    adds: bool
    adds_back: bool

    @classmethod
    def of(cls, module: Any, x: Tensor, pair: Pair) -> Route:
        """Choose the way for inputs that have shape, strides, dtype and device of this one."""
        margins, padding = _margins(module)
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padded = x if margins is None else F.pad(x, margins, mode=mode)
        geometry = Geometry(module.stride, padding, module.dilation, module.groups)
        sizes = geometry.sizes(padded, pair.weight)
        (out, rank), fan_in = pair.lora_B.shape, pair.lora_A.shape[1]
        positions = len(x) * math.prod(sizes)
        point = pair.weight.numel() == padded.shape[1] * out and not any(padding)  # without groups
        in_order = is_channels_last(padded) and x.device.type == "cpu" and max(geometry.stride) == 1
        thin = thin_is_cheaper(rank=rank, out=out, fan_in=fan_in, groups=geometry.groups, positions=positions)
        addable = thin and geometry.groups == 1 and pair.in_one_dtype(padded)
        is_small = SMALL * rank * positions <= padded.numel()
        return cls(
            margins,
            mode,
            geometry,
            sizes,
            rows=point and (in_order or padded.numel() == padded.shape[0] * padded.shape[1]),
            product=geometry.is_product(padded, pair.weight),
            thin=thin,
            adds=addable and is_small and not folding_is_cheaper(positions=positions, width=fan_in),
            adds_back=addable and not folding_is_cheaper(positions=positions, width=out),
        )

    def padded(self, x: Tensor) -> Tensor:
        """Return the input with its padding, as far as that comes first."""
        return x if self.margins is None else F.pad(x, self.margins, mode=self.mode)


def _margins(module: Any) -> tuple[tuple[int, ...] | None, tuple[int, ...]]:
    """Return the padding that must come before the convolution, and the padding that it does by itself."""
    none = (0,) * len(module.stride)
    margins = tuple(module._reversed_padding_repeated_twice)
    if module.padding_mode != "zeros":
        return margins, none
    if module.padding == "valid":
        return None, none
    if module.padding == "same":
        return (margins, none) if margins[::2] != margins[1::2] else (None, margins[::-2])
    return None, module.padding


MAX_ROUTES = 64
"""How many routes a layer caches."""


def route_for(module: Any, x: Tensor, pair: Pair, known: dict[Any, Route]) -> Route:
    """Return the way for inputs like ``x``, from the cache ``known`` or chosen now."""
    form = x.shape, x.stride(), x.dtype, x.device, pair.weight.dtype, pair.lora_A.dtype, pair.lora_B.dtype
    key = (*form, module.stride, module.padding, module.dilation, module.groups, module.padding_mode)
    route = known.get(key)
    if route is None:
        if len(known) >= MAX_ROUTES:
            known.clear()
        known[key] = route = Route.of(module, x, pair)
    return route

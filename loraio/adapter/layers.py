"""Layer types: which weights can be targets, and how a weight tensor becomes an (out, fan_in) matrix and back.

Stride, padding, dilation and padding mode never enter: an adapter changes the weight, the layer uses it as it always
did. A new layer type is one entry in `LAYER_TYPES`. Which layers can be heads, and which tensors belong to
normalisation, stands here too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def tensor_name(path: str, name: str) -> str:
    """Return the state-dict name of a module's own tensor; the path of the model itself is empty."""
    return f"{path}.{name}" if path else name


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerType:
    """A layer whose weight has its output dimension first: (out, ...).

    Attributes:
        name: the class name in ``torch.nn``, as written in files.
        group: the word that selects it and its relatives: "conv", "linear" or "embedding".
        dims: number of dimensions of the weight.
        parameters: names of its weights inside the module.
        grouped: whether it may have groups.
        slices: what a slice of the weight along its first dimension is in the matrix: "rows", "columns", or "neither".
    """

    name: str
    group: str
    dims: int
    parameters: tuple[str, ...] = ("weight",)
    grouped: bool = False
    slices: str = "rows"

    def matrix_shape(self, shape: Sequence[int], groups: int = 1) -> tuple[int, int]:
        """(out, fan_in) of a weight of this shape; fan_in is the product of all dimensions but the output one."""
        return shape[0], math.prod(shape[1:])

    def to_matrix(self, weight: Tensor, groups: int = 1) -> Tensor:
        """Return the weight as (out, fan_in), a view if the memory allows it."""
        return weight.reshape(self.matrix_shape(weight.shape))

    def from_matrix(self, matrix: Tensor, shape: Sequence[int], groups: int = 1) -> Tensor:
        """Invert `to_matrix`."""
        return matrix.reshape(tuple(shape))


@dataclass(frozen=True, slots=True, kw_only=True)
class TransposedConvolution(LayerType):
    """A layer whose weight is (in, out / groups, kernel...); the groups divide its first dimension."""

    slices: str = "neither"

    def matrix_shape(self, shape: Sequence[int], groups: int = 1) -> tuple[int, int]:
        """(out, in / groups * kernel)."""
        return shape[1] * groups, shape[0] // groups * math.prod(shape[2:])

    def to_matrix(self, weight: Tensor, groups: int = 1) -> Tensor:
        """Rows in the order of the output channels, group by group."""
        parts = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        return parts.transpose(1, 2).reshape(self.matrix_shape(weight.shape, groups))

    def from_matrix(self, matrix: Tensor, shape: Sequence[int], groups: int = 1) -> Tensor:
        """Invert `to_matrix`."""
        parts = matrix.reshape(groups, shape[1], shape[0] // groups, -1)
        return parts.transpose(1, 2).reshape(tuple(shape))


@dataclass(frozen=True, slots=True, kw_only=True)
class Table(LayerType):
    """A layer whose weight is (entries, features): a look-up table, which is a matrix transposed."""

    slices: str = "columns"

    def matrix_shape(self, shape: Sequence[int], groups: int = 1) -> tuple[int, int]:
        """(features, entries)."""
        return shape[1], shape[0]

    def to_matrix(self, weight: Tensor, groups: int = 1) -> Tensor:
        """Return the transpose, a view."""
        return weight.T

    def from_matrix(self, matrix: Tensor, shape: Sequence[int], groups: int = 1) -> Tensor:
        """Return the transpose."""
        return matrix.T


_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")

LAYER_TYPES: dict[str, LayerType] = {
    "Conv1d": LayerType(name="Conv1d", group="conv", dims=3, grouped=True),
    "Conv2d": LayerType(name="Conv2d", group="conv", dims=4, grouped=True),
    "Conv3d": LayerType(name="Conv3d", group="conv", dims=5, grouped=True),
    "ConvTranspose1d": TransposedConvolution(name="ConvTranspose1d", group="conv", dims=3, grouped=True),
    "ConvTranspose2d": TransposedConvolution(name="ConvTranspose2d", group="conv", dims=4, grouped=True),
    "ConvTranspose3d": TransposedConvolution(name="ConvTranspose3d", group="conv", dims=5, grouped=True),
    "Linear": LayerType(name="Linear", group="linear", dims=2),
    "Bilinear": LayerType(name="Bilinear", group="linear", dims=3),
    "MultiheadAttention": LayerType(name="MultiheadAttention", group="linear", dims=2, parameters=_ATTENTION),
    "Embedding": Table(name="Embedding", group="embedding", dims=2),
}


HEAD_LAYERS = {
    "Linear": "out_features",
    "Conv1d": "out_channels",
    "Conv2d": "out_channels",
    "Conv3d": "out_channels",
}
"""Layers that can be heads, by class name, and their attribute that holds the number of outputs."""

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Buffers in which normalisation layers keep running statistics."""

AFFINE = ("weight", "bias")
"""Parameters of normalisation layers."""

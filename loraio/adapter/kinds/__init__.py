"""Adapter kinds: which factors an adapter has for a weight matrix, and how they change it.

A kind works on matrices (out, fan_in); `loraio.adapter.layers` turns weights into matrices. A new kind is one file
here and
one line in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from loraio.adapter.kinds.dora import Dora
from loraio.adapter.kinds.lora import Lora

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Kind(Protocol):
    """What an adapter kind has to say about itself."""

    @property
    def name(self) -> str:
        """As written in files."""
        ...

    @property
    def columns_apart(self) -> bool:
        """Whether a column of the new matrix needs that column of the old one alone; of rows that is always so."""
        ...

    @property
    def writes_once(self) -> bool:
        """Whether `fold_` writes to the matrix by a single operation of torch's."""
        ...

    def shapes(self, out: int, fan_in: int, rank: int) -> dict[str, tuple[int, ...]]:
        """The factors' names and shapes, for a weight matrix (out, fan_in)."""
        ...

    def init(self, weight: Tensor, rank: int, *, method: str, generator: torch.Generator) -> dict[str, Tensor]:
        """Start values: on the CPU, drawn from ``generator``, such that `fold` gives the base weight."""
        ...

    def fold(self, weight: Tensor, factors: Mapping[str, Tensor], *, scale: float, strength: float = 1.0) -> Tensor:
        """The new weight matrix, differentiable, in the dtype that weight and factors share.

        Strength 0 is the base weight, strength 1 the adapter as trained.
        """
        ...

    def fold_(self, weight: Tensor, factors: Mapping[str, Tensor], *, scale: float, strength: float = 1.0) -> None:
        """`fold` in place: the weight matrix, any strides, becomes the new one. Without gradients."""
        ...

    def side_numbers(self, out: int) -> int:
        """How many numbers `side` gives for a weight matrix of so many rows."""
        ...

    def side(self, weight: Tensor, factors: Mapping[str, Tensor], *, scale: float) -> Tensor | None:
        """What `unfold` has to be told of the old weight matrix: `side_numbers` of float64, or None."""
        ...

    def unfold(
        self, folded: Tensor, factors: Mapping[str, Tensor], *, scale: float, strength: float, side: Tensor | None
    ) -> Tensor:
        """The old weight matrix again, nearly, from the one that `fold` gave; all in float64.

        Made of single IEEE operations in an order that is part of the format of residues: the same bits everywhere.
        """
        ...

    def stays_finite(
        self, peaks: Mapping[str, float], *, rank: int, scale: float, strength: float, room: float
    ) -> bool:
        """Whether `fold`, in float64, surely gives numbers that round to finite ones, for whatever finite weight.

        Args:
            peaks: the largest magnitude in each factor, or more.
            rank: of the factors.
            scale, strength: as `fold` takes them.
            room: what can be added to the largest number of the weight's dtype.
        """
        ...

    def reference(
        self,
        weight: Any,
        factors: Mapping[str, Any],
        *,
        scale: float,
        strength: float = 1.0,
        at: tuple[Any, Any] | None = None,
    ) -> tuple[Any, Any]:
        """The same matrix by another route, and a bound on the error of both; NumPy arrays in and out.

        The factors' dtype is that of the sums: float64, or float32 for a first look. With ``at``, rows and columns,
        only the elements there.

        Only verification calls it. It shares no code with `fold`, so that a mistake in one shows against the other.
        """
        ...


KINDS: dict[str, Kind] = {
    "dora": Dora(),
    "lora": Lora(),
}

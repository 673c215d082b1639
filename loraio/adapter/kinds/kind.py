"""The base class of adapter kinds, with safe defaults."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from loraio.errors import AdapterError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Kind(ABC):
    """The factors that an adapter has for a weight matrix (out, fan_in), and how they change it.

    A new kind sets `name` and writes `shapes`, `init` and `fold`. The other methods have defaults that are right for
    every kind. Overriding one makes folds faster, residues smaller, or lets ``loraio verify`` prove a merge.

    Attributes:
        name: as written in files.
        columns_apart: true if each column of the new matrix needs only the same column of the old one. Rows always
            need only their own row.
        writes_once: true if `fold_` writes to the matrix with a single torch operation.
    """

    name: ClassVar[str]
    columns_apart: ClassVar[bool] = False
    writes_once: ClassVar[bool] = False

    @abstractmethod
    def shapes(self, out: int, fan_in: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Return the factors' names and shapes for a weight matrix (out, fan_in)."""

    @abstractmethod
    def init(self, weight: Tensor, rank: int, *, method: str, generator: torch.Generator) -> dict[str, Tensor]:
        """Return start values with which `fold` gives the base weight: on the CPU, drawn from ``generator``."""

    @abstractmethod
    def fold(self, weight: Tensor, factors: Mapping[str, Tensor], *, scale: float, strength: float = 1.0) -> Tensor:
        """Return the new weight matrix, differentiable, in the dtype that weight and factors share.

        Strength 0 is the base weight, strength 1 the adapter as trained.
        """

    def fold_(self, weight: Tensor, factors: Mapping[str, Tensor], *, scale: float, strength: float = 1.0) -> None:
        """Fold in place, for a weight matrix with any strides. Without gradients."""
        weight.copy_(self.fold(weight, factors, scale=scale, strength=strength))

    def fold_in_order(
        self, weight: Tensor, factors: Mapping[str, Tensor], *, scale: float, strength: float = 1.0
    ) -> Tensor:
        """Fold with the same bits on every machine: element-wise operations, each rounded alone, in one order.

        Float64 weights are folded by it. The default suits a `fold` without matrix products and without sums over
        rows or columns: libraries add in an order of their own, which depends on the processor and on threads.
        """
        return self.fold(weight, factors, scale=scale, strength=strength)

    def side_numbers(self, out: int) -> int:
        """Return how many numbers `side` gives for a weight matrix with ``out`` rows."""
        return 0

    def side(self, weight: Tensor, factors: Mapping[str, Tensor], *, scale: float) -> Tensor | None:
        """Return facts about the old matrix that `unfold` needs: `side_numbers` numbers of float64, or None."""
        return None

    def unfold(
        self, folded: Tensor, factors: Mapping[str, Tensor], *, scale: float, strength: float, side: Tensor | None
    ) -> Tensor:
        """Guess the old weight matrix from the one that `fold` gave; all in float64.

        A residue stores how the guess differs from the old matrix, so that a better guess makes a smaller file. The
        order of its operations belongs to the format of residues: it must give the same bits everywhere. By default
        the guess is the folded matrix itself.
        """
        return folded

    def stays_finite(
        self, peaks: Mapping[str, float], *, rank: int, scale: float, strength: float, room: float
    ) -> bool:
        """Return True only if `fold` cannot overflow, whatever the finite weight.

        Args:
            peaks: the largest magnitude in each factor, or more.
            rank: of the factors.
            scale, strength: as `fold` takes them.
            room: what can be added to the largest number of the weight's dtype without overflow.
        """
        return False

    def reference(
        self,
        weight: Any,
        factors: Mapping[str, Any],
        *,
        scale: float,
        strength: float = 1.0,
        at: tuple[Any, Any] | None = None,
    ) -> tuple[Any, Any]:
        """Compute the new matrix another way, with a bound on the error of both ways; NumPy arrays in and out.

        Only verification calls it. It shares no code with `fold`, so that a mistake in one shows against the other.

        Args:
            weight: (out, fan_in).
            factors: by short name. Their dtype is that of the sums: float64, or float32 for a first look.
            scale, strength: as `fold` takes them.
            at: rows and columns, to get only the elements there.

        Raises:
            AdapterError: the kind has no other way.
        """
        raise AdapterError(f"merges of the adapter kind {self.name!r} cannot be verified: it has no reference")

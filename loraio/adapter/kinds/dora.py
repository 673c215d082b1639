"""DoRA: a low-rank change of a weight matrix, with the lengths of its rows learned separately."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loraio.adapter.kinds.kind import Kind
from loraio.adapter.kinds.lora import Lora, product_in_order

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Dora(Kind):
    """``m * V / |V|`` row by row, with ``V = W + scale * (B @ A)``; ``magnitude`` m is (out,).

    The lengths are stored in float64, and |V| is computed in float64 for use. With B at zero the quotient m / |V| is
    1 up to 1e-16, so that an untrained adapter gives the base weight's own values. Gradients go through |V| too.

    Strength interpolates between the base and the adapted weight: ``W + strength * (W' - W)``.

    Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv:2402.09353, section 4.1.
    """

    name = "dora"
    _lora = Lora()

    def shapes(self, out: int, fan_in: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Return the factors' names and shapes.

        >>> Dora().shapes(64, 288, 4)
        {'lora_A': (4, 288), 'lora_B': (64, 4), 'magnitude': (64,)}
        """
        return {**self._lora.shapes(out, fan_in, rank), "magnitude": (out,)}

    def init(self, weight: Tensor, rank: int, *, method: str, generator: torch.Generator) -> dict[str, Tensor]:
        """Start A and B as LoRA does, and the magnitudes at the lengths of the weight's rows.

        Args:
            weight: (out, fan_in), any float dtype and device.
            rank: r, at least 1.
            method: a name in `loraio.adapter.kinds.lora.INITS`.
            generator: on the CPU.

        Returns:
            on the CPU; A and B float32, magnitude float64.

        Raises:
            UnknownNameError: no such method.
        """
        factors = self._lora.init(weight, rank, method=method, generator=generator)
        return {**factors, "magnitude": squares_in_order(weight.detach().cpu().double())[:, 0].sqrt()}

    def fold(self, weight: Tensor, factors: Mapping[str, Tensor], *, scale: float, strength: float = 1.0) -> Tensor:
        """Return the new matrix; weight and factors in one dtype, on one device. A row of zeros stays zero.

        >>> import torch
        >>> W, A, B = torch.ones(2, 4), torch.zeros(1, 4), torch.zeros(2, 1)
        >>> Dora().fold(W, {"lora_A": A, "lora_B": B, "magnitude": torch.tensor([2.0, 4.0])}, scale=1.0)[:, 0]
        tensor([1., 2.])
        """
        import torch

        direction = self._lora.fold(weight, factors, scale=scale)
        in_order = weight.dtype == torch.float64  # as `fold_in_order`, so that an untrained adapter changes no bit
        divisors = _positive(squares_in_order(direction)).sqrt() if in_order else _lengths(direction)
        return _rescaled(weight, direction, divisors, factors["magnitude"], strength)

    def fold_(self, weight: Tensor, factors: Mapping[str, Tensor], *, scale: float, strength: float = 1.0) -> None:
        """Fold in place."""
        if strength != 1:  # needs the old weight to the end
            direction = self._lora.fold(weight, factors, scale=scale)
            weight.copy_(_rescaled(weight, direction, _lengths(direction), factors["magnitude"], strength))
            return
        self._lora.fold_(weight, factors, scale=scale)
        weight.mul_(factors["magnitude"][:, None] / _lengths(weight))

    def fold_in_order(
        self, weight: Tensor, factors: Mapping[str, Tensor], *, scale: float, strength: float = 1.0
    ) -> Tensor:
        """Fold with the sums of the product and of the squares in a fixed order."""
        direction = self._lora.fold_in_order(weight, factors, scale=scale)
        divisors = _positive(squares_in_order(direction)).sqrt()
        return _rescaled(weight, direction, divisors, factors["magnitude"], strength)

    def side_numbers(self, out: int) -> int:
        """Return one number for each row."""
        return out

    def side(self, weight: Tensor, factors: Mapping[str, Tensor], *, scale: float) -> Tensor | None:
        """Return the lengths |V|, which the new matrix does not show."""
        lengths: Tensor = self._lora.fold(weight, factors, scale=scale).norm(dim=1)
        return lengths

    def unfold(
        self, folded: Tensor, factors: Mapping[str, Tensor], *, scale: float, strength: float, side: Tensor | None
    ) -> Tensor:
        """Return ``(W' - (t * q) * D) / ((1 - t) + t * q)`` for strength t, q = m / |V|, D = scale * (B @ A)."""
        assert side is not None
        moved = strength * (factors["magnitude"] / side.masked_fill(side == 0, 1))
        update = product_in_order(factors).mul_(scale).mul_(moved[:, None])
        return (folded - update).div_(((1 - strength) + moved)[:, None])

    def stays_finite(
        self, peaks: Mapping[str, float], *, rank: int, scale: float, strength: float, room: float
    ) -> bool:
        """Bound each entry by the length of its row. Interpolation adds nothing to it."""
        changes = self._lora.stays_finite(peaks, rank=rank, scale=scale, strength=1.0, room=room)
        return changes and 0 <= strength <= 1 and peaks["magnitude"] < min(room, 1e140)  # it is divided by a length

    def reference(
        self,
        weight: Any,
        factors: Mapping[str, Any],
        *,
        scale: float,
        strength: float = 1.0,
        at: tuple[Any, Any] | None = None,
    ) -> tuple[Any, Any]:
        """Compute in NumPy another way, and bound the rounding error of both ways.

        An error in V moves a row directly, and again through the row's length. The sum of fan_in squares adds
        (fan_in + 10) roundings (Higham 2002, section 3.1).
        """
        import numpy as np

        eps = np.finfo(factors["lora_A"].dtype).eps
        direction, error = self._lora.reference(weight, factors, scale=scale)
        length = np.sqrt(np.square(direction).sum(axis=1, keepdims=True))
        safe = np.where(length == 0, 1.0, length)
        quotient = factors["magnitude"][:, None] / safe
        folded = direction * quotient
        relative = (weight.shape[1] + 10) * eps + np.linalg.norm(error, axis=1, keepdims=True) / safe
        error = np.abs(quotient) * error + np.abs(folded) * relative
        result = weight + strength * (folded - weight)
        most = max(1.0, abs(strength))
        error = abs(strength) * error + 4 * eps * (most * np.abs(weight) + abs(strength) * np.abs(folded))
        return (result, error) if at is None else (result[at], error[at])


def _rescaled(weight: Tensor, direction: Tensor, divisors: Tensor, magnitude: Tensor, strength: float) -> Tensor:
    folded = direction * (magnitude[:, None] / divisors)
    return folded if strength == 1 else weight + strength * (folded - weight)


def _lengths(matrix: Tensor) -> Tensor:
    """Return the lengths of a matrix's rows, (out, 1), to divide by."""
    return _positive(matrix.norm(dim=1, keepdim=True))


def _positive(divisors: Tensor) -> Tensor:
    return divisors.masked_fill(divisors == 0, 1)


def squares_in_order(matrix: Tensor) -> Tensor:
    """Return the sum of squares of each row, (out, 1), with the same bits on every machine.

    The squares are added in halves: the first half of the columns to the second, and so on until one is left.
    """
    squares = matrix * matrix
    while (columns := squares.shape[1]) > 1:
        half = columns // 2
        halves = squares[:, :half] + squares[:, half : 2 * half]
        if columns % 2:
            halves[:, :1] += squares[:, -1:]
        squares = halves
    return squares

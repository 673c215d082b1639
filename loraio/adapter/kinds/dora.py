"""DoRA: a low-rank change of a weight matrix's rows, whose lengths are learned apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loraio.adapter.kinds.lora import Lora, product_in_order

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Dora:
    """``m * V / |V|`` row by row, with ``V = W + scale * (B @ A)``; ``magnitude`` m is (out,).

    The lengths are kept in float64, and |V| is computed in float64 for use: with B at zero the quotient m / |V| is 1
    up to 1e-16, so that an untrained adapter gives the base weight's own float32 values. Gradients go through |V| too.

    Strength moves between the base and the adapted weight in a straight line: ``W + strength * (W' - W)``.

    Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv:2402.09353, section 4.1.
    """

    name = "dora"
    columns_apart = False  # a row's length is that of all its columns
    writes_once = False
    _lora = Lora()

    def shapes(self, out: int, fan_in: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Factor names and shapes.

        >>> Dora().shapes(64, 288, 4)
        {'lora_A': (4, 288), 'lora_B': (64, 4), 'magnitude': (64,)}
        """
        return {**self._lora.shapes(out, fan_in, rank), "magnitude": (out,)}

    def init(self, weight: Tensor, rank: int, *, method: str, generator: torch.Generator) -> dict[str, Tensor]:
        """A and B as LoRA's, and the lengths of the weight's rows as they are.

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
        return {**factors, "magnitude": weight.detach().cpu().double().norm(dim=1)}

    def fold(self, weight: Tensor, factors: Mapping[str, Tensor], *, scale: float, strength: float = 1.0) -> Tensor:
        """The new matrix; weight and factors in one dtype, on one device. A row of zeros stays zero.

        >>> import torch
        >>> W, A, B = torch.ones(2, 4), torch.zeros(1, 4), torch.zeros(2, 1)
        >>> Dora().fold(W, {"lora_A": A, "lora_B": B, "magnitude": torch.tensor([2.0, 4.0])}, scale=1.0)[:, 0]
        tensor([1., 2.])
        """
        direction = self._lora.fold(weight, factors, scale=scale)
        length: Tensor = direction.norm(dim=1, keepdim=True)
        folded = direction * (factors["magnitude"][:, None] / length.masked_fill(length == 0, 1))
        return folded if strength == 1 else weight + strength * (folded - weight)

    def fold_(self, weight: Tensor, factors: Mapping[str, Tensor], *, scale: float, strength: float = 1.0) -> None:
        """The same in place."""
        if strength != 1:  # needs the old weight to the end
            weight.copy_(self.fold(weight, factors, scale=scale, strength=strength))
            return
        self._lora.fold_(weight, factors, scale=scale)
        length = weight.norm(dim=1, keepdim=True)
        weight.mul_(factors["magnitude"][:, None] / length.masked_fill_(length == 0, 1))

    def side_numbers(self, out: int) -> int:
        """One for each row."""
        return out

    def side(self, weight: Tensor, factors: Mapping[str, Tensor], *, scale: float) -> Tensor | None:
        """The lengths |V|, which cannot be told from the new matrix."""
        lengths: Tensor = self._lora.fold(weight, factors, scale=scale).norm(dim=1)
        return lengths

    def unfold(
        self, folded: Tensor, factors: Mapping[str, Tensor], *, scale: float, strength: float, side: Tensor | None
    ) -> Tensor:
        """``(W' - (t * q) * D) / ((1 - t) + t * q)``, with t the strength, q = m / |V| and D = scale * (B @ A)."""
        assert side is not None
        moved = strength * (factors["magnitude"] / side.masked_fill(side == 0, 1))
        update = product_in_order(factors).mul_(scale).mul_(moved[:, None])
        return (folded - update).div_(((1 - strength) + moved)[:, None])

    def stays_finite(
        self, peaks: Mapping[str, float], *, rank: int, scale: float, strength: float, room: float
    ) -> bool:
        """No entry is larger than its row is long; between base and adapted weight are no larger ones than they are."""
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
        """The same in NumPy by another route, and a bound on the rounding error of both.

        An error in V moves a row by itself and by what it does to the row's length; the length's own sum of fan_in
        squares adds (fan_in + 10) roundings (Higham 2002, section 3.1).
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

"""LoRA: a weight matrix plus the product of two thin ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loraio.adapter.kinds.kind import Kind
from loraio.registry import lookup

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Lora(Kind):
    """``W + scale * (B @ A)``, with ``lora_A`` (r, fan_in) and ``lora_B`` (out, r).

    Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685, section 4.1.
    """

    name = "lora"
    columns_apart = True
    writes_once = True

    def shapes(self, out: int, fan_in: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Return the factors' names and shapes.

        >>> Lora().shapes(64, 288, 4)
        {'lora_A': (4, 288), 'lora_B': (64, 4)}
        """
        return {"lora_A": (rank, fan_in), "lora_B": (out, rank)}

    def init(self, weight: Tensor, rank: int, *, method: str, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw A from a seeded distribution and set B to zero, so that the network starts at its base.

        Args:
            weight: (out, fan_in); only its shape counts.
            rank: r, at least 1.
            method: a name in `INITS`.
            generator: on the CPU.

        Returns:
            float32 on the CPU.

        Raises:
            UnknownNameError: no such method.
        """
        import torch

        out, fan_in = weight.shape
        draw = lookup(INITS, method, what="initialisation")
        lora_A = draw(torch.empty(rank, fan_in, dtype=torch.float32), generator)
        return {"lora_A": lora_A, "lora_B": torch.zeros(out, rank, dtype=torch.float32)}

    def fold(self, weight: Tensor, factors: Mapping[str, Tensor], *, scale: float, strength: float = 1.0) -> Tensor:
        """Return ``W + strength * scale * (B @ A)``; weight and factors in one dtype, on one device.

        >>> import torch
        >>> W, A, B = torch.zeros(4, 9), torch.ones(2, 9), torch.ones(4, 2)
        >>> Lora().fold(W, {"lora_A": A, "lora_B": B}, scale=0.5).unique().item()
        1.0
        """
        return weight.addmm(factors["lora_B"], factors["lora_A"], alpha=scale * strength)

    def fold_(self, weight: Tensor, factors: Mapping[str, Tensor], *, scale: float, strength: float = 1.0) -> None:
        """Fold in place, in one pass."""
        weight.addmm_(factors["lora_B"], factors["lora_A"], alpha=scale * strength)

    def fold_in_order(
        self, weight: Tensor, factors: Mapping[str, Tensor], *, scale: float, strength: float = 1.0
    ) -> Tensor:
        """Add the terms of the product from the first rank to the last, then their sum to the weight."""
        return product_in_order(factors).mul_(strength * scale).add_(weight)

    def unfold(
        self, folded: Tensor, factors: Mapping[str, Tensor], *, scale: float, strength: float, side: Tensor | None
    ) -> Tensor:
        """Return ``W' - (strength * scale) * (B @ A)``, its terms added from the first rank to the last."""
        return folded - product_in_order(factors).mul_(strength * scale)

    def stays_finite(
        self, peaks: Mapping[str, float], *, rank: int, scale: float, strength: float, room: float
    ) -> bool:
        """Bound the change of an entry by ``|strength * scale| * r * max|B| * max|A|``."""
        product = rank * peaks["lora_A"] * peaks["lora_B"]
        return math.isfinite(product) and abs(strength * scale) * product < room

    def reference(
        self,
        weight: Any,
        factors: Mapping[str, Any],
        *,
        scale: float,
        strength: float = 1.0,
        at: tuple[Any, Any] | None = None,
    ) -> tuple[Any, Any]:
        """Sum in NumPy, and bound the rounding error of each element.

        The bound holds for any order of the r + 1 additions: (r + 3) roundings of the sum of the magnitudes, once
        for this sum and once for the fold (Higham 2002, Accuracy and Stability of Numerical Algorithms, section 3.1).
        """
        import numpy as np

        A, B = (scale * strength) * factors["lora_A"], factors["lora_B"]
        if at is None and A.dtype == np.float32:  # cheaper, and larger: Cauchy-Schwarz
            update, magnitude = B @ A, np.linalg.norm(B, axis=1)[:, None] * np.linalg.norm(A, axis=0)
        elif at is None:
            update, magnitude = B @ A, np.abs(B) @ np.abs(A)
        else:
            rows, columns = at
            terms = B[rows] * A.T[columns]
            weight, update, magnitude = weight[at], terms.sum(axis=1), np.abs(terms).sum(axis=1)
        magnitude += np.abs(weight)
        magnitude *= (len(A) + 3) * np.finfo(A.dtype).eps  # eps is two roundings
        update += weight
        return update, magnitude


def product_in_order(factors: Mapping[str, Tensor]) -> Tensor:
    """Return B @ A summed from the first rank to the last, with the same bits on every machine.

    Each product and each addition is an operation of its own: a fused one rounds once, but not on every processor.
    """
    import torch

    A, B = factors["lora_A"], factors["lora_B"]
    total = B[:, :1] * A[:1]
    term = torch.empty_like(total)
    for rank in range(1, len(A)):
        total += torch.mul(B[:, rank : rank + 1], A[rank : rank + 1], out=term)
    return total


def _kaiming(lora_A: Tensor, generator: torch.Generator) -> Tensor:
    """Draw uniformly from +-1/sqrt(fan_in): He initialisation with a = sqrt(5), as torch's own layers start."""
    bound = lora_A.shape[1] ** -0.5
    return lora_A.uniform_(-bound, bound, generator=generator)


def _gaussian(lora_A: Tensor, generator: torch.Generator) -> Tensor:
    """Draw from a standard normal distribution. Steps are large, since the gradient of B grows with A."""
    return lora_A.normal_(generator=generator)


INITS = {"kaiming": _kaiming, "gaussian": _gaussian}
"""Start distributions of lora_A, by the name that ``--init`` takes."""

"""Fold an adapter into slices of weights, and collect the evidence that it was done right."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loraio.adapter.adapter import Adapter
from loraio.merging.weight_check import FoldCheck, check_fold


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """Evidence for a folded weight; the sum of two is the evidence for both slices.

    Attributes:
        check: comparison with the reference.
        length: squared Euclidean length of the base weight.
        moved: squared Euclidean length of the change.
    """

    check: FoldCheck = field(default_factory=FoldCheck)
    length: float = 0.0
    moved: float = 0.0

    @classmethod
    def of(cls, check: FoldCheck, base: Tensor, found: Tensor) -> Fold:
        """Measure a slice of the weight, before and after."""
        wide = torch.promote_types(base.dtype, torch.float32)
        plain = base.to(wide).flatten()
        moved = found.to(wide).flatten() - plain
        if base.dtype == torch.float32:
            plain, moved = plain.double(), moved.double()
        change = float(moved.dot(moved))
        if not change and not found.equal(base):  # the squares underflow
            change = sys.float_info.min
        return cls(check=check, length=float(plain.dot(plain)), moved=change)

    def __add__(self, other: Fold) -> Fold:
        return Fold(check=self.check + other.check, length=self.length + other.length, moved=self.moved + other.moved)

    @property
    def change(self) -> float:
        """Length of the change relative to that of the weight; infinite where a weight of zeros changes."""
        if not self.moved:
            return 0.0
        return math.sqrt(self.moved / self.length) if self.length else math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Folding:
    """Folds an adapter in, and compares what was written with the reference.

    ``keep`` is called with every slice before and after the fold.
    """

    adapter: Adapter
    strength: float
    exact: bool
    keep: Callable[[str, Adapter, Tensor, Tensor], None] | None = None

    def make(self, name: str, part: Adapter, weight: Tensor) -> Tensor:
        return part.fold(name, weight, strength=self.strength, exact=self.exact)

    def look(self, name: str, part: Adapter, weight: Tensor, found: Tensor, so_far: Fold) -> Fold:
        check = check_fold(part, weight, found, self.strength, exact=self.exact, told=so_far.check.max_ulp)
        if self.keep is not None:
            self.keep(name, part, weight, found)
        return Fold.of(check, weight, found)

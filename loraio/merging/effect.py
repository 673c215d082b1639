"""Fold an adapter into weights slice by slice, and measure what that does to them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from loraio.adapter.adapter import Adapter
from loraio.merging.weight_check import FoldCheck, check_fold, same_bits


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeEffect:
    """How much an adapter changes a base model's weights.

    Attributes:
        targets: number of weights that the adapter changes.
        parameters: number of values that its factors hold.
        replaced: number of whole tensors that differ from the base's.
        smallest, median, largest: relative change of a weight over all targets: the Euclidean length of the change
            divided by that of the weight. Infinite where a weight of zeros changes.
    """

    targets: int
    parameters: int
    replaced: int
    smallest: float
    median: float
    largest: float

    @classmethod
    def of(cls, adapter: Adapter, changes: Sequence[float], *, replaced: int) -> MergeEffect:
        """Summarise the relative changes of all targets."""
        return cls(
            targets=len(changes),
            parameters=adapter.parameters,
            replaced=replaced,
            smallest=min(changes),
            median=median(changes),
            largest=max(changes),
        )

    @property
    def is_noop(self) -> bool:
        """True if nothing changes, because the adapter learned nothing or the strength is 0."""
        return self.largest == 0 and not self.replaced

    def __str__(self) -> str:
        if self.is_noop:
            return f"changes none of {self.targets} weights: a no-op"
        change = f"{self.smallest:.2g} / {self.median:.2g} / {self.largest:.2g}"
        whole = f"; {self.replaced} tensors replaced whole" if self.replaced else ""
        return f"changes {self.targets} weights ({self.parameters:,} parameters) by a relative {change}{whole}"


def merge_effect(state_dict: Mapping[str, Tensor], merged: Mapping[str, Tensor], adapter: Adapter) -> MergeEffect:
    """Measure how much a merge changed the weights.

    Args:
        state_dict: the base model's.
        merged: what `loraio.merge` made of it.
        adapter: the adapter that was merged.
    """
    changes = []
    for name in adapter.targets:
        base = state_dict[name].double()
        length, moved = float(base.norm()), float((merged[name].double() - base).norm())
        changes.append(moved / length if length else math.inf if moved else 0.0)
    replaced = sum(not same_bits(state_dict[name], merged[name]) for name in adapter.whole)
    return MergeEffect.of(adapter, changes, replaced=replaced)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """Evidence for a folded weight; the sum of two is the evidence for both slices.

    ``length`` and ``moved`` are the squared Euclidean lengths of the base weight and of the change.
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

"""Measure what an adapter does to a base model's weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from torch import Tensor

from loraio.adapter.adapter import Adapter
from loraio.merging.weight_check import same_bits


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

"""Let compiled graphs take adapted weights as inputs: a swap compiles nothing anew, and no graph uses a stale weight.

A graph that folds a weight is made for the rank and the scale of its adapter. A graph that reads the weight from a slot
is made for its shape alone: each forward pass takes the tensor that lies there then. A change puts another tensor there
and never writes to the one before, which a pass in another thread may be reading.

Writes past the handle, for example to a base weight, are noticed by an operator in front of each use. It compares
version counters, as an eager forward pass does, and takes microseconds. It is declared to write to the tensor, so that
no compiler moves it behind the use or reuses the memory; it writes only to a stale one.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from loraio.live.rollback import Rollback
from loraio.live.weight_cache import CachedWeight


class Slot:
    """The place from which compiled graphs read one adapted weight.

    Attributes:
        place: the `loraio.live.places.Place` of the weight.
        tensor: the adapted weight, of the base weight's shape, dtype, device and strides.
        part: the part that made it.
        cached: what tells if it is current; None where that cannot be told.
        token: a number by which a graph knows the slot.
    """

    place: Any
    part: Any = None
    tensor: Tensor
    cached: CachedWeight | None

    def __init__(self) -> None:
        _define_operator()
        self.token = next(_TOKENS)
        _SLOTS[self.token] = self

    def put(self, cached: CachedWeight | None, rollback: Rollback) -> None:
        """Put another adapted weight in the place of the one before."""
        if cached is not None and cached.folded is not cached.weight:
            tensor = cached.folded
        else:
            with torch.no_grad():
                tensor = self.place.part(self.place.base).detach().clone()
        for name, value in (("part", self.place.part), ("tensor", tensor), ("cached", cached)):
            rollback.set(vars(self), name, value)

    def fits(self, base: Tensor) -> bool:
        """Return True if the tensor here has the base weight's form: someone can have assigned another base weight."""
        mine = self.tensor
        return (
            mine.dtype == base.dtype
            and mine.device == base.device
            and mine.shape == base.shape
            and mine.stride() == base.stride()
        )

    def read(self) -> Tensor:
        """Return the weight as it is when the graph runs; traced."""
        tensor = self.tensor
        torch.ops.loraio.refresh.default(tensor, self.token)
        return tensor

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow the base weight to another device or dtype; the next use computes the weight anew."""
        self.tensor, self.cached = fn(self.tensor), None

    def refresh(self, tensor: Tensor) -> None:
        """Bring a tensor that was read from here up to date, if anything was written to since."""
        if self.cached is None or not self.cached.is_current():
            self.put(self.place.snapshots.current.adapted(self.place), Rollback())
            tensor.copy_(self.tensor)

    def __deepcopy__(self, memo: dict[int, Any]) -> Slot:
        twin = Slot.__new__(Slot)
        memo[id(self)] = twin
        twin.token = next(_TOKENS)
        twin.tensor, twin.cached = self.tensor.clone(), None
        twin.place = copy.deepcopy(self.place, memo)
        _SLOTS[twin.token] = twin
        return twin


_TOKENS = itertools.count(1)
_SLOTS: weakref.WeakValueDictionary[int, Slot] = weakref.WeakValueDictionary()
_LIBRARY: list[torch.library.Library] = []


def _define_operator() -> None:
    if _LIBRARY:
        return
    library = torch.library.Library("loraio", "DEF")
    tags = [torch.Tag.pt2_compliant_tag]
    if hasattr(torch.Tag, "cudagraph_unsafe"):  # a graph that is replayed would compare nothing
        tags.append(torch.Tag.cudagraph_unsafe)
    library.define("refresh(Tensor(a!) weight, int slot) -> ()", tags=tags)
    library.impl("refresh", _refresh, "CompositeExplicitAutograd")
    torch.library.register_fake("loraio::refresh", lambda weight, slot: None, lib=library)
    _LIBRARY.append(library)


def _refresh(weight: Tensor, slot: int) -> None:
    _SLOTS[slot].refresh(weight)

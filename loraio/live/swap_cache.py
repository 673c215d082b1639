"""What an attachment remembers of adapters that it had on the model before: that they fit, and what they computed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from operator import attrgetter, getitem, is_
from typing import Any, NamedTuple

from loraio.adapter import Adapter
from loraio.live.parametrization import FoldedWeight

KEPT_BYTES = 256 * 2**20
"""What an `Attachment` may hold of adapters that it had before, so that swapping back to one computes nothing."""


class Recent:
    """The parts of adapters that were on the model lately, with the weights that they computed, up to `KEPT_BYTES`."""

    def __init__(self) -> None:
        self._entries: OrderedDict[int, _Entry] = OrderedDict()

    def parts(self, adapter: Adapter) -> Mapping[str, FoldedWeight]:
        """Those of this very adapter, by target; empty where there are none, or somebody wrote to any factors."""
        entry = self._entries.get(id(adapter))
        if entry is None:
            return {}
        if not entry.factors.same():
            del self._entries[id(adapter)]
            return {}
        self._entries.move_to_end(id(adapter))
        return entry.parts

    def strength_of(self, adapter: Adapter) -> float | None:
        """At which strength this very adapter was last, and so overflows no weight; None where it is not known."""
        return self._entries[id(adapter)].strength if self.parts(adapter) else None

    def add(self, adapter: Adapter, parts: dict[str, FoldedWeight], size: int, *, strength: float) -> None:
        """Keep them.

        Args:
            adapter: the adapter.
            parts: of all its targets.
            size: bytes of the weights that they compute.
            strength: at which they overflow none.
        """
        factors = _Factors(adapter.factors, *(part._buffers for part in parts.values()))
        self._entries[id(adapter)] = _Entry(adapter, parts, factors, size + factors.nbytes, strength)
        while self._entries and sum(entry.size for entry in self._entries.values()) > KEPT_BYTES:
            self._entries.popitem(last=False)

    def forget(self) -> None:
        """Keep nothing."""
        self._entries.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Recent:
        return Recent()  # a copy of the model has parts of its own


class _Factors:
    """The tensors in some dicts as they are now. Looking again is a few calls: a network has two hundred of them."""

    def __init__(self, *held: Mapping[str, Any]) -> None:
        self._dicts = [each for each in held for _ in each]
        self._names = [name for each in held for name in each]
        self._tensors = [tensor for each in held for tensor in each.values()]
        self._counted = [tensor for tensor in self._tensors if not tensor.is_inference()]  # others are never trained
        self._writes = list(map(_WRITES, self._counted))

    @property
    def nbytes(self) -> int:
        """Of all of them."""
        return sum(tensor.nbytes for tensor in self._tensors)

    def same(self) -> bool:
        """Whether they are the same tensors, and nobody wrote to them."""
        try:
            there = all(map(is_, map(getitem, self._dicts, self._names), self._tensors))
        except KeyError:  # somebody has taken one off
            return False
        return there and list(map(_WRITES, self._counted)) == self._writes


_WRITES = attrgetter("_version")


class _Entry(NamedTuple):
    """An adapter, its parts, the factors of both, the bytes, the strength."""

    adapter: Adapter
    parts: dict[str, FoldedWeight]
    factors: _Factors
    size: int
    strength: float

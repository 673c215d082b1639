"""Cache the snapshots of adapters that were on a model lately: swapping back to one computes nothing."""

from __future__ import annotations

from operator import attrgetter, getitem, is_
from typing import Any

from loraio.adapter import Adapter
from loraio.bases.byte_cache import ByteCache
from loraio.live.snapshots import Snapshot

CACHED_BYTES = 256 * 2**20
"""How many bytes of factors and adapted weights an `Attachment` may cache."""


class SwapCache:
    """Snapshots by their adapter, on or off, and strength. Changes use it, which wait for each other."""

    def __init__(self) -> None:
        self._cache: ByteCache[tuple[Snapshot, _Tensors]] = ByteCache(CACHED_BYTES)

    def get(self, before: Snapshot, adapter: Adapter, *, enabled: bool, strength: float) -> Snapshot | None:
        """Return the snapshot of this very adapter, if nobody wrote to its factors; it can have fewer places."""
        found = self._cache.get((id(adapter), enabled, strength))
        if found is None or not found[1].are_unchanged():
            return None
        places, present = found[0].places, before.places
        return found[0] if places == present or places.items() <= present.items() else None

    def put(self, snapshot: Snapshot) -> None:
        adapter, tensors = snapshot.adapter, _Tensors(snapshot)
        folded = adapter.targets if snapshot.enabled else ()
        size = tensors.nbytes + sum(snapshot.places[name].base.nbytes for name in folded)
        self._cache.put((id(adapter), snapshot.enabled, snapshot.strength), (snapshot, tensors), size)

    def clear(self) -> None:
        self._cache.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> SwapCache:
        return SwapCache()  # a copy of the model has snapshots of its own


class _Tensors:
    """The tensors of an adapter and of its parts. Each loop is one call: a network has two hundred of them."""

    def __init__(self, snapshot: Snapshot) -> None:
        held: list[Any] = [snapshot.adapter.factors, snapshot.adapter.tensors]
        for part in snapshot.parts.values():
            held += (part._parameters, part._buffers)
        self._dicts = [each for each in held for _ in each]
        self._names = [name for each in held for name in each]
        self._tensors = [tensor for each in held for tensor in each.values()]
        self._counted = [tensor for tensor in self._tensors if not tensor.is_inference()]  # nobody trains the others
        self._versions = list(map(_VERSION, self._counted))
        self._devices = [place.base.device for place in snapshot.places.values()]
        self._places = list(snapshot.places.values())
        self.nbytes = sum(tensor.nbytes for tensor in self._tensors)

    def are_unchanged(self) -> bool:
        """Return True if they are the same tensors, nobody wrote to them, and the model is on the same devices."""
        try:
            there = all(map(is_, map(getitem, self._dicts, self._names), self._tensors))
        except KeyError:  # someone has taken one off
            return False
        return (
            there
            and list(map(_VERSION, self._counted)) == self._versions
            and [place.base.device for place in self._places] == self._devices
        )


_VERSION = attrgetter("_version")

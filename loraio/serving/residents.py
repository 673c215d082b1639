"""Adapters and folded weights that a bank holds in memory, bounded in bytes."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraio.adapter.adapter import Adapter
from loraio.bases.byte_cache import ByteCache
from loraio.serving.sources import Entry, Stamp

Version = tuple[Entry, Stamp]
"""The place of an adapter and the stamp of its file: equal as long as the adapter is the same."""


@dataclass(frozen=True, slots=True)
class Pick:
    """An adapter that some samples of a batch asked for."""

    name: str
    strength: float
    version: Version
    adapter: Adapter


class FoldedWeights:
    """Weights with one adapter folded in, for use in place of a model's Parameters.

    Attributes:
        weights: by state-dict name; empty for the base.
        reordered: the same weights in the order that oneDNN wants, by name and settings of the convolution; the layer
            route adds them.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights
        self.reordered: dict[tuple[str, tuple[Any, ...]], Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = [*self.weights.values(), *self.reordered.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Residents:
    """A thread-safe cache of adapters, and of folded weights by model and adapter, of at most ``limit`` bytes."""

    def __init__(self, limit: int) -> None:
        self.cache: ByteCache[tuple[Any, Any]] = ByteCache(limit)
        self._lock = threading.Lock()

    def adapter(self, name: str, entry: Entry) -> tuple[Version, Adapter]:
        """Return an adapter and its version; read it only if it is not cached or its file was changed."""
        key, version = ("adapter", name), (entry, entry.stamp())
        cached = self._get(key, version)
        if cached is not None:
            return version, cached
        stamp, adapter = entry.load()
        self._put(key, (entry, stamp), adapter, sum(tensor.nbytes for tensor in adapter.all_tensors.values()))
        return (entry, stamp), adapter

    def folded(
        self, owner: object, bases: Mapping[str, Tensor], pick: Pick | None, base_version: object
    ) -> FoldedWeights:
        """Return a model's weights with an adapter folded in; fold only if they are not cached or out of date.

        Args:
            owner: stands for the model; `drop` forgets what is cached under it.
            bases: the base weights of at least the adapter's targets, by name.
            pick: the adapter; None for the base, which has no folded weights.
            base_version: equal as long as the base weights are the same.
        """
        cached: FoldedWeights | None = self._get(_key(owner, pick), (pick and pick.version, base_version))
        if cached is not None:
            return cached
        folded = FoldedWeights({} if pick is None else _fold(pick, bases))
        self.update(owner, pick, base_version, folded)
        return folded

    def update(self, owner: object, pick: Pick | None, base_version: object, folded: FoldedWeights) -> None:
        """Cache folded weights with the size that they have now."""
        self._put(_key(owner, pick), (pick and pick.version, base_version), folded, folded.nbytes)

    def drop(self, owner: object) -> None:
        """Forget the weights that were folded for a model."""
        with self._lock:
            self.cache.discard_where(lambda key: isinstance(key, tuple) and key[0] is owner)

    def _get(self, key: tuple[Any, ...], version: object) -> Any:
        with self._lock:
            cached = self.cache.get(key)
        return cached[1] if cached is not None and cached[0] == version else None

    def _put(self, key: tuple[Any, ...], version: object, value: object, size: int) -> None:
        with self._lock:
            self.cache.put(key, (version, value), size)


def _key(owner: object, pick: Pick | None) -> tuple[Any, ...]:
    return owner, pick and pick.name, pick and pick.strength


@torch.inference_mode(False)
@torch.no_grad()
def _fold(pick: Pick, bases: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weights = {}
    for name in pick.adapter.targets:
        folded = pick.adapter.fold(name, bases[name], strength=pick.strength)
        # torch.matmul sums in another order where a weight asks for gradients: ask for what the base asks for
        weights[name] = folded.requires_grad_(bases[name].requires_grad)
    return weights

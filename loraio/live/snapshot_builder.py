"""Build the next snapshot of a model from the current one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from loraio.adapter.adapter import Adapter
from loraio.adapter.layers import STATISTICS
from loraio.adapter.metadata import Target
from loraio.bases.targets import find_head
from loraio.live.compiled import Slot
from loraio.live.parametrization import AdapterPart, FoldedWeight, GivenTensor
from loraio.live.places import Place, parametrization_list
from loraio.live.rollback import Rollback
from loraio.live.snapshots import Snapshot, Snapshots
from loraio.live.swap_cache import SwapCache
from loraio.live.weight_cache import WeightCache


class SnapshotBuilder:
    """Builds snapshots, and caches those of adapters that were on the model lately.

    Args:
        handle: the `loraio.Attachment`.
        snapshots: of its model.
        reserved: weights that any adapter may change; None where nothing was reserved.
        forms: of targets whose factors are padded, by the weight's name.
    """

    def __init__(
        self, handle: Any, snapshots: Snapshots, *, reserved: Sequence[str] | None, forms: Mapping[str, Target]
    ) -> None:
        self._handle = handle
        self._snapshots = snapshots
        self._reserved = reserved
        self._forms = forms
        self._head_sizes: dict[str, tuple[nn.Module, str, int]] = {}
        self._swap_cache = SwapCache()

    def cached(self, before: Snapshot, adapter: Adapter, *, enabled: bool, strength: float) -> Snapshot | None:
        """Return the snapshot that an adapter had when it was on the model before, if it still holds."""
        found = self._swap_cache.get(before, adapter, enabled=enabled, strength=strength)
        if found is None or found.places == before.places:
            return found
        new = {name: place for name, place in before.places.items() if name not in found.places}
        parts = {name: self._part(adapter, place, before) for name, place in new.items()}
        return self._remembered(replace(found, places=before.places, parts={**found.parts, **parts}))

    def in_state(self, before: Snapshot, *, enabled: bool, strength: float) -> Snapshot:
        """Return the snapshot of the same adapter, on or off and at some strength."""
        found = self.cached(before, before.adapter, enabled=enabled, strength=strength)
        if found is not None:
            return found
        parts = {name: part.with_state(enabled=enabled, strength=strength) for name, part in before.parts.items()}
        return self._remembered(replace(before, enabled=enabled, strength=strength, parts=parts, cache=WeightCache()))

    def with_adapter(self, adapter: Adapter, before: Snapshot, rollback: Rollback) -> Snapshot:
        """Return the snapshot that has another adapter in the place of the one before.

        Tensors that no adapter was on before are parametrized here. They stay so until the adapter is detached: they
        go through as they are where a later adapter leaves them alone.
        """
        places = {**before.places, **self._new_places(adapter, before)}
        parts = {name: self._part(adapter, place, before) for name, place in places.items()}
        new = [place for name, place in places.items() if name not in before.places]
        for place in new:
            place.put_on(parts[place.name], rollback)
        if new and before.places:
            self._snapshots.wait_for_passes()  # one may be looking for a tensor among its module's own
        for place in new:
            place.hide_base(rollback)
        for path in adapter.heads.keys() - self._head_sizes.keys():
            module, attribute = find_head(self._handle.model, path)
            rollback.set(self._head_sizes, path, (module, attribute, getattr(module, attribute)))
        return self._remembered(replace(before, adapter=adapter, places=places, parts=parts, cache=WeightCache()))

    def resize_heads(self, snapshot: Snapshot, rollback: Rollback) -> None:
        """Let the attributes of heads say the size of the tensors that they have now."""
        own = snapshot.adapter.heads if snapshot.enabled and snapshot.places else {}
        for path, (module, attribute, base_size) in self._head_sizes.items():
            rollback.set(vars(module), attribute, own.get(path, base_size))

    def forget(self) -> None:
        """Cache nothing: snapshots hold on to the handle, and so to the model."""
        self._swap_cache.clear()

    def release(self, rollback: Rollback) -> None:
        """Let go of the handle, which lets go of the model then without the garbage collector."""
        self.forget()
        rollback.remove(vars(self), "_handle")

    def _new_places(self, adapter: Adapter, before: Snapshot) -> dict[str, Place]:
        wanted = (*(self._reserved or adapter.targets), *adapter.whole)
        names = [name for name in wanted if name not in before.places]
        modules = dict(self._handle.model.named_modules(remove_duplicate=False)) if names else {}
        # a module with several places has lost some tensors from its own by now
        orders = {id(place.module): place.order for place in before.places.values()}
        places = {}
        for name in names:
            path, _, parameter = name.rpartition(".")
            module = modules[path]
            slot = None if self._reserved is None else Slot()
            places[name] = Place(
                name=name,
                module=module,
                parameter=parameter,
                order=orders.get(id(module), (*module._parameters, *module._buffers)),
                stack=parametrization_list(None, getattr(module, parameter)),
                snapshots=self._snapshots,
                slot=slot,
            )
            if slot is not None:
                slot.place = places[name]
        return places

    def _part(self, adapter: Adapter, place: Place, before: Snapshot) -> AdapterPart:
        name, base, trainable = place.name, place.base, self._handle.trainable
        old, form = before.parts.get(name), self._forms.get(name)
        state: dict[str, Any] = {"strength": before.strength, "enabled": before.enabled, "handle": self._handle}
        if name in adapter.whole:
            return GivenTensor(
                adapter.tensors[name].to(base.device, copy=True),
                statistic=place.parameter in STATISTICS,
                # torch.matmul sums in another order where the weight asks for gradients: as a merged Parameter would
                requires_grad=trainable or base.requires_grad,
                **state,
            )
        target, factors = adapter.targets.get(name), {}
        if target is not None:
            factors = {short: factor.to(base.device, copy=True) for short, factor in adapter.factors_of(name).items()}
        elif isinstance(old, FoldedWeight) and old.target is None:
            return old
        return FoldedWeight(
            target,
            factors,
            trainable=trainable,
            slot=place.slot,
            form=replace(form, kind=target.kind) if form and target else form,
            device=base.device,
            **state,
        )

    def _remembered(self, snapshot: Snapshot) -> Snapshot:
        """Let later changes find a snapshot, unless training can change its tensors."""
        if not self._handle.trainable:
            self._swap_cache.put(snapshot)
        return snapshot

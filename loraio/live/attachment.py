"""Put an adapter on a live model, change it, and take it off again without a trace.

The adapter sits on the model as torch parametrizations, see `loraio.live.parametrization`. A deep copy of the model
carries the adapter too, with a handle of its own: `attachment_of`.

Each change is made as a whole. Everything is checked before anything is changed, and an exception at any point leaves
model and handle as they were. Forward passes in other threads see the model before a change or after it, see
`loraio.live.snapshots`. Only `attach` needs a model that no other thread is using.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from torch import Tensor, nn

from loraio.adapter.adapter import Adapter
from loraio.adapter.layers import tensor_name
from loraio.adapter.metadata import check_strength
from loraio.adapter.overflow import refuse_overflow
from loraio.bases.attached import is_adapter_part
from loraio.bases.targets import normalisation_modules
from loraio.errors import StateError
from loraio.files.tensors import tensor_bytes
from loraio.live.base_state import BaseRecord, attachments, refuse_attached
from loraio.live.fitting import (
    KnownFit,
    Reserve,
    check_fit,
    check_max_rank,
    check_reserved,
    padded_forms,
    reserved_weights,
)
from loraio.live.module_classes import FROZEN, class_beneath, frozen_class
from loraio.live.parametrization import FoldedWeight, GivenTensor
from loraio.live.places import Place
from loraio.live.rollback import Rollback
from loraio.live.snapshot_builder import SnapshotBuilder
from loraio.live.snapshots import Snapshot, Snapshots, take_no_snapshots, take_snapshots
from loraio.live.weight_cache import WeightCache


class Attachment:
    """The handle of an adapter on a live model; `attach` makes it. A context manager that detaches at its end.

    Attributes:
        model: the model that the adapter is on.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        *,
        strength: float,
        trainable: bool,
        allow_base_mismatch: bool,
        reserve: Reserve = None,
        max_rank: int | None = None,
    ) -> None:
        self.model = model
        self._trainable = trainable
        self._allow_base_mismatch = allow_base_mismatch
        self._frozen: list[nn.Module] = []
        self._known_fit = KnownFit(None, model)
        self._snapshots = Snapshots(Snapshot(adapter=adapter, strength=check_strength(strength)))
        refuse_attached(model)
        self._max_rank = check_max_rank(max_rank, trainable)
        reserve = () if reserve is None and max_rank is not None else reserve
        self._reserved = None if reserve is None else reserved_weights(model, adapter, reserve)
        self._check(adapter)
        forms = {} if max_rank is None else padded_forms(model, self._reserved or (), max_rank)
        self._builder = SnapshotBuilder(self, self._snapshots, reserved=self._reserved, forms=forms)
        self._base_record = BaseRecord(model if trainable else None)
        self._snapshots.change(self._attach)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        if self.attached:
            self.detach()

    def __repr__(self) -> str:
        state = "detached" if not self.attached else "enabled" if self.enabled else "disabled"
        return f"<Attachment of {len(self._now.adapter.targets)} targets, strength {self.strength:g}, {state}>"

    @property
    def attached(self) -> bool:
        """True while the adapter is on the model."""
        return bool(self._places)

    @property
    def adapter(self) -> Adapter:
        """The adapter that is on the model, or was last, with its tensors as they are now.

        They differ from those of the adapter that was attached when they were trained, or came from a state dict.

        Raises:
            StateError: the base changed while the adapter was attached for training: what was learned there has no
                place in the adapter.
            AdapterError: a tensor is no longer finite.
        """
        snapshot = self._now
        tensors, changed = self._learned(snapshot) if snapshot.learned is None else snapshot.learned
        if changed:
            raise StateError(
                f"{len(changed)} tensors of the base changed while the adapter was attached for training",
                problems=[f"{name!r} would be lost: it is outside of the adapter" for name in changed],
                hint="train live.parameters() only",
            )
        adapter = snapshot.adapter
        own = adapter.all_tensors
        if all(tensor_bytes(tensor).equal(tensor_bytes(own[name])) for name, tensor in tensors.items()):
            return adapter
        return replace(
            adapter,
            factors={name: tensors[name] for name in adapter.factors},
            tensors={name: tensors[name] for name in adapter.tensors},
        )

    @property
    def trainable(self) -> bool:
        """True if it was attached for training."""
        return self._trainable

    @property
    def enabled(self) -> bool:
        """True if the adapter takes part in the forward pass."""
        return self._now.enabled

    @property
    def strength(self) -> float:
        """The multiplier of the adapter's scale; may be set at any time, to any finite number.

        Whole tensors know no strength: `disable` gives the base.

        Raises:
            ConfigError: set to something that is not a finite number.
            AdapterError: a sum would overflow its weight's dtype.
            StateError: set on a detached handle, or from within a forward pass.
        """
        return self._now.strength

    @strength.setter
    def strength(self, value: float) -> None:
        strength = check_strength(value)

        def make(before: Snapshot, rollback: Rollback) -> Snapshot:
            targets = before.adapter.targets
            # factors may have been trained since
            factors = {own: f for name in targets for own, f in before.parts[name].tensors(name).items()}
            bases = {name: before.places[name].base for name in targets}
            refuse_overflow(targets, factors, bases, strength=strength)
            return self._builder.in_state(before, enabled=before.enabled, strength=strength)

        self._change(make)

    @property
    def reserved(self) -> tuple[str, ...] | None:
        """The weights that any adapter may change, in the model's order; None where nothing was reserved."""
        return self._reserved

    def enable(self) -> None:
        """Let the adapter take part in the forward pass."""
        self._change(lambda before, _: self._builder.in_state(before, enabled=True, strength=before.strength))

    def disable(self) -> None:
        """Let the model run as its base; the adapter stays on it."""
        self._change(lambda before, _: self._builder.in_state(before, enabled=False, strength=before.strength))

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield everything that can be trained: factors, heads, weights of norms.

        Nothing without ``attach(..., trainable=True)``.
        """
        for part in self._now.parts.values() if self._trainable else ():
            if not isinstance(part, FoldedWeight) or part.target is not None:
                yield from part.parameters()

    def statistics(self) -> dict[str, Tensor]:
        """Return running statistics of the adapter's own, by name; the model writes to them when it trains."""
        parts = self._now.parts
        return {name: part.given for name, part in parts.items() if isinstance(part, GivenTensor) and part.statistic}

    def refresh(self) -> None:
        """Compute every adapted weight anew at the next forward pass.

        Needed only after writes to a base weight or a factor that torch does not count: those through ``tensor.data``,
        a NumPy view or a raw pointer.
        """

        def make(before: Snapshot, rollback: Rollback) -> Snapshot:
            self._builder.forget()
            after = replace(before, cache=WeightCache())
            for place in after.places.values():
                if place.slot is not None:
                    place.slot.put(after.adapted(place), rollback)
            return after

        self._change(make)

    def swap(self, adapter: Adapter) -> None:
        """Put another adapter in the place of this one; strength and on/off stay as they are.

        Its targets and ranks may be others. Everything is checked first: when an error comes, the old adapter is
        still on. Only those tensors of the base are read again that were written to since the last check, see
        `loraio.bases.identity.BaseIdentity`. An adapter that was attached for training with a ``max_rank`` leaves
        with everything it has learned: take `adapter` before, and give the new `parameters` to an optimizer of their
        own.

        Raises:
            BaseMismatchError: the adapter does not belong to this base.
            AdapterError: a sum would overflow its weight's dtype.
            StateError: detached already, attached for training without a ``max_rank``, or the adapter changes tensors
                that were not reserved or has a larger rank; or within a forward pass.
        """

        def make(before: Snapshot, rollback: Rollback) -> Snapshot:
            if self._trainable and self._max_rank is None:
                raise StateError("an adapter that is being trained cannot be swapped", hint="detach it first")
            cached = self._builder.cached(before, adapter, enabled=before.enabled, strength=before.strength)
            known = self._known_fit.covers(adapter)
            if not known:
                self._check(adapter)
            elif cached is None:
                self._check_values(adapter, {name: before.places[name].base for name in adapter.targets})
            after = cached or self._builder.with_adapter(adapter, before, rollback)
            if not known and not self._allow_base_mismatch:
                rollback.set(vars(self), "_known_fit", KnownFit(adapter, self.model))
            return after

        self._change(make)

    def detach(self) -> None:
        """Take the adapter off: the model has its own Parameters and buffers again, in their order, with their bits.

        Waits for the forward passes that are on their way in other threads.

        Raises:
            StateError: detached already, or something else parametrized a target in the meantime; or within a forward
                pass.
        """

        def make(before: Snapshot, rollback: Rollback) -> Snapshot:
            learned = self._learned(before)
            off = self._builder.in_state(before, enabled=False, strength=before.strength)
            off.show(rollback)
            self._snapshots.current = off  # passes that begin from here on run on the base
            self._snapshots.wait_for_passes()
            for place in before.places.values():
                if place.occupied:
                    place.take_off(rollback)
            for module in self._frozen:
                rollback.set_class(module, class_beneath(type(module), FROZEN))
            take_no_snapshots(self.model, rollback)
            self._builder.release(rollback)
            rollback.set(vars(self), "_known_fit", KnownFit(None, self.model))
            return replace(before, places={}, parts={}, cache=WeightCache(), learned=learned)

        self._change(make, occupied_only=True)

    @property
    def _now(self) -> Snapshot:
        return self._snapshots.current

    @property
    def _places(self) -> Mapping[str, Place]:
        return self._now.places

    def _attach(self, before: Snapshot, rollback: Rollback) -> Snapshot:
        """Make the model ready for snapshots, and put the adapter on."""
        for path, module in normalisation_modules(self.model).items():
            own = tensor_name(path, "running_mean")
            learns = self._trainable and own in before.adapter.whole
            if getattr(module, "running_mean", None) is not None and not learns:
                rollback.set_class(module, frozen_class(type(module)))
                self._frozen.append(module)
        take_snapshots(self.model, self._snapshots, rollback)
        after = self._builder.with_adapter(before.adapter, before, rollback)
        self._builder.resize_heads(after, rollback)
        return after

    def _change(self, make: Callable[[Snapshot, Rollback], Snapshot], *, occupied_only: bool = False) -> None:
        """Make a change as a whole; ``occupied_only`` allows places whose parametrization someone else took off."""

        def checked(before: Snapshot, rollback: Rollback) -> Snapshot:
            self._require_attached()
            for name, place in before.places.items():
                if not place.occupied:
                    if not occupied_only:
                        raise StateError(f"{name!r} has lost its parametrization to someone else", hint="live.detach()")
                elif len(place.stack._modules) != 1 or not is_adapter_part(place.part):
                    raise StateError(f"{name!r} got another parametrization on top", hint="take that one off first")
            after = make(before, rollback)
            self._builder.resize_heads(after, rollback)
            return after

        self._require_attached()
        self._snapshots.change(checked)

    def _require_attached(self) -> None:
        if not self.attached:
            raise StateError("the adapter is detached", hint="loraio.attach(model, adapter) gives a new handle")

    def _check(self, adapter: Adapter) -> None:
        mismatch = self._allow_base_mismatch
        self._check_values(
            adapter, check_fit(self.model, adapter, placed=self._places.keys(), allow_base_mismatch=mismatch)
        )

    def _check_values(self, adapter: Adapter, state: Mapping[str, Tensor]) -> None:
        if self._reserved is not None:
            check_reserved(adapter, self._reserved, self._max_rank)
        refuse_overflow(adapter.targets, adapter.factors, state, strength=self.strength)

    def _learned(self, snapshot: Snapshot) -> tuple[dict[str, Tensor], list[str]]:
        """Return unchecked copies of the adapter's tensors as they are, and the base's tensors that were changed."""
        own = snapshot.adapter.all_tensors
        tensors = {
            key: tensor.detach().cpu().to(own[key].dtype, copy=True)
            for name, part in snapshot.parts.items()
            for key, tensor in part.tensors(name).items()
            if not tensor.is_meta
        }
        return tensors, self._base_record.changed()


def attach(
    model: nn.Module,
    adapter: Adapter,
    strength: float = 1.0,
    *,
    trainable: bool = False,
    allow_base_mismatch: bool = False,
    reserve: Reserve = None,
    max_rank: int | None = None,
) -> Attachment:
    """Put an adapter on a live model.

    In eval mode without gradients the model then computes the same bits as the merged model. The model's own weights
    are not written to; `Attachment.detach`, or the end of a ``with`` block, gives them back. Normalisation layers
    compute as in eval mode in either mode of the model, so that no batch drifts into the base's running statistics. A
    layer that learns statistics for an adapter attached for training follows the mode. Inside torch's
    ``parametrize.cached()`` a weight that was read once stays the same, even if the handle changes it.

    ``torch.compile`` compiles a model anew for other ranks, scales, kinds and targets, unless they were reserved. With
    ``reserve`` its graph without gradients reads finished weights, see `loraio.live.compiled`, and no change of the
    handle compiles anything anew. Every reserved weight then takes memory twice, even if the adapter leaves it alone.

    Args:
        model: the base model, on any device; it must be the one that the adapter was trained on.
        adapter: from `loraio.load` or `loraio.train`.
        strength: multiplies the adapter's scale; 1 is the adapter as trained, 0 the base.
        trainable: for training loops: copies of the factors, and of whole tensors other than statistics, become
            Parameters with gradients.
        allow_base_mismatch: accept other values or dtypes of the base, now and in later swaps; names, shapes and layers
            must fit.
        reserve: the weights that this and later adapters may change: patterns for
            `loraio.bases.targets.select_targets`, adapters that will come, or several of both.
            This adapter's own targets are always reserved too, whole tensors cannot be. By default any adapter of the
            base can come.
        max_rank: with ``trainable``, the largest rank that an adapter will have. Factors are padded to it with zeros,
            which stay zero and are not part of the adapter, so that an adapter of another rank, alpha or choice of
            reserved weights can take the place of this one in a training step that is compiled already. A compiled
            step is made for one strength and one kind on each weight.

    Returns:
        the handle: disable, enable, strength, swap, detach.

    Raises:
        BaseMismatchError: another base, or a target is missing or of another layer type; all are listed.
        AdapterError: a sum would overflow its weight's dtype.
        StateError: the model carries an adapter already, or a target is shared or parametrized otherwise, or the
            adapter replaces whole tensors and ``reserve`` is given.
        ConfigError: the strength is not a finite number, or ``max_rank`` is below 1 or not for training.
        UnknownNameError: a weight to be reserved is not in the model.
    """
    return Attachment(
        model,
        adapter,
        strength=strength,
        trainable=trainable,
        allow_base_mismatch=allow_base_mismatch,
        reserve=reserve,
        max_rank=max_rank,
    )


def attachment_of(model: nn.Module) -> Attachment:
    """Return the handle of the adapter that a model carries: the one that `attach` gave, or a deep copy's own.

    Args:
        model: the model itself, one that contains it, or a wrapper around it.

    Raises:
        StateError: it carries no adapter, or several parts of it carry one each.
    """
    found: list[Attachment] = attachments(model)
    if len(found) != 1:
        raise StateError(
            f"{len(found)} parts of the model carry an adapter each" if found else "the model carries no adapter",
            hint="name one of the parts" if found else "loraio.attach(model, adapter)",
        )
    return found[0]


def adapter_from(model: nn.Module) -> Adapter:
    """Return the adapter that a model carries, with copies of its tensors as they are now, on the CPU.

    Args:
        model: as `attachment_of`.

    Raises:
        StateError: as `attachment_of`, and as `Attachment.adapter`.
        AdapterError: a tensor is no longer finite.
    """
    return attachment_of(model).adapter

"""An adapter on a live model: attach, swap, strength, on and off, detach. Always reversible.

The adapter sits on the model as torch parametrizations, see `loraio.live.parametrization`. A deep copy of the model
has the
adapter on it too, with a handle of its own: `attachment_of`.

Whatever the handle does is done as a whole. Everything is checked before anything is changed, and when an exception
comes in the midst, from wherever, model and handle are what they were before, see `loraio.live.rollback`. Forward
passes in
other threads see the model before or after it, see `loraio.live.locking`. Only `attach` itself wants a model that no
other
thread is using.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType, TracebackType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from loraio.adapter.adapter import Adapter
from loraio.adapter.layers import STATISTICS
from loraio.adapter.metadata import Target, check_strength
from loraio.adapter.overflow import refuse_overflow
from loraio.bases.identity import digests, identity_of
from loraio.bases.targets import find_head, normalisation_modules
from loraio.bases.writes import version_of
from loraio.errors import StateError
from loraio.files.tensors import tensor_bytes
from loraio.live.base_state import attachments, base_state_dict, refuse_attached
from loraio.live.compiled import Slot
from loraio.live.fitting import Fitting, check_fit
from loraio.live.locking import beside_changes, share, unshare
from loraio.live.module_classes import freeze_statistics, release_statistics
from loraio.live.parametrization import AdapterPart, FoldedWeight, GivenTensor
from loraio.live.places import Place
from loraio.live.reserving import Reserve, check_max_rank, check_reserved, padded_forms, reserved_weights
from loraio.live.rollback import Undo
from loraio.live.swap_cache import Recent


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
        self._strength = check_strength(strength)
        self._allow_base_mismatch = allow_base_mismatch
        self._trainable = trainable
        self._enabled = True
        self._places: dict[str, Place] = {}
        self._frozen: dict[str, nn.Module] = {}
        self._last: tuple[dict[str, Tensor], list[str]] = ({}, [])
        self._fitting = Fitting(None, model)
        self._recent = Recent()
        refuse_attached(model)
        self._max_rank = check_max_rank(max_rank, trainable)
        reserve = () if reserve is None and max_rank is not None else reserve
        self._reserved = None if reserve is None else reserved_weights(model, adapter, reserve)
        self._forms: dict[str, Target] = {}
        self._check(adapter)
        if max_rank is not None:
            self._forms = padded_forms(model, self._reserved or (), max_rank)
        self._adapter = adapter
        self._base: dict[str, _Mark] = {}
        if trainable:
            state = base_state_dict(model)
            known = identity_of(model).digests(state)
            self._base = {name: _Mark(version_of(state[name]), state[name].dtype, known[name]) for name in state}
        undo = Undo()
        try:
            self._sharing = share(model, undo)
            self._freeze(adapter, undo)
            self._put_on(adapter, [*(self._reserved or adapter.targets), *adapter.whole], undo)
            self._remember(adapter)
        except BaseException:
            undo.run()
            raise

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.attached:
            self.detach()

    def __repr__(self) -> str:
        state = "detached" if not self.attached else "enabled" if self._enabled else "disabled"
        return f"<Attachment of {len(self._adapter.targets)} targets, strength {self._strength:g}, {state}>"

    @property
    def attached(self) -> bool:
        """Whether the adapter is still on the model."""
        return bool(self._places)

    @property
    def adapter(self) -> Adapter:
        """The adapter that is on the model, or was last, with its tensors as they are now.

        They are others than those of the adapter that was attached when they were trained, or came from a state dict.

        Raises:
            StateError: the base changed while the adapter was attached for training: what was learned there has no
                place in the adapter.
            AdapterError: a tensor is no longer finite.
        """
        adapter, (tensors, changed) = self._sharing.during(
            lambda: (self._adapter, self._now() if self.attached else self._last)
        )
        if changed:
            raise StateError(
                f"{len(changed)} tensors of the base changed while the adapter was attached for training",
                problems=[f"{name!r} would be lost: it is outside of the adapter" for name in changed],
                hint="train live.parameters() only",
            )
        kept = adapter.all_tensors
        if all(tensor_bytes(tensor).equal(tensor_bytes(kept[name])) for name, tensor in tensors.items()):
            return adapter
        return replace(
            adapter,
            factors={name: tensors[name] for name in adapter.factors},
            tensors={name: tensors[name] for name in adapter.tensors},
        )

    @property
    def trainable(self) -> bool:
        """Whether it was attached for training."""
        return self._trainable

    @property
    def enabled(self) -> bool:
        """Whether the adapter takes part in the forward pass."""
        return self._enabled

    @property
    def strength(self) -> float:
        """The multiplier of the adapter's scale; may be set at any time, to any finite number.

        Whole tensors know no strength: `disable` gives the base.

        Raises:
            ConfigError: set to what is no finite number.
            AdapterError: a sum would overflow its weight's dtype.
            StateError: set on a detached handle, or from within a forward pass.
        """
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:

        def apply(undo: Undo) -> None:
            self._strength = strength
            for place in self._places.values():
                if isinstance(place.part, FoldedWeight):
                    undo.note(vars(place.part))
                    place.part.strength = strength
            self._fill_slots(undo)

        def check() -> None:  # factors may have been trained since
            parts = {name: place.part for name, place in self._places.items() if name in self._adapter.targets}
            factors = {own: factor for name, part in parts.items() for own, factor in part.tensors(name).items()}
            self._check_finite(self._adapter.targets, factors, strength)

        strength = check_strength(value)
        self._change(apply, check)

    @property
    def reserved(self) -> tuple[str, ...] | None:
        """The weights that any adapter may change, in the model's order; None where nothing was reserved."""
        return self._reserved

    def enable(self) -> None:
        """Let the adapter take part in the forward pass."""
        self._switch(True)

    def disable(self) -> None:
        """Let the model run as its base; the adapter stays on it."""
        self._switch(False)

    def parameters(self) -> Iterator[nn.Parameter]:
        """What can be trained: factors, heads, weights of norms; nothing without ``attach(..., trainable=True)``."""
        for place in self._places.values() if self._trainable else ():
            if not isinstance(place.part, FoldedWeight) or place.part.target is not None:
                yield from place.part.parameters()

    def statistics(self) -> dict[str, Tensor]:
        """Running statistics of the adapter's own, by name; the model writes to them when it trains."""
        parts = {name: place.part for name, place in self._places.items()}
        return {name: part.given for name, part in parts.items() if isinstance(part, GivenTensor) and part.statistic}

    def refresh(self) -> None:
        """Compute every adapted weight anew at the next forward pass.

        Needed only after writes to a base weight or a factor that torch does not count: those through ``tensor.data``,
        a NumPy view or a raw pointer.
        """

        def apply(undo: Undo) -> None:
            for place in self._places.values():
                if isinstance(place.part, FoldedWeight):
                    place.part.refresh()
            self._recent.forget()

        self._change(apply)

    def swap(self, adapter: Adapter) -> None:
        """Put another adapter in the place of this one; strength and on/off stay as they are.

        Its targets and ranks may be others. Everything is checked first: when an error comes, the old adapter is
        still on. Of the base only what was written to since the last check is read again, see
        `loraio.bases.identity.BaseIdentity`. An adapter that was attached for training with a ``max_rank`` leaves
        with what
        it has learned: take `adapter` before, and give the new `parameters` to an optimizer of their own.

        Raises:
            BaseMismatchError: the adapter does not belong to this base.
            AdapterError: a sum would overflow its weight's dtype.
            StateError: detached already, attached for training without a ``max_rank``, or the adapter changes what was
                not reserved or has a larger rank; or within a forward pass.
        """
        known = False

        def check() -> None:
            nonlocal known
            if self._trainable and self._max_rank is None:
                raise StateError("an adapter that is being trained cannot be swapped", hint="detach it first")
            known = self._fitting.covers(adapter)
            if not known:
                self._check(adapter)
                return
            if self._reserved is not None:
                check_reserved(adapter, self._reserved, self._max_rank)
            if self._strength != self._recent.strength_of(adapter):
                self._check_finite(adapter.targets, adapter.factors, self._strength)

        def apply(undo: Undo) -> None:
            self._exchange(adapter, undo)
            if not known and not self._allow_base_mismatch:
                self._fitting = Fitting(adapter, self.model)

        self._change(apply, check)

    def detach(self) -> None:
        """Take the adapter off: the model has its own Parameters and buffers again, in their order, with their bits.

        Raises:
            StateError: detached already, or something else parametrized a target in the meantime; or within a forward
                pass.
        """

        def apply(undo: Undo) -> None:
            self._places = {name: place for name, place in self._places.items() if place.occupied}
            self._last = self._now()
            self._take_off(list(self._places), undo)
            self._release(undo)
            self._recent = Recent()  # what they hold, holds on to this handle, and so to the model
            self._fitting = Fitting(None, self.model)
            unshare(self.model, undo)

        self._change(apply, occupied_only=True)

    def _change(
        self, apply: Callable[[Undo], None], check: Callable[[], None] | None = None, *, occupied_only: bool = False
    ) -> None:
        """Make a change as a whole.

        Args:
            apply: makes it.
            check: what else there is to check, before.
            occupied_only: never mind the places from which someone else has taken the parametrization off.
        """

        def checked(undo: Undo) -> None:
            self._require_attached()
            self._check_untouched(occupied_only)
            if check is not None:
                check()
            undo.note(vars(self), self._places, self._frozen)
            apply(undo)

        self._require_attached()
        self._sharing.change(checked)

    def _now(self) -> tuple[dict[str, Tensor], list[str]]:
        """Copies of the adapter's tensors as they are, not checked; and which tensors of the base changed meanwhile."""
        tensors = {
            own: tensor.detach().cpu().to(self._adapter.all_tensors[own].dtype, copy=True)
            for name, place in self._places.items()
            if place.occupied
            for own, tensor in place.part.tensors(name).items()
            if not tensor.is_meta
        }
        return tensors, _written(base_state_dict(self.model), self._base) if self._trainable else []

    def _require_attached(self) -> None:
        if not self.attached:
            raise StateError("the adapter is detached", hint="loraio.attach(model, adapter) gives a new handle")

    def _check(self, adapter: Adapter) -> None:
        """Check everything that can be wrong with this adapter on this model; change nothing."""
        state = check_fit(
            self.model, adapter, placed=self._places.keys(), allow_base_mismatch=self._allow_base_mismatch
        )
        if self._reserved is not None:
            check_reserved(adapter, self._reserved, self._max_rank)
        refuse_overflow(adapter.targets, adapter.factors, state, strength=self._strength)

    def _check_finite(self, targets: Mapping[str, Target], factors: Mapping[str, Tensor], strength: float) -> None:
        weights = {name: self._base_tensor(name) for name in targets}
        refuse_overflow(targets, factors, weights, strength=strength)

    def _freeze(self, adapter: Adapter, undo: Undo) -> None:
        """Keep normalisation from writing to the base's statistics; layers that learn their own follow their mode."""
        for path, module in normalisation_modules(self.model).items():
            own = f"{path}.running_mean" if path else "running_mean"
            if getattr(module, "running_mean", None) is not None and not (self._trainable and own in adapter.whole):
                undo.note_module(module)
                freeze_statistics(module)
                self._frozen[path] = module

    def _release(self, undo: Undo) -> None:
        for module in self._frozen.values():
            undo.note_module(module)
            release_statistics(module)
        self._frozen.clear()

    def _check_untouched(self, occupied_only: bool) -> None:
        for name, place in self._places.items():
            if not place.occupied:
                if occupied_only:
                    continue
                raise StateError(f"{name!r} has lost its parametrization to someone else", hint="live.detach()")
            if len(place.stack._modules) != 1 or not isinstance(place.part, AdapterPart):
                raise StateError(f"{name!r} got another parametrization on top", hint="take that one off first")

    def _switch(self, enabled: bool) -> None:

        def apply(undo: Undo) -> None:
            self._enabled = enabled
            for place in self._places.values():
                undo.note(vars(place.part), vars(place.module))
                place.part.enabled = enabled
                place.resize(enabled)
            self._fill_slots(undo)

        self._change(apply)

    def _fill_slots(self, undo: Undo) -> None:
        """Let compiled graphs see what was changed."""
        for place in self._places.values():
            if isinstance(place.part, FoldedWeight) and place.part.slot is not None:
                undo.note(vars(place.part.slot))
                place.part.slot.fill()

    def _exchange(self, adapter: Adapter, undo: Undo) -> None:
        """From whatever is on the model to this adapter, touching only what differs."""
        # whole tensors may have other sizes
        stay = {name for name in self._places if name in (self._reserved or adapter.targets)}
        self._take_off([name for name in self._places if name not in stay], undo)
        recent = self._recent_parts(adapter)
        for name, place in self._places.items() if self._places.keys() != recent.keys() else ():
            old, new = place.part, self._part(adapter, name, place.base, recent)
            if isinstance(old, FoldedWeight) and isinstance(new, FoldedWeight):
                if old.target is None and new.target is None:
                    continue
                new.slot = old.slot
            place.exchange(new, undo)
            if isinstance(new, FoldedWeight) and new.slot is not None:
                undo.note(vars(new.slot))
                new.slot.fill()
        if self._places.keys() == recent.keys():
            for name, part in recent.items():
                self._set(part)
                self._places[name].exchange(part, undo)
        self._put_on(adapter, [name for name in (*adapter.targets, *adapter.whole) if name not in stay], undo, recent)
        self._adapter = adapter
        if not recent:
            self._remember(adapter)

    def _recent_parts(self, adapter: Adapter) -> Mapping[str, FoldedWeight]:
        """Its parts from when it was on the model before, if they can be used: the model may have moved meanwhile."""
        if self._reserved is not None:
            return {}
        parts = self._recent.parts(adapter)
        stay = all(part.device in (None, self._base_tensor(name).device) for name, part in parts.items())
        return parts if stay else {}

    def _base_tensor(self, name: str) -> Tensor:
        if name in self._places:
            return self._places[name].base
        path, _, parameter = name.rpartition(".")
        tensor: Tensor = getattr(self.model.get_submodule(path), parameter)
        return tensor

    def _remember(self, adapter: Adapter) -> None:
        if self._reserved is None and not self._trainable and not adapter.whole:
            parts = {
                name: part for name in adapter.targets if isinstance(part := self._places[name].part, FoldedWeight)
            }
            size = sum(self._places[name].base.nbytes for name in adapter.targets)
            self._recent.add(adapter, parts, size, strength=self._strength)

    def _part(
        self, adapter: Adapter, name: str, base: Tensor, recent: Mapping[str, FoldedWeight] = MappingProxyType({})
    ) -> AdapterPart:
        part: AdapterPart
        form = self._forms.get(name)
        if name in recent:
            part = recent[name]
        elif name in adapter.targets:
            factors = {short: factor.to(base.device, copy=True) for short, factor in adapter.factors_of(name).items()}
            target = adapter.targets[name]
            part = FoldedWeight(
                target,
                factors,
                strength=self._strength,
                trainable=self._trainable,
                handle=self,
                readings=self._sharing.readings,
                form=form and replace(form, kind=target.kind),
            )
        elif name not in adapter.whole:  # reserved for other adapters
            part = FoldedWeight(
                None,
                {},
                strength=self._strength,
                trainable=self._trainable,
                handle=self,
                readings=self._sharing.readings,
                form=form,
            )
        else:
            part = GivenTensor(
                adapter.tensors[name].to(base.device, copy=True),
                statistic=name.rpartition(".")[2] in STATISTICS,
                # torch.matmul sums in another order where the weight asks for gradients: as a merged Parameter would
                requires_grad=self._trainable or base.requires_grad,
                handle=self,
                readings=self._sharing.readings,
            )
        self._set(part)
        return part if form is None else part.to(base.device)

    def _set(self, part: AdapterPart) -> None:
        """Let a part be as strong and as much on as the handle says; setting attributes of a module takes a while."""
        if part.enabled != self._enabled:
            part.enabled = self._enabled
        if isinstance(part, FoldedWeight) and part.strength != self._strength:
            part.strength = self._strength

    def _put_on(
        self,
        adapter: Adapter,
        names: Iterable[str],
        undo: Undo,
        recent: Mapping[str, FoldedWeight] = MappingProxyType({}),
    ) -> None:
        names = list(names)
        modules = dict(self.model.named_modules(remove_duplicate=False)) if names else {}
        for name in names:
            path, _, parameter = name.rpartition(".")
            module = modules[path]
            # a module with several targets has lost the others from its own by now
            orders = [place.order for place in self._places.values() if place.module is module]
            order = orders[0] if orders else (*module._parameters, *module._buffers)
            sizes: tuple[tuple[str, int, int], ...] = ()
            if path in adapter.heads and parameter == "weight":
                _, attribute = find_head(self.model, path)
                sizes = ((attribute, getattr(module, attribute), adapter.heads[path]),)
            place = Place(module=module, parameter=parameter, order=order, sizes=sizes)
            place.note(undo)
            place.put_on(self._part(adapter, name, getattr(module, parameter), recent))
            self._places[name] = place
            if self._reserved is not None and isinstance(place.part, FoldedWeight):
                place.part.slot = Slot(place.stack)

    def _take_off(self, names: Iterable[str], undo: Undo) -> None:
        for name in names:
            self._places[name].note(undo)
            self._places[name].take_off()
            del self._places[name]


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

    In eval mode without gradients the model then computes, bit for bit, what the merged model computes. The model's
    own weights are not written to; `Attachment.detach`, or the end of a ``with`` block, gives them back. Normalisation
    layers compute as in eval mode, whatever mode the model is in, so that no batch drifts into the base's running
    statistics; but one that is to learn statistics for the adapter, attached for training, follows the mode. Inside
    torch's ``parametrize.cached()`` a weight that was read once stays as it was read, whatever the handle does.

    A model that ``torch.compile`` has compiled is compiled anew for other ranks, scales, kinds and targets, unless they
    were reserved: with ``reserve`` its graph without gradients reads finished weights, see `loraio.live.compiled`,
    and whatever
    the handle does compiles nothing anew. Every reserved weight is then held once more, also where the adapter leaves
    it alone.

    Args:
        model: the base model, on any device; it must be the one that the adapter was trained on.
        adapter: from `loraio.load` or `loraio.train`.
        strength: multiplies the adapter's scale; 1 is the adapter as trained, 0 the base.
        trainable: make the factors, and the whole tensors that are no statistics, Parameters with gradients, as copies;
            for training loops.
        allow_base_mismatch: go on where values or dtypes of the base are others, now and in later swaps; names,
            shapes and layers must fit.
        reserve: the weights that this and later adapters may change: patterns for
            `loraio.bases.targets.select_targets`, adapters that will come, or several of both.
            This adapter's own targets always belong to them. Whole tensors cannot be reserved. By default any adapter
            of the base can come.
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
        ConfigError: the strength is not a finite number, or ``max_rank`` no number of at least 1 or not for training.
        UnknownNameError: what is to be reserved is not in the model.
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
    """The handle of the adapter that a model carries: the one that `attach` gave, or a deep copy's own.

    Args:
        model: the model itself, one that contains it, or a wrapper around it.

    Raises:
        StateError: it carries no adapter, or several parts of it carry one each.
    """
    found: list[Attachment] = beside_changes(model, attachments)
    if len(found) != 1:
        raise StateError(
            f"{len(found)} parts of the model carry an adapter each" if found else "the model carries no adapter",
            hint="name one of the parts" if found else "loraio.attach(model, adapter)",
        )
    return found[0]


def adapter_from(model: nn.Module) -> Adapter:
    """The adapter that a model carries, with its tensors as they are now; on the CPU, apart from the model.

    Args:
        model: as `attachment_of`.

    Raises:
        StateError: as `attachment_of`, and as `Attachment.adapter`.
        AdapterError: a tensor is no longer finite.
    """
    return attachment_of(model).adapter


class _Mark(NamedTuple):
    """What a tensor of the base was: torch's count of writes to it, its dtype and its digest."""

    writes: int
    dtype: torch.dtype
    sha256: str


def _written(state: Mapping[str, Tensor], before: Mapping[str, _Mark]) -> list[str]:
    """Names of tensors that were written to and have other bytes now; a cast or a move alone is no write.

    The count of writes does not tell everything: fused optimizers do not raise it.
    """
    suspects = {
        name: tensor
        for name, tensor in state.items()
        if not tensor.is_meta and (tensor.dtype == before[name].dtype or version_of(tensor) != before[name].writes)
    }
    return [name for name, digest in digests(suspects).items() if digest != before[name].sha256]

"""An adapter on a live model: attach, swap, strength, on and off, detach. Always reversible.

The adapter sits on the model as torch parametrizations, see `loraio.parametrization`. A deep copy of the model has the
adapter on it too, with a handle of its own: `attachment_of`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from types import TracebackType

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from loraio.adapter import Adapter, check_strength
from loraio.container import tensor_bytes
from loraio.errors import BaseMismatchError, StateError
from loraio.identity import check_base, identity_of
from loraio.layers import refuse_shared, refuse_unusable, target_modules
from loraio.parametrization import FoldedWeight, Place


class Attachment:
    """The handle of an adapter on a live model; `attach` makes it. A context manager that detaches at its end.

    Attributes:
        model: the model that the adapter is on.
    """

    def __init__(
        self, model: nn.Module, adapter: Adapter, *, strength: float, trainable: bool, allow_base_mismatch: bool
    ) -> None:
        self.model = model
        self._strength = check_strength(strength)
        self._allow_base_mismatch = allow_base_mismatch
        self._trainable = trainable
        self._enabled = True
        self._places: dict[str, Place] = {}
        self._last_factors: dict[str, Tensor] = {}
        refuse_attached(model)
        self._check(adapter)
        self._adapter = adapter
        try:
            self._put_on(adapter, adapter.targets)
        except BaseException:
            self._take_off(list(self._places))
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
        """The adapter that is on the model, or was last, with the factors as they are now.

        They are others than those of the adapter that was attached when they were trained, or came from a state dict.
        """
        factors = self._factors()
        kept = self._adapter.factors
        if all(tensor_bytes(factor).equal(tensor_bytes(kept[name])) for name, factor in factors.items()):
            return self._adapter
        return replace(self._adapter, factors=factors)

    @property
    def enabled(self) -> bool:
        """Whether the adapter takes part in the forward pass."""
        return self._enabled

    @property
    def strength(self) -> float:
        """The multiplier of the adapter's scale; may be set at any time, to any finite number."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._require_attached()
        self._check_untouched()
        self._strength = check_strength(value)
        for place in self._places.values():
            place.folded.strength = self._strength

    def enable(self) -> None:
        """Let the adapter take part in the forward pass."""
        self._switch(True)

    def disable(self) -> None:
        """Let the model run as its base; the adapter stays on it."""
        self._switch(False)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The factors that can be trained: all of them after ``attach(..., trainable=True)``, else none."""
        for place in self._places.values():
            yield from place.folded.parameters()

    def swap(self, adapter: Adapter) -> None:
        """Put another adapter in the place of this one; strength and on/off stay as they are.

        Its targets and ranks may be others. Everything is checked first: when an error comes, the old adapter is
        still on.

        Raises:
            BaseMismatchError: the adapter does not belong to this base.
            StateError: detached already, or attached for training.
        """
        self._require_attached()
        if self._trainable:
            raise StateError("an adapter that is being trained cannot be swapped", hint="detach it first")
        self._check_untouched()
        self._check(adapter)
        old = self._adapter
        try:
            self._exchange(adapter)
        except BaseException:
            self._exchange(old)
            raise

    def detach(self) -> None:
        """Take the adapter off: the model has its own Parameter objects again, in their order, with their bits.

        Raises:
            StateError: detached already, or something else parametrized a target in the meantime.
        """
        self._require_attached()
        self._places = {name: place for name, place in self._places.items() if place.occupied}
        self._check_untouched()
        self._last_factors = self._factors()
        self._take_off(list(self._places))

    def _factors(self) -> dict[str, Tensor]:
        """Copies of the factors as they are now, or were at the end; not checked, they may be NaN."""
        if not self.attached:
            return self._last_factors
        return {
            f"{name}.{short}": factor.detach().cpu().clone()
            for name, place in self._places.items()
            if place.occupied
            for short, factor in place.folded.factors().items()
            if not factor.is_meta
        }

    def _require_attached(self) -> None:
        if not self.attached:
            raise StateError("the adapter is detached", hint="loraio.attach(model, adapter) gives a new handle")

    def _check(self, adapter: Adapter) -> None:
        """Everything that can be wrong with this adapter on this model; changes nothing."""
        modules = target_modules(self.model)
        problems = []
        for name, target in adapter.targets.items():
            found = modules.get(name)
            if found is None:
                continue  # no such weight, which check_base says better, or a layer that adapters do not know
            if (found.layer.name, found.groups) != (target.layer, target.groups):
                problems.append(
                    f"{name!r}: the layer is a {found.layer.name} with groups={found.groups}, "
                    f"the adapter was made for a {target.layer} with groups={target.groups}"
                )
            if name not in self._places:
                refuse_unusable(found)
        if problems:
            raise BaseMismatchError("the adapter does not belong to this base", problems=problems)
        check_base(
            adapter,
            base_state_dict(self.model),
            allow_mismatch=self._allow_base_mismatch,
            identity=identity_of(self.model),
        )
        unknown = [name for name in adapter.targets if name not in modules]
        if unknown:
            raise BaseMismatchError(
                "the adapter does not belong to this base",
                problems=[f"{name!r}: its module is not of a layer type that adapters know" for name in unknown],
            )
        refuse_shared(self.model, adapter.targets)

    def _check_untouched(self) -> None:
        for name, place in self._places.items():
            if not place.occupied:
                raise StateError(f"{name!r} has lost its parametrization to someone else", hint="live.detach()")
            if len(place.stack) != 1 or not isinstance(place.stack[0], FoldedWeight):
                raise StateError(f"{name!r} got another parametrization on top", hint="take that one off first")

    def _switch(self, enabled: bool) -> None:
        self._require_attached()
        self._check_untouched()
        self._enabled = enabled
        for place in self._places.values():
            place.folded.enabled = enabled

    def _exchange(self, adapter: Adapter) -> None:
        """From whatever is on the model to this adapter, touching only what differs."""
        self._take_off([name for name in self._places if name not in adapter.targets])
        for name, place in self._places.items():
            place.stack[0] = self._folded(adapter, name, place.stack.original)
        self._put_on(adapter, [name for name in adapter.targets if name not in self._places])
        self._adapter = adapter

    def _folded(self, adapter: Adapter, name: str, weight: Tensor) -> FoldedWeight:
        factors = {short: factor.to(weight.device, copy=True) for short, factor in adapter.factors_of(name).items()}
        folded = FoldedWeight(
            adapter.targets[name], factors, strength=self._strength, trainable=self._trainable, handle=self
        )
        folded.enabled = self._enabled
        return folded

    def _put_on(self, adapter: Adapter, names: Iterable[str]) -> None:
        modules = target_modules(self.model)
        for name in names:
            module, parameter = modules[name].module, modules[name].parameter
            folded = self._folded(adapter, name, modules[name].weight)
            # a module with several targets has lost the others from its parameters by now
            orders = [place.order for place in self._places.values() if place.module is module]
            place = Place(module=module, parameter=parameter, order=orders[0] if orders else tuple(module._parameters))
            place.put_on(folded)
            self._places[name] = place

    def _take_off(self, names: Iterable[str]) -> None:
        for name in names:
            self._places[name].take_off()
            del self._places[name]


def attach(
    model: nn.Module,
    adapter: Adapter,
    strength: float = 1.0,
    *,
    trainable: bool = False,
    allow_base_mismatch: bool = False,
) -> Attachment:
    """Put an adapter on a live model.

    In eval mode without gradients the model then computes, bit for bit, what the merged model computes. The model's
    own weights are not written to; `Attachment.detach`, or the end of a ``with`` block, gives them back. Inside torch's
    ``parametrize.cached()`` a weight that was read once stays as it was read, whatever the handle does.

    Args:
        model: the base model, on any device; it must be the one that the adapter was trained on.
        adapter: from `loraio.load` or `loraio.train`.
        strength: multiplies the adapter's scale; 1 is the adapter as trained, 0 the base.
        trainable: make the factors Parameters with gradients, as copies; for training loops.
        allow_base_mismatch: go on where values or dtypes of the base are others, now and in later swaps; names,
            shapes and layers must fit.

    Returns:
        the handle: disable, enable, strength, swap, detach.

    Raises:
        BaseMismatchError: another base, or a target is missing or of another layer type; all are listed.
        StateError: the model carries an adapter already, or a target is shared or parametrized otherwise.
        ConfigError: the strength is not a finite number.
    """
    return Attachment(model, adapter, strength=strength, trainable=trainable, allow_base_mismatch=allow_base_mismatch)


def refuse_attached(model: nn.Module) -> None:
    """Refuse a model that carries an adapter.

    Raises:
        StateError: it does.
    """
    if any(isinstance(module, FoldedWeight) for module in model.modules()):
        raise StateError("the model carries an adapter already", hint="live.swap(adapter), or live.detach() first")


def attachment_of(model: nn.Module) -> Attachment:
    """The handle of the adapter that a model carries: the one that `attach` gave, or a deep copy's own.

    Args:
        model: the model itself, one that contains it, or a wrapper around it.

    Raises:
        StateError: it carries no adapter, or several parts of it carry one each.
    """
    found = _attachments(model)
    if len(found) != 1:
        raise StateError(
            f"{len(found)} parts of the model carry an adapter each" if found else "the model carries no adapter",
            hint="name one of the parts" if found else "loraio.attach(model, adapter)",
        )
    return found[0]


def adapter_from(model: nn.Module) -> Adapter:
    """The adapter that a model carries, with the factors as they are now; on the CPU, apart from the model.

    Args:
        model: as `attachment_of`.

    Raises:
        StateError: as `attachment_of`.
        AdapterError: a factor is no longer finite.
    """
    return attachment_of(model).adapter


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the base under its own names, in its own order, whether an adapter is attached or not.

    Args:
        model: the model itself, or what ``torch.compile``, ``DataParallel``, ``DistributedDataParallel`` or
            ``AveragedModel`` made of it; their prefixes and own buffers are left out.

    Returns:
        the base's own tensors, not copies; without gradients, as in every state dict.
    """
    model = _unwrapped(model)
    places: dict[int, list[Place]] = {}
    for live in _attachments(model):
        for place in live._places.values():
            places.setdefault(id(place.module), []).append(place)
    state: dict[str, Tensor] = dict(model.state_dict())
    for path, module in model.named_modules():
        if id(module) in places:
            state = _as_before(state, f"{path}." if path else "", places[id(module)])
    return state


def _attachments(model: nn.Module) -> list[Attachment]:
    found: dict[int, Attachment] = {}
    for module in model.modules():
        if isinstance(module, FoldedWeight):
            found[id(module.handle)] = module.handle
    return list(found.values())


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, DataParallel | DistributedDataParallel | AveragedModel):
            model = model.module
        elif isinstance(model._modules.get("_orig_mod"), nn.Module):  # torch.compile's; its class is slow to import
            model = model.get_submodule("_orig_mod")
        else:
            return model


def _as_before(state: Mapping[str, Tensor], prefix: str, places: list[Place]) -> dict[str, Tensor]:
    """The state dict with the names of one module as they were before anything was put on it."""
    stacks = {f"{prefix}parametrizations.{place.parameter}.": f"{prefix}{place.parameter}" for place in places}
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        stack = next((stack for stack in stacks if name.startswith(stack)), None)
        if stack is None:
            renamed[name] = tensor
        elif name == f"{stack}original":
            renamed[stacks[stack]] = tensor
    names = list(renamed)
    start = next(place for place, name in enumerate(names) if name.startswith(prefix))
    first = [prefix + key for key in places[0].order if prefix + key in renamed]
    order = names[:start] + first + [name for name in names[start:] if name not in first]
    return {name: renamed[name] for name in order}

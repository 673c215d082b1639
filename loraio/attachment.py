"""An adapter on a live model: attach, swap, strength, on and off, detach. Always reversible.

The adapter sits on the model as torch parametrizations: the base weight stays the Parameter that it was and is never
written to, and ``module.weight`` gives the adapted weight to whoever reads it, the layer's own forward included.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn.utils import parametrize

from loraio.adapter import Adapter, Target, check_strength
from loraio.errors import BaseMismatchError, StateError
from loraio.identity import check_base
from loraio.layers import refuse_shared, refuse_unusable, target_modules

_PARAMETRIZED = re.compile(r"^(.*\.)?parametrizations\.([^.]+)\.([^.]+)(\..*)?$")


class FoldedWeight(nn.Module):
    """The parametrization of one weight: base weight in, adapted weight out.

    Without gradients it gives the bits that `loraio.merge` gives. Where a gradient is asked for, from the factors or
    from the base weight, it computes the same in float32, differentiably.
    """

    def __init__(self, target: Target, factors: Mapping[str, Tensor], *, strength: float, trainable: bool) -> None:
        super().__init__()
        self.target = target
        self.strength = strength
        self.enabled = True
        for name, factor in factors.items():
            if trainable:
                self.register_parameter(name, nn.Parameter(factor))
            else:
                self.register_buffer(name, factor)

    def factors(self) -> dict[str, Tensor]:
        """The factors by short name, as they are now."""
        return {name: getattr(self, name) for name in self.target.factor_shapes}

    def forward(self, weight: Tensor) -> Tensor:
        """The adapted weight: shape, dtype and device of ``weight``."""
        if not self.enabled:
            return weight
        factors = self.factors()
        if torch.is_grad_enabled() and (weight.requires_grad or any(f.requires_grad for f in factors.values())):
            return self.target.fold_for_training(weight, factors, strength=self.strength)
        # torch.matmul folds its batch, and so sums in another order, where the weight asks for gradients, even under
        # no_grad: the folded weight asks for what the base weight asks for, as a merged Parameter would
        return self.target.fold(weight, factors, strength=self.strength).requires_grad_(weight.requires_grad)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a target's adapter sits: the module, its weight, and the order of the module's parameters before."""

    module: nn.Module
    parameter: str
    order: tuple[str, ...]

    @property
    def occupied(self) -> bool:
        """Whether the weight is still parametrized; someone else may have taken everything off."""
        return parametrize.is_parametrized(self.module, self.parameter)

    @property
    def stack(self) -> parametrize.ParametrizationList:
        """The parametrizations on the weight; ours is the only one."""
        stacks = cast(nn.ModuleDict, self.module.parametrizations)
        return cast(parametrize.ParametrizationList, stacks[self.parameter])

    @property
    def folded(self) -> FoldedWeight:
        return cast(FoldedWeight, self.stack[0])


class Attachment:
    """The handle of an adapter on a live model; `attach` makes it. A context manager that detaches at its end.

    Attributes:
        model: the model that the adapter is on.
    """

    def __init__(self, model: nn.Module, adapter: Adapter, *, strength: float, trainable: bool) -> None:
        self.model = model
        self._strength = check_strength(strength)
        self._trainable = trainable
        self._enabled = True
        self._places: dict[str, _Place] = {}
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
        """The adapter that is on the model, or was last; while it is trained, with the factors as they are now."""
        if not self._trainable:
            return self._adapter
        return replace(self._adapter, factors=self._trained_factors())

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
        if self._trainable:
            self._last_factors = self._trained_factors()
        self._take_off(list(self._places))

    def _trained_factors(self) -> dict[str, Tensor]:
        """Copies of the factors as they are now, or were at the end; not checked, they may be NaN."""
        if not self.attached:
            return self._last_factors
        return {
            f"{name}.{short}": factor.detach().cpu().clone()
            for name, place in self._places.items()
            for short, factor in place.folded.factors().items()
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
        check_base(adapter, base_state_dict(self.model))
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
        folded = FoldedWeight(adapter.targets[name], factors, strength=self._strength, trainable=self._trainable)
        folded.enabled = self._enabled
        return folded

    def _put_on(self, adapter: Adapter, names: Iterable[str]) -> None:
        modules = target_modules(self.model)
        for name in names:
            module, parameter = modules[name].module, modules[name].parameter
            folded = self._folded(adapter, name, modules[name].weight)
            # a module with several targets has lost the others from its parameters by now
            orders = [place.order for place in self._places.values() if place.module is module]
            place = _Place(module=module, parameter=parameter, order=orders[0] if orders else tuple(module._parameters))
            # register_parametrization calls weight.set_(weight), which writes nothing but counts as a write
            with _unsafe_preserve_version_counter(modules[name].weight):
                # unsafe: shape and dtype are checked already, and the check would fold every weight once more
                parametrize.register_parametrization(module, parameter, folded, unsafe=True)
            self._places[name] = place

    def _take_off(self, names: Iterable[str]) -> None:
        for name in names:
            place = self._places[name]
            parametrize.remove_parametrizations(place.module, place.parameter, leave_parametrized=False)
            del self._places[name]
            parameters = place.module._parameters  # the weight came back behind the bias
            order = [key for key in place.order if key in parameters]
            order += [key for key in parameters if key not in place.order]
            parameters.update({key: parameters.pop(key) for key in order})


def attach(model: nn.Module, adapter: Adapter, strength: float = 1.0, *, trainable: bool = False) -> Attachment:
    """Put an adapter on a live model.

    In eval mode without gradients the model then computes, bit for bit, what the merged model computes. The model's
    own weights are not written to; `Attachment.detach`, or the end of a ``with`` block, gives them back. Inside torch's
    ``parametrize.cached()`` a weight that was read once stays as it was read, whatever the handle does.

    Args:
        model: the base model, on any device; it must be the one that the adapter was trained on.
        adapter: from `loraio.load` or `loraio.train`.
        strength: multiplies the adapter's scale; 1 is the adapter as trained, 0 the base.
        trainable: make the factors Parameters with gradients, as copies; for training loops.

    Returns:
        the handle: disable, enable, strength, swap, detach.

    Raises:
        BaseMismatchError: another base, or a target is missing or of another layer type; all are listed.
        StateError: the model carries an adapter already, or a target is shared or parametrized otherwise.
        ConfigError: the strength is not a finite number.
    """
    return Attachment(model, adapter, strength=strength, trainable=trainable)


def refuse_attached(model: nn.Module) -> None:
    """Refuse a model that carries an adapter.

    Raises:
        StateError: it does.
    """
    if any(isinstance(module, FoldedWeight) for module in model.modules()):
        raise StateError("the model carries an adapter already", hint="live.swap(adapter), or live.detach() first")


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the base under its own names, whether an adapter is attached or not; tensors are shared.

    Weights that carry an adapter stand at the end of their module's tensors.
    """
    own: set[str] = set()
    for path, module in model.named_modules():
        if isinstance(module, FoldedWeight):
            own.add(path.rpartition(".")[0])
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        match = _PARAMETRIZED.match(name)
        if match is None or f"{match[1] or ''}parametrizations.{match[2]}" not in own:
            state[name] = tensor
        elif match[3] == "original":
            state[f"{match[1] or ''}{match[2]}"] = tensor
    return state

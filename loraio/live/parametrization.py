"""The parametrizations that an adapter puts on the tensors of a model.

The base's tensor stays the Parameter or buffer that it was and is never written to. ``module.weight`` gives the adapted
weight to whoever reads it, the layer's own forward included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from loraio.adapter import Target
from loraio.bases.attached import AttachedPart
from loraio.live.compiled import Slot

_Part = TypeVar("_Part", bound="AdapterPart")


class AdapterPart(AttachedPart):
    """The part of an adapter that is put on one tensor of the base.

    Its attributes are never changed, see `with_state`; a part can thus belong to a `loraio.live.snapshots.Snapshot`.

    Attributes:
        enabled: False lets the base's tensor through.
        strength: multiplies the scale; whole tensors know none.
        handle: the `loraio.Attachment` that it belongs to. A deep copy of the model copies it along, so that the copy
            has a handle of its own.
    """

    enabled: bool
    strength: float
    handle: Any

    def __init__(self, *, enabled: bool, strength: float, handle: Any) -> None:
        super().__init__()
        vars(self).update(enabled=enabled, strength=strength, handle=handle)  # each by itself takes a module a while

    def with_state(self: _Part, *, enabled: bool, strength: float) -> _Part:
        """Return a part with the same tensors, and their hooks, that is on or off and has this strength."""
        twin = type(self).__new__(type(self))
        vars(twin).update(vars(self), enabled=enabled, strength=strength)
        return twin

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the adapter's own tensors as they are now, by their names in files; ``name`` is the base's tensor."""
        raise NotImplementedError


class FoldedWeight(AdapterPart):
    """The parametrization of one weight: base weight in, adapted weight out.

    Without gradients it gives the bits that `loraio.merge` gives. Where a gradient is asked for, from the factors or
    from the base weight, it computes the same in float32, differentiably.

    Attributes:
        target: the adapter's metadata of the weight; None where it leaves a weight alone that others adapt.
        trainable: True if the factors are Parameters.
        slot: where compiled graphs read the weight from when there are no gradients; None where they fold it.
        form: of a target whose factors are padded, as compiled graphs know it: its rank is theirs, and its scale 1. The
            padding is zero in A and in B, so that the gradient of either, a product with the other, is zero there.
        routes: found by `loraio.live.training_step` for the layer's training steps, by the form of their inputs.
    """

    target: Target | None
    trainable: bool
    slot: Slot | None
    form: Target | None
    routes: dict[Any, Any]

    def __init__(
        self,
        target: Target | None,
        factors: Mapping[str, Tensor],
        *,
        strength: float,
        enabled: bool,
        trainable: bool,
        handle: Any,
        slot: Slot | None = None,
        form: Target | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Hold the factors, which must be on ``device``."""
        super().__init__(enabled=enabled, strength=strength, handle=handle)
        vars(self).update(target=target, trainable=trainable, form=form, slot=slot, routes={})
        if form is not None:
            factors = {name: _padded(factors.get(name), shape, device) for name, shape in form.factor_shapes.items()}
            scale = torch.tensor(target.scale if target else 0.0, dtype=torch.float64, device=device)
            self.register_buffer("scale", scale, persistent=False)
        for name, factor in factors.items():
            if trainable:
                self.register_parameter(name, nn.Parameter(factor))
            else:
                self.register_buffer(name, factor)

    def with_state(self: _Part, *, enabled: bool, strength: float) -> _Part:
        """Return such a part; one that leaves its weight alone has no state."""
        return super().with_state(enabled=enabled, strength=strength) if self.target else self

    @property
    def has_training_step(self) -> bool:
        """True if it is trained and of a kind whose layers `loraio.live.training_step` gives a step of their own."""
        return self.target is not None and self.target.kind == "lora" and bool(self._parameters)

    @property
    def held(self) -> dict[str, Any]:
        """The dict that holds the factors."""
        return self._parameters or self._buffers

    def factors(self) -> dict[str, Tensor]:
        """Return the factors by short name, as they are now; without their padding."""
        if self.target is None:
            return {}
        shapes = self.target.factor_shapes
        held = {name: getattr(self, name) for name in shapes}
        if self.form is None:
            return held
        return {name: factor[tuple(map(slice, shapes[name]))].contiguous() for name, factor in held.items()}

    def tensors(self, name: str) -> dict[str, Tensor]:
        return {f"{name}.{short}": factor for short, factor in self.factors().items()}

    def needs_gradients(self, weight: Tensor) -> bool:
        """Return True if the adapted weight must be differentiable: in the base weight or in a factor."""
        wanted = weight.requires_grad or (self.trainable and any(p.requires_grad for p in self.parameters()))
        return wanted and torch.is_grad_enabled()

    def forward(self, weight: Tensor) -> Tensor:
        """Return the adapted weight: shape, dtype and device of ``weight``.

        Outside of compiled graphs `loraio.live.places.Place.read` comes first, which caches.
        """
        if self.slot is not None and torch.compiler.is_compiling() and not _is_exporting():
            return self._compiled(weight, self.slot)
        return self.computed(weight)

    def computed(self, weight: Tensor) -> Tensor:
        """Return the adapted weight; ``weight`` itself where the part lets it through."""
        if self.target is None or not self.enabled:
            return weight
        factors = self.factors()
        if torch.is_grad_enabled() and (weight.requires_grad or any(f.requires_grad for f in factors.values())):
            return self.target.fold_for_training(weight, factors, strength=self.strength)
        return self.target.fold(weight, factors, strength=self.strength)

    def _compiled(self, weight: Tensor, slot: Slot) -> Tensor:
        if not (torch.is_grad_enabled() and (weight.requires_grad or self.trainable)):
            # before anything that would put the adapter into the graph
            return slot.read() if slot.fits(weight) else self.computed(weight)
        if self.form is None or not self.enabled:
            return self.computed(weight)
        exact = torch.promote_types(weight.dtype, torch.float32)
        padded = {name: getattr(self, name) for name in self.form.factor_shapes}
        padded["lora_B"] = padded["lora_B"].to(exact) * self.scale
        return self.form.fold_for_training(weight, padded, strength=self.strength)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FoldedWeight:
        """Move the factors with ``model.to(...)`` and its like, but do not cast them: they are the adapter's own."""
        nn.Module._apply(self, _uncast(fn), recurse)
        if self.slot is not None:
            self.slot.move(fn)
        return self


def _padded(factor: Tensor | None, shape: tuple[int, ...], device: torch.device | None) -> Tensor:
    """Return the factor with zeros behind it; all zeros where there is none."""
    if factor is None:
        return torch.zeros(shape, device=device)
    padded = factor.new_zeros(shape)
    padded[tuple(map(slice, factor.shape))] = factor
    return padded


_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)  # torch 2.6 has none


class GivenTensor(AdapterPart):
    """The parametrization of a tensor that the adapter replaces whole: the base's in, the adapter's own out.

    Running statistics are given as they are, so that a layer in training mode writes to the adapter's and never to the
    base's. Others are cast to the dtype that the base's tensor has.
    """

    def __init__(self, tensor: Tensor, *, statistic: bool, requires_grad: bool, **state: Any) -> None:
        super().__init__(**state)
        self.statistic = statistic
        if not statistic:
            self.given = nn.Parameter(tensor, requires_grad=requires_grad)
        else:
            self.register_buffer("given", tensor)

    def tensors(self, name: str) -> dict[str, Tensor]:
        return {name: self.given}

    def forward(self, base: Tensor) -> Tensor:
        """Return the adapter's tensor; device of ``base``, and its dtype, shape perhaps not."""
        if not self.enabled:
            return base.clone() if self.statistic and self.handle.trainable else base
        return self.given if self.given.dtype == base.dtype else self.given.to(base.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GivenTensor:
        """Move the tensor with ``model.to(...)`` and its like, but cast it only if it is a statistic."""
        nn.Module._apply(self, fn if self.statistic else _uncast(fn), recurse)
        return self


def _uncast(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def moved(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        return result if result.dtype == tensor.dtype else tensor.to(result.device)

    return moved

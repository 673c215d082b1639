"""One adapted tensor on a live module: what it computes, how it gets there, and how the module comes out as it was.

It is a torch parametrization: the base's tensor stays the Parameter or buffer that it was and is never written to, and
``module.weight`` gives the adapted weight to whoever reads it, the layer's own forward included.

Without gradients the adapted weight is computed once and kept, see `loraio.live.weight_cache`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loraio.adapter import Target
from loraio.live.compiled import Adapted, Slot
from loraio.live.weight_cache import STEPS, Kept, Readings, can_be_kept


class AdapterPart(nn.Module):
    """What an adapter puts on one tensor of the base.

    Attributes:
        enabled: whether it takes part; else the base's tensor goes through.
        handle: the `loraio.Attachment` that it belongs to. A deep copy of the model copies it along, so that the copy
            has a handle of its own.
        readings: what was read last of the weights of this model.
    """

    _loraio_part = True  # `loraio.bases.attached.PART_MARK`

    enabled: bool
    handle: Any
    readings: Readings

    def __init__(self, *, handle: Any, readings: Readings) -> None:
        super().__init__()
        vars(self).update(enabled=True, handle=handle, readings=readings)  # each by itself takes a module a while

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The adapter's own tensors as they are now, by their names in files.

        Args:
            name: of the base's tensor.
        """
        raise NotImplementedError


class FoldedWeight(AdapterPart):
    """The parametrization of one weight: base weight in, adapted weight out.

    Without gradients it gives the bits that `loraio.merge` gives. Where a gradient is asked for, from the factors or
    from the base weight, it computes the same in float32, differentiably.

    Attributes:
        target: what the adapter says of the weight; None where it leaves a weight alone that is reserved for others.
        strength: multiplies the scale.
        trainable: whether the factors are Parameters.
        slot: where compiled graphs read the weight from when there are no gradients; None where they fold it.
        form: what compiled graphs know of a target whose factors are padded: its rank is theirs, and its scale 1. The
            padding is zero in A and in B, so that the gradient of either, a product with the other, is zero there.
        routes: what `loraio.live.training_step` found out of the layer's training steps, by the form of their inputs.
    """

    target: Target | None
    strength: float
    trainable: bool
    slot: Slot | None
    form: Target | None
    routes: dict[Any, Any]
    _kept: Kept | None

    def __init__(
        self,
        target: Target | None,
        factors: Mapping[str, Tensor],
        *,
        strength: float,
        trainable: bool,
        handle: Any,
        readings: Readings,
        form: Target | None = None,
    ) -> None:
        super().__init__(handle=handle, readings=readings)
        vars(self).update(target=target, strength=strength, trainable=trainable, form=form)
        vars(self).update(slot=None, routes={}, _kept=None)
        if form is not None:
            factors = {name: _padded(factors.get(name), shape) for name, shape in form.factor_shapes.items()}
            scale = torch.tensor(target.scale if target else 0.0, dtype=torch.float64)
            self.register_buffer("scale", scale, persistent=False)
        for name, factor in factors.items():
            if trainable:
                self.register_parameter(name, nn.Parameter(factor))
            else:
                self.register_buffer(name, factor)

    @property
    def steps_thinly(self) -> bool:
        """Whether it is trained and of a kind whose layers have a training step of their own,
        `loraio.live.training_step`."""
        return self.target is not None and self.target.kind == "lora" and bool(self._parameters)

    @property
    def device(self) -> torch.device | None:
        """Where the factors are that are not trained; None where there are none."""
        for factor in self._buffers.values():
            if factor is not None:
                return factor.device
        return None

    def factors(self) -> dict[str, Tensor]:
        """The factors by short name, as they are now; without their padding."""
        held = self._held()
        if self.form is None or self.target is None:
            return held
        shapes = self.target.factor_shapes
        return {name: factor[tuple(map(slice, shapes[name]))].contiguous() for name, factor in held.items()}

    def _held(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.target.factor_shapes} if self.target else {}

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The factors by their names in files."""
        return {f"{name}.{short}": factor for short, factor in self.factors().items()}

    def forward(self, weight: Tensor) -> Tensor:
        """The adapted weight: shape, dtype and device of ``weight``."""
        if self.slot is not None and torch.compiler.is_compiling() and not _is_exporting():
            graded = torch.is_grad_enabled() and (weight.requires_grad or self.trainable)
            if not graded and self.slot.fits(weight):  # before anything that would put the adapter into the graph
                return self.slot.read()
            if graded and self.form is not None and self.enabled:
                exact = torch.promote_types(weight.dtype, torch.float32)
                padded = {name: getattr(self, name) for name in self.form.factor_shapes}
                padded["lora_B"] = padded["lora_B"].to(exact) * self.scale
                return self.form.fold_for_training(weight, padded, strength=self.strength)
        if self.target is None or not self.enabled:
            return weight
        factors = self.factors()
        if torch.is_grad_enabled() and (weight.requires_grad or any(f.requires_grad for f in factors.values())):
            return self.target.fold_for_training(weight, factors, strength=self.strength)
        if torch.compiler.is_compiling() or not can_be_kept(weight, factors.values()):
            return self.target.fold(weight, factors, strength=self.strength)
        given = self.at_hand(weight)
        if given is None:
            strength = self.strength  # another thread may set it meanwhile
            STEPS.start()
            with torch.inference_mode(False), torch.no_grad():
                folded = self.target.fold(weight.detach(), factors, strength=strength)
                self._kept = kept = Kept(folded, weight, self._held(), strength)
            given = kept.for_use(weight, self._held(), strength)
        return folded if given is None else given

    def at_hand(self, weight: Tensor) -> Tensor | None:
        """The adapted weight, if it was kept and still is what `forward` would compute without gradients."""
        kept = self._kept
        if kept is None or not self.enabled:
            return None
        held: Any = self._parameters or self._buffers
        return kept.for_use(weight, held, self.strength)

    def adapted(self, weight: Tensor) -> Adapted:
        """The adapted weight, or the base's where the adapter is off or leaves it alone; as a `Slot` asks for it."""
        factors = self.factors() if self.enabled else {}
        STEPS.start()
        with torch.inference_mode(False), torch.no_grad():
            base = weight.detach()
            folded = (
                self.target.fold(base, factors, strength=self.strength) if self.target and factors else base.clone()
            )
            if not can_be_kept(weight, factors.values()):
                return folded, lambda _: False
            kept = Kept(folded, weight, self._held(), self.strength)
        held: Any = self._parameters or self._buffers
        return folded, lambda base: kept.is_current(base, held)

    def refresh(self) -> None:
        """Forget the weight that was kept."""
        self._kept = None
        if self.slot is not None:
            self.slot.fill()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FoldedWeight:
        """``model.to(...)`` and its like move the factors, but do not cast them: they are the adapter's own."""
        nn.Module._apply(self, _uncast(fn), recurse)
        if self.slot is not None:
            self.slot.move(fn)
        return self


def _padded(factor: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """The factor with zeros behind it; all zeros where there is none."""
    if factor is None:
        return torch.zeros(shape)
    padded = factor.new_zeros(shape)
    padded[tuple(map(slice, factor.shape))] = factor
    return padded


_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)  # torch 2.6 has none


class GivenTensor(AdapterPart):
    """The parametrization of a tensor that the adapter replaces whole: the base's in, the adapter's own out.

    Running statistics are given as they are, so that a layer in training mode writes to the adapter's and never to the
    base's. Others are cast to what the base's tensor has been cast to.
    """

    def __init__(
        self, tensor: Tensor, *, statistic: bool, requires_grad: bool, handle: Any, readings: Readings
    ) -> None:
        super().__init__(handle=handle, readings=readings)
        self.statistic = statistic
        if not statistic:
            self.given = nn.Parameter(tensor, requires_grad=requires_grad)
        else:
            self.register_buffer("given", tensor)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensor by its name in files."""
        return {name: self.given}

    def forward(self, base: Tensor) -> Tensor:
        """The adapter's tensor; device of ``base``, and its dtype, shape perhaps not."""
        if not self.enabled:
            return base.clone() if self.statistic and self.handle.trainable else base
        return self.given if self.given.dtype == base.dtype else self.given.to(base.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GivenTensor:
        """``model.to(...)`` and its like move the tensor, but cast it only if it is a statistic."""
        nn.Module._apply(self, fn if self.statistic else _uncast(fn), recurse)
        return self


def _uncast(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def moved(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        return result if result.dtype == tensor.dtype else tensor.to(result.device)

    return moved

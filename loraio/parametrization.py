"""One adapted weight on a live module: what it computes, how it gets there, and how the module comes out as it was.

It is a torch parametrization: the base weight stays the Parameter that it was and is never written to, and
``module.weight`` gives the adapted weight to whoever reads it, the layer's own forward included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn.utils import parametrize

from loraio.adapter import Target
from loraio.errors import StateError


class FoldedWeight(nn.Module):
    """The parametrization of one weight: base weight in, adapted weight out.

    Without gradients it gives the bits that `loraio.merge` gives. Where a gradient is asked for, from the factors or
    from the base weight, it computes the same in float32, differentiably.

    Attributes:
        handle: the `loraio.Attachment` that it belongs to. A deep copy of the model copies it along, so that the copy
            has a handle of its own.
    """

    def __init__(
        self, target: Target, factors: Mapping[str, Tensor], *, strength: float, trainable: bool, handle: Any
    ) -> None:
        super().__init__()
        self.target = target
        self.strength = strength
        self.enabled = True
        self.handle = handle
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
        folded = self.target.fold(weight, factors, strength=self.strength)
        if torch.compiler.is_compiling() or (
            weight.dtype == torch.float32 and torch.is_autocast_enabled(weight.device.type)
        ):
            return folded  # autocast keeps its cast of whatever asks for gradients: one for each forward pass
        # torch.matmul folds its batch, and so sums in another order, where the weight asks for gradients, even under
        # no_grad: the folded weight asks for what the base weight asks for, as a merged Parameter would
        return folded.requires_grad_(weight.requires_grad)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FoldedWeight:
        """``model.to(...)`` and its like move the factors, but do not cast them: they are the adapter's own."""

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        nn.Module._apply(self, moved, recurse)
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
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
        """What is on the weight."""
        return cast(FoldedWeight, self.stack[0])

    def put_on(self, folded: FoldedWeight) -> None:
        """Parametrize the weight, which must be a plain Parameter of the right shape."""
        _own_class(self.module)
        # register_parametrization calls weight.set_(weight), which writes nothing but counts as a write
        with _unsafe_preserve_version_counter(cast(Tensor, self.module._parameters[self.parameter])):
            # unsafe: shape and dtype are checked already, and the check would fold every weight once more
            parametrize.register_parametrization(self.module, self.parameter, folded, unsafe=True)
        _own_class(self.module)

    def take_off(self) -> None:
        """Give the module its Parameter back, in its old place among the others."""
        _own_class(self.module)
        parametrize.remove_parametrizations(self.module, self.parameter, leave_parametrized=False)
        parameters = self.module._parameters  # the weight came back behind the bias
        order = [key for key in self.order if key in parameters]
        order += [key for key in parameters if key not in self.order]
        parameters.update({key: parameters.pop(key) for key in order})


def _own_class(module: nn.Module) -> None:
    """Give a parametrized module a class that no other module has, and that refuses to be pickled in our words.

    torch makes such a class when a module is parametrized, but a deep copy of the module shares it: what is put on or
    taken off one of them would come and go on the other.
    """
    if parametrize.is_parametrized(module):
        cls = type(module)
        module.__class__ = type(cls.__name__, cls.__bases__, {**vars(cls), "__getstate__": _refuse_pickling})


def _refuse_pickling(module: nn.Module) -> NoReturn:
    if any(isinstance(part, FoldedWeight) for part in module.modules()):
        raise StateError(
            "a model with an adapter on it cannot be pickled",
            hint="live.detach() first, or save loraio.base_state_dict(model) and loraio.adapter_from(model)",
        )
    raise StateError("a parametrized module cannot be pickled", hint="save its state dict")

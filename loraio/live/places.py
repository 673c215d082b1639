"""How a part of an adapter goes onto a tensor of a module, and how the module comes out as it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from loraio.live.module_classes import give_class
from loraio.live.parametrization import AdapterPart, FoldedWeight
from loraio.live.rollback import Undo
from loraio.live.training_step import forward_for, keep_freed_memory
from loraio.live.weight_cache import reading_key


def parametrization_list(part: AdapterPart, tensor: Tensor) -> parametrize.ParametrizationList:
    """``ParametrizationList([part], tensor, unsafe=True)`` in a sixth of the time, and without its ``set_``.

    Args:
        part: has no right inverse, and keeps shape and dtype.
        tensor: a Parameter or buffer.
    """
    stack = parametrize.ParametrizationList.__new__(parametrize.ParametrizationList)
    nn.ModuleList.__init__(stack)
    stack._modules["0"] = part
    vars(stack).update(unsafe=True, is_tensor=True, ntensors=1)
    if isinstance(tensor, nn.Parameter):
        stack._parameters["original"] = tensor
    else:
        stack._buffers["original"] = tensor
    return stack


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a part of an adapter sits.

    Attributes:
        module: the module.
        parameter: its tensor's name in it, a parameter's or a buffer's.
        order: names of the module's parameters and then of its buffers before anything was put on.
        sizes: attributes of the module that go with the tensor's shape, as (name, value of the base, value now).
    """

    module: nn.Module
    parameter: str
    order: tuple[str, ...]
    sizes: tuple[tuple[str, int, int], ...] = ()

    @property
    def occupied(self) -> bool:
        """Whether the tensor is still parametrized; someone else may have taken everything off."""
        stacks = self.module._modules.get("parametrizations")  # not by attribute: torch looks those up in Python
        return stacks is not None and self.parameter in stacks._modules

    @property
    def stack(self) -> parametrize.ParametrizationList:
        """The parametrizations on the weight; ours is the only one."""
        stacks = cast(nn.ModuleDict, self.module._modules["parametrizations"])
        return cast(parametrize.ParametrizationList, stacks._modules[self.parameter])

    @property
    def base(self) -> Tensor:
        """The base's tensor."""
        stack = self.stack
        return cast(Tensor, stack._parameters.get("original", stack._buffers.get("original")))

    @property
    def part(self) -> AdapterPart:
        """What is on the tensor."""
        return cast(AdapterPart, self.stack._modules["0"])

    def note(self, undo: Undo) -> None:
        """Note all that `put_on` and `take_off` change."""
        undo.note_module(self.module)
        if parametrize.is_parametrized(self.module):
            undo.note_module(cast(nn.ModuleDict, self.module.parametrizations))
        if self.occupied:
            undo.note_module(self.stack)

    def exchange(self, part: AdapterPart, undo: Undo) -> None:
        """Put another part in the place of the one on the tensor, in one step."""
        held = self.stack._modules
        undo.note(held)
        held["0"] = part

    def put_on(self, part: AdapterPart) -> None:
        """Parametrize the tensor, which must be a plain Parameter or buffer.

        As torch's ``register_parametrization`` does, but for the class that the module gets; shape and dtype are
        checked already.
        """
        module, name = self.module, self.parameter
        held = module._parameters if name in module._parameters else module._buffers
        tensor = cast(Tensor, held[name])
        stack = parametrization_list(part, tensor)
        thin = isinstance(part, FoldedWeight) and part.steps_thinly and name == "weight"
        forward = forward_for(type(module)) if thin else None
        names = {*self._parametrized(), name}
        give_class(module, names, forward=forward)
        if len(names) == 1:
            module.parametrizations = nn.ModuleDict()
        del held[name]
        cast(nn.ModuleDict, module.parametrizations)[name] = stack
        if forward is not None:
            keep_freed_memory()
        self.resize(part.enabled)

    def _parametrized(self) -> list[str]:
        """Names of the module's tensors that are."""
        module = self.module
        return list(cast(nn.ModuleDict, module.parametrizations)) if parametrize.is_parametrized(module) else []

    def resize(self, enabled: bool) -> None:
        """Let the module's attributes say the size of the tensor that it has now."""
        for name, base, own in self.sizes:
            setattr(self.module, name, own if enabled else base)

    def take_off(self) -> None:
        """Give the module its own tensor back, in its old place among the others."""
        self.resize(False)
        give_class(self.module, self._parametrized())
        parametrize.remove_parametrizations(self.module, self.parameter, leave_parametrized=False)
        if self._parametrized():
            give_class(self.module, self._parametrized())
        vars(self.module).pop(reading_key(self.parameter), None)
        held: Any
        for held in (self.module._parameters, self.module._buffers):  # the weight came back behind the bias
            order = [key for key in self.order if key in held]
            order += [key for key in held if key not in self.order]
            held.update({key: held.pop(key) for key in order})

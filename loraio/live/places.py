"""Put the parts of an adapter onto the tensors of a model, and give each module its own tensors back.

Forward passes in other threads may run meanwhile. So dicts of modules are replaced, never changed, and in between any
two steps each tensor can be read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from loraio.live.compiled import Slot
from loraio.live.module_classes import parametrized_class, place_key, read_from_tree
from loraio.live.parametrization import AdapterPart, FoldedWeight
from loraio.live.rollback import Rollback
from loraio.live.training_step import forward_for, keep_freed_memory
from loraio.live.weight_cache import CachedWeight


def parametrization_list(part: AdapterPart | None, tensor: Tensor) -> parametrize.ParametrizationList:
    """Make ``ParametrizationList([part], tensor, unsafe=True)`` in a sixth of the time, and without its ``set_``.

    The part has no right inverse and keeps shape and dtype. None stands for one that comes later.
    """
    stack = parametrize.ParametrizationList.__new__(parametrize.ParametrizationList)
    nn.ModuleList.__init__(stack)
    stack._modules["0"] = cast(Any, part)
    vars(stack).update(unsafe=True, is_tensor=True, ntensors=1)
    if isinstance(tensor, nn.Parameter):
        stack._parameters["original"] = tensor
    else:
        stack._buffers["original"] = tensor
    return stack


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """A tensor of the model that adapters are put on.

    Attributes:
        name: of the tensor in the model.
        module: the module that has it.
        parameter: its name in the module, a parameter's or a buffer's.
        order: names of the module's parameters and then of its buffers before anything was put on.
        stack: the parametrizations on it; ours is the only one.
        snapshots: the `loraio.live.snapshots.Snapshots` of the model.
        slot: where compiled graphs read the adapted weight; None where nothing was reserved.
    """

    name: str
    module: nn.Module
    parameter: str
    order: tuple[str, ...]
    stack: parametrize.ParametrizationList
    snapshots: Any
    slot: Slot | None = None

    @property
    def occupied(self) -> bool:
        """True while the tensor is parametrized by us; someone else can take everything off."""
        return self._stacks.get(self.parameter) is self.stack

    @property
    def base(self) -> Tensor:
        """The base's tensor."""
        return cast(Tensor, self.stack._parameters.get("original", self.stack._buffers.get("original")))

    @property
    def part(self) -> AdapterPart:
        """The part that is on the tensor in the module tree."""
        return cast(AdapterPart, self.stack._modules["0"])

    @property
    def _stacks(self) -> dict[str, nn.Module | None]:
        stacks = self.module._modules.get("parametrizations")  # not by attribute: torch looks those up in Python
        return {} if stacks is None else stacks._modules

    def read(self, snapshot: Any) -> Tensor:
        """Return the tensor as the adapter of a snapshot makes it."""
        part: AdapterPart | None = snapshot.parts.get(self.name)
        if part is None:  # the pass began before there was one; the tree can get it at any time
            return self.base
        if not self.occupied or parametrize._cache_enabled or len(self.stack._modules) != 1:
            return read_from_tree(self.module, self.parameter)
        if isinstance(part, FoldedWeight) and not part.needs_gradients(self.base):
            cached: CachedWeight | None = snapshot.cache.weight(self.name, self.stack, part)
            if cached is not None:
                return cached.for_use()
        # not self.stack(): another thread can replace the part there at any time
        return cast(Tensor, part(self.base))

    def put_on(self, part: AdapterPart, rollback: Rollback) -> None:
        """Parametrize the tensor, a plain Parameter or buffer, which stays where it is until `hide_base`.

        As torch's ``register_parametrization`` does, but for the class that the module gets.
        """
        module = self.module
        has_step = isinstance(part, FoldedWeight) and part.has_training_step and self.parameter == "weight"
        forward = forward_for(type(module)) if has_step else None
        self.stack._modules["0"] = part
        rollback.set(vars(module), place_key(self.parameter), self)
        rollback.set_class(module, parametrized_class(module, {*self._stacks, self.parameter}, forward=forward))
        self._set_stacks({**self._stacks, self.parameter: self.stack}, rollback)
        if forward is not None:
            keep_freed_memory()

    def hide_base(self, rollback: Rollback) -> None:
        """Take the base's tensor from among the module's own."""
        for kind in ("_parameters", "_buffers"):
            held = vars(self.module)[kind]
            if self.parameter in held:
                rollback.set(vars(self.module), kind, {key: held[key] for key in held if key != self.parameter})

    def take_off(self, rollback: Rollback) -> None:
        """Give the module its own tensor back, in its old place among the others."""
        module = self.module
        kind = "_parameters" if "original" in self.stack._parameters else "_buffers"
        held = {**vars(module)[kind], self.parameter: self.base}
        order = [*(key for key in self.order if key in held), *(key for key in held if key not in self.order)]
        rollback.set(vars(module), kind, {key: held[key] for key in order})
        left = {key: stack for key, stack in self._stacks.items() if key != self.parameter}
        rollback.set_class(module, parametrized_class(module, left) if left else type(module).__bases__[0])
        self._set_stacks(left, rollback)
        rollback.remove(vars(module), place_key(self.parameter))

    def _set_stacks(self, stacks: dict[str, nn.Module | None], rollback: Rollback) -> None:
        module = self.module
        present = module._modules.get("parametrizations")
        if present is not None and stacks:
            rollback.set(vars(present), "_modules", stacks)
            return
        others = {key: child for key, child in module._modules.items() if key != "parametrizations"}
        if stacks:
            others["parametrizations"] = nn.ModuleDict(cast(Any, stacks))
        rollback.set(vars(module), "_modules", others)

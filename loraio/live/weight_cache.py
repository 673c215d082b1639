"""Adapted weights that were computed once are used again, while all that they were computed from is the same.

That is: base weight and factors in the same memory, to which nothing was written since, at the same strength. Writes
are noticed by torch's count of them (``tensor._version``), which every in-place operation raises, under ``no_grad``
too. Steps of fused optimizers do not raise it, so that the steps of all optimizers are counted besides. Writes through
``tensor.data``, a NumPy view or a raw pointer are not seen.

A forward pass looks at all weights together when it begins, and in front of each layer only at that layer's base weight
once more: there the processor has forgotten whatever the layer before had no use for, and each place in memory that is
looked at takes longer than a look at all of them in a row. What is written to factors from within a pass is noticed by
the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter, getitem, is_, itemgetter
from threading import get_ident
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.utils import parametrize
from torch.optim.optimizer import register_optimizer_step_post_hook


class Steps:
    """Counts the steps of all of torch's optimizers, from the first weight that is kept on."""

    def __init__(self) -> None:
        self.count = 0
        self._hook: Any = None

    def start(self) -> None:
        """Count from now on."""
        if self._hook is None:
            self._hook = register_optimizer_step_post_hook(self._add)

    def _add(self, *_: Any) -> None:
        self.count += 1


STEPS = Steps()


class Kept:
    """An adapted weight, and what it was computed from."""

    def __init__(self, folded: Tensor, weight: Tensor, factors: Mapping[str, Tensor], strength: float) -> None:
        self._weight, self._pointer, self._writes = weight, weight.data_ptr(), weight._version
        self._strides, self._strength, self._steps = weight.stride(), strength, STEPS.count
        self._factors = [(name, factor, factor.data_ptr(), factor._version) for name, factor in factors.items()]
        # keep the memory from being given to another tensor: an address then stands for one memory
        self._aliases = [source.detach() for source in (weight, *factors.values())]
        self._folded = folded
        # torch.matmul folds its batch, and so sums in another order, where the weight asks for gradients, even under
        # no_grad: the folded weight asks for what the base weight asks for, as a merged Parameter would
        self._asking = folded.detach().requires_grad_()
        self._folded_writes = folded._version
        if folded.is_cuda:  # another thread may use it on another stream
            torch.cuda.current_stream(folded.device).synchronize()

    def is_current(self, weight: Tensor, held: Mapping[str, Tensor | None]) -> bool:
        """Whether weight and factors are those that it was computed from, and nobody wrote to them."""
        if (
            weight is not self._weight
            or weight._version != self._writes
            or self._steps != STEPS.count
            or weight.data_ptr() != self._pointer
            or weight.stride() != self._strides
        ):
            return False
        for name, factor, pointer, writes in self._factors:
            if held.get(name) is not factor or factor._version != writes or factor.data_ptr() != pointer:
                return False
        return True

    def for_use(self, weight: Tensor, held: Mapping[str, Tensor | None], strength: float) -> Tensor | None:
        """The adapted weight; None where it is no longer what these would give.

        Args:
            weight: the base weight.
            held: what holds the factors by name, among others.
            strength: asked for.
        """
        if strength != self._strength or self._folded._version != self._folded_writes:  # somebody wrote to it
            return None
        if not self.is_current(weight, held):
            return None
        if not weight.requires_grad or (
            # autocast keeps its cast of whatever asks for gradients: one for each forward pass
            weight.dtype == torch.float32 and torch.is_autocast_enabled(weight.device.type)
        ):
            return self._folded
        return self._asking

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # a copy of the model computes its own


def can_be_kept(weight: Tensor, factors: Iterable[Tensor]) -> bool:
    """Whether the tensors have memory whose writes are counted, and nothing looks on: no transform, no mode."""
    return (
        type(weight) in (Tensor, nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(weight)
        and torch._C._len_torch_dispatch_stack() == 0
        and not weight.is_meta
        and not any(tensor.is_inference() for tensor in (weight, *factors))
    )


class Readings:
    """The last readings of all weights of a model.

    Attributes:
        passes: the threads that are in a forward pass, and whether all readings were found to hold when it began.
    """

    def __init__(self) -> None:
        self.passes: dict[int, bool] = {}
        self._last: dict[tuple[int, str], Reading] = {}
        self._sight: _Sight | None = None  # of all of them

    def look(self) -> bool:
        """Drop those that do not hold; whether that was looked at: it need not be where none is asked for."""
        if torch.is_grad_enabled() or not _nobody_looks_on():
            return False
        sight = self._sight or _Sight(list(self._last.values()))
        if not sight.holds():
            for key, reading in list(self._last.items()):
                if not reading.holds():
                    reading.drop()
                    self._last.pop(key, None)
            sight = _Sight(list(self._last.values()))
        self._sight = sight
        return True

    def add(self, reading: Reading) -> None:
        """Let the weight be read so from now on."""
        vars(reading.module)[reading.key] = self._last[id(reading.module), reading.key] = reading
        self._sight = None

    def forget(self) -> None:
        """Drop all readings: something is about to change."""
        for reading in list(self._last.values()):
            reading.drop()
        self._last.clear()
        self._sight = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Readings:
        memo[id(self)] = twin = Readings()  # a copy of the model reads by itself
        return twin


class Reading:
    """The answer to the last reading of a weight.

    Attributes:
        module: whose weight it is.
        key: name of the module's attribute in which this lies.
        given: the answer; None where there was none.
        given_writes: its count of writes; somebody may write to what was read.
        passes: as in `Readings`.
        stack: of parametrizations on the weight.
        part: ours, the only one on it.
        state: what decides about the part.
        factors: name, tensor and count of writes of each.
        weight: of the base.
        writes, pointer, asks: its count of writes, address, and whether it asks for gradients.
        steps: how many steps optimizers had made.
    """

    __slots__ = (
        "asks",
        "factors",
        "given",
        "given_writes",
        "key",
        "module",
        "part",
        "passes",
        "pointer",
        "stack",
        "state",
        "steps",
        "weight",
        "writes",
    )

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.key = module, reading_key(name)
        self.stack: Any = vars(module)["_modules"]["parametrizations"]._modules[name]
        self.part: Any = self.stack._modules["0"]
        self.weight: Tensor = self.stack._parameters["original"]
        self.passes: dict[int, bool] = self.part.readings.passes
        # all of this before it is asked: what changes from here on is noticed
        self.steps, self.state = STEPS.count, _STATE(vars(self.part))
        self.writes, self.pointer, self.asks = self.weight._version, self.weight.data_ptr(), self.weight.requires_grad
        self.factors = [
            (name, tensor, tensor._version) for name, tensor in self.part._buffers.items() if tensor is not None
        ]
        self.given: Tensor | None = self.part.at_hand(self.weight)
        self.given_writes = 0 if self.given is None else self.given._version

    def holds(self) -> bool:
        """Whether it still is the answer; `_Sight` asks the same of many."""
        stack, part, weight = self.stack, self.part, self.weight
        return (
            stack._parameters.get("original") is weight
            and len(stack._modules) == 1
            and stack._modules.get("0") is part
            and weight._version == self.writes
            and weight.data_ptr() == self.pointer
            and weight.requires_grad == self.asks
            and _STATE(vars(part)) == self.state
            and STEPS.count == self.steps
            and all(part._buffers.get(name) is factor and factor._version == n for name, factor, n in self.factors)
            and not (self.asks and torch.is_autocast_enabled(weight.device.type))
            and _nobody_looks_on()
        )

    def drop(self) -> None:
        """Let the weight be read anew."""
        vars(self.module).pop(self.key, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # a copy of the model finds its own


class _Sight:
    """Everything that must be the same for some readings to hold.

    What it does not look at are the addresses of factors, which are buffers here and as such never given other memory
    by torch. Each loop is one call: a network has a hundred weights and factors.
    """

    def __init__(self, readings: list[Reading]) -> None:
        factors = [(reading.part._buffers, *factor) for reading in readings for factor in reading.factors]
        self._weights = [reading.weight for reading in readings]
        self._tensors = [*self._weights, *(tensor for _, _, tensor, _ in factors)]
        self._writes = [*(reading.writes for reading in readings), *(writes for *_, writes in factors)]
        self._stacks = [reading.stack._modules for reading in readings]
        self._parts = [reading.part for reading in readings]
        self._values = [*self._tensors, *self._parts]
        self._dicts = [reading.stack._parameters for reading in readings]
        self._dicts += [*(held for held, *_ in factors), *self._stacks]
        self._keys = ["original"] * len(readings) + [name for _, name, *_ in factors] + ["0"] * len(readings)
        self._asking = [reading.asks for reading in readings]
        self._devices = {reading.weight.device.type for reading in readings if reading.asks}
        self._steps = {reading.steps for reading in readings}
        self._pointers = [reading.pointer for reading in readings]
        self._attributes = list(map(vars, self._parts))
        self._states = [reading.state for reading in readings]

    def holds(self) -> bool:
        """Whether all is the same."""
        try:
            return (
                all(map(is_, map(getitem, self._dicts, self._keys), self._values))
                and list(map(_WRITES, self._tensors)) == self._writes
                and list(map(Tensor.data_ptr, self._weights)) == self._pointers
                and list(map(_ASKS, self._weights)) == self._asking
                and list(map(_STATE, self._attributes)) == self._states
                and all(map((1).__eq__, map(len, self._stacks)))
                and self._steps <= {STEPS.count}
                and not any(map(torch.is_autocast_enabled, self._devices))
                and _nobody_looks_on()
            )
        except KeyError:  # somebody has taken something off
            return False


_WRITES, _ASKS, _STATE = attrgetter("_version"), attrgetter("requires_grad"), itemgetter("_kept", "strength", "enabled")


def reading_key(name: str) -> str:
    """Name of a module's attribute for the last reading of a weight, given the weight's name."""
    return f"_loraio_read_{name}"


def reader(name: str, usual: Callable[[nn.Module], Tensor]) -> Callable[[nn.Module], Tensor]:
    """The getter of a parametrized weight: what is kept is given at once, the rest goes through the usual getter.

    That takes three module calls and as many lookups of submodules, which on a small layer is longer than the layer.

    Args:
        name: of the weight.
        usual: the one for everything else.
    """
    key = reading_key(name)

    def read(module: nn.Module) -> Tensor:
        if torch.is_grad_enabled() or is_compiling():
            return usual(module)
        reading: Reading | None = vars(module).get(key)
        if reading is not None and reading.module is module:  # and not a replica's
            given = cast(Tensor, reading.given)
            if given._version == reading.given_writes and (
                reading.weight._version == reading.writes if reading.passes.get(get_ident()) else reading.holds()
            ):
                return given
        return _read_anew(module, name, usual)

    read._loraio = True  # type: ignore[attr-defined]
    return read


def _read_anew(module: nn.Module, name: str, usual: Callable[[nn.Module], Tensor]) -> Tensor:
    """The weight by a reading that the next ones can repeat, where there can be such."""
    stacks = module._modules.get("parametrizations")
    stack: Any = None if stacks is None else stacks._modules.get(name)
    part: Any = None if stack is None or len(stack._modules) > 1 else stack._modules["0"]
    # whole tensors have no such method, nor has what is not ours; replicas of torch.nn.DataParallel have no Parameters
    if not hasattr(part, "at_hand") or "original" not in stack._parameters or not _nobody_looks_on():
        return usual(module)
    if part.trainable:
        given: Tensor | None = part.at_hand(stack._parameters["original"])
        return usual(module) if given is None else given
    reading = Reading(module, name)
    if reading.given is None:
        return usual(module)
    part.readings.add(reading)
    return reading.given


def _nobody_looks_on() -> bool:
    """Whether nothing of torch's has a say in what is read in this thread."""
    return not (parametrize._cache_enabled or torch._C._len_torch_dispatch_stack())

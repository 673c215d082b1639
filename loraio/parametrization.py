"""One adapted tensor on a live module: what it computes, how it gets there, and how the module comes out as it was.

It is a torch parametrization: the base's tensor stays the Parameter or buffer that it was and is never written to, and
``module.weight`` gives the adapted weight to whoever reads it, the layer's own forward included.

Without gradients the adapted weight is computed once and kept. It is used again while what it was computed from is the
same: base weight and factors in the same memory, to which nothing was written since, at the same strength. Writes are
noticed by torch's count of them (``tensor._version``), which every in-place operation raises, under ``no_grad`` too.
Steps of fused optimizers do not raise it, so that the steps of all optimizers are counted besides. Writes through
``tensor.data``, a NumPy view or a raw pointer are not seen.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.compiler import is_compiling
from torch.nn.utils import parametrize
from torch.optim.optimizer import register_optimizer_step_post_hook

from loraio.adapter import Target
from loraio.backward import forward_for, keep_freed_memory
from loraio.errors import StateError
from loraio.slots import Adapted, Slot
from loraio.undoing import Undo


class AdapterPart(nn.Module):
    """What an adapter puts on one tensor of the base.

    Attributes:
        enabled: whether it takes part; else the base's tensor goes through.
        handle: the `loraio.Attachment` that it belongs to. A deep copy of the model copies it along, so that the copy
            has a handle of its own.
        ready: the weight as it was read last, for the next reading.
    """

    def __init__(self, *, handle: Any) -> None:
        super().__init__()
        self.enabled = True
        self.handle = handle
        self.ready: _Ready | None = None

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
        routes: what `loraio.backward` found out of the layer's training steps, by the form of their inputs.
    """

    def __init__(
        self,
        target: Target | None,
        factors: Mapping[str, Tensor],
        *,
        strength: float,
        trainable: bool,
        handle: Any,
        form: Target | None = None,
    ) -> None:
        super().__init__(handle=handle)
        self.target = target
        self.strength = strength
        self.trainable = trainable
        self.slot: Slot | None = None
        self.form = form
        self.routes: dict[Any, Any] = {}
        self._kept: _Kept | None = None
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
        """Whether it is trained and of a kind whose layers have a training step of their own, `loraio.backward`."""
        return self.target is not None and self.target.kind == "lora" and bool(self._parameters)

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
        if torch.compiler.is_compiling() or not _can_be_kept(weight, factors.values()):
            return self.target.fold(weight, factors, strength=self.strength)
        given = self.at_hand(weight)
        if given is None:
            strength = self.strength  # another thread may set it meanwhile
            _STEPS.start()
            with torch.inference_mode(False), torch.no_grad():
                folded = self.target.fold(weight.detach(), factors, strength=strength)
                self._kept = kept = _Kept(folded, weight, self._held(), strength)
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
        _STEPS.start()
        with torch.inference_mode(False), torch.no_grad():
            base = weight.detach()
            folded = (
                self.target.fold(base, factors, strength=self.strength) if self.target and factors else base.clone()
            )
            if not _can_be_kept(weight, factors.values()):
                return folded, lambda _: False
            kept = _Kept(folded, weight, self._held(), self.strength)
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


class _Steps:
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


_STEPS = _Steps()


class _Kept:
    """An adapted weight, and what it was computed from."""

    def __init__(self, folded: Tensor, weight: Tensor, factors: Mapping[str, Tensor], strength: float) -> None:
        self._weight, self._pointer, self._writes = weight, weight.data_ptr(), weight._version
        self._strides, self._strength, self._steps = weight.stride(), strength, _STEPS.count
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
            or self._steps != _STEPS.count
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


def _padded(factor: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """The factor with zeros behind it; all zeros where there is none."""
    if factor is None:
        return torch.zeros(shape)
    padded = factor.new_zeros(shape)
    padded[tuple(map(slice, factor.shape))] = factor
    return padded


_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)  # torch 2.6 has none


def _can_be_kept(weight: Tensor, factors: Iterable[Tensor]) -> bool:
    """Whether the tensors have memory whose writes are counted, and nothing looks on: no transform, no mode."""
    return (
        type(weight) in (Tensor, nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(weight)
        and torch._C._len_torch_dispatch_stack() == 0
        and not weight.is_meta
        and not any(tensor.is_inference() for tensor in (weight, *factors))
    )


class GivenTensor(AdapterPart):
    """The parametrization of a tensor that the adapter replaces whole: the base's in, the adapter's own out.

    Running statistics are given as they are, so that a layer in training mode writes to the adapter's and never to the
    base's. Others are cast to what the base's tensor has been cast to.
    """

    def __init__(self, tensor: Tensor, *, statistic: bool, requires_grad: bool, handle: Any) -> None:
        super().__init__(handle=handle)
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
        return parametrize.is_parametrized(self.module, self.parameter)

    @property
    def stack(self) -> parametrize.ParametrizationList:
        """The parametrizations on the weight; ours is the only one."""
        stacks = cast(nn.ModuleDict, self.module.parametrizations)
        return cast(parametrize.ParametrizationList, stacks[self.parameter])

    @property
    def part(self) -> AdapterPart:
        """What is on the tensor."""
        return cast(AdapterPart, self.stack[0])

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
        """Parametrize the tensor, which must be a plain Parameter or buffer."""
        _own_class(self.module)
        tensor = getattr(self.module, self.parameter)
        # register_parametrization calls weight.set_(weight), which writes nothing but counts as a write
        with _unsafe_preserve_version_counter(tensor):
            # unsafe: shape and dtype are checked already, and the check would fold every weight once more
            parametrize.register_parametrization(self.module, self.parameter, part, unsafe=True)
        _own_class(self.module)
        if isinstance(part, FoldedWeight) and part.steps_thinly and self.parameter == "weight":
            forward = forward_for(type(self.module))
            if forward is not None:
                setattr(type(self.module), "forward", forward)  # noqa: B010  # the class is this module's alone
                keep_freed_memory()
        self.resize(part.enabled)

    def resize(self, enabled: bool) -> None:
        """Let the module's attributes say the size of the tensor that it has now."""
        for name, base, own in self.sizes:
            setattr(self.module, name, own if enabled else base)

    def take_off(self) -> None:
        """Give the module its own tensor back, in its old place among the others."""
        self.resize(False)
        _own_class(self.module)
        parametrize.remove_parametrizations(self.module, self.parameter, leave_parametrized=False)
        held: Any
        for held in (self.module._parameters, self.module._buffers):  # the weight came back behind the bias
            order = [key for key in self.order if key in held]
            order += [key for key in held if key not in self.order]
            held.update({key: held.pop(key) for key in order})


def freeze_statistics(module: nn.Module) -> None:
    """Let a layer compute as in eval mode, whatever its mode is set to, and leave its running statistics alone.

    It gets a class of its own whose ``training`` is always False; what the flag is set to is kept for afterwards.
    """
    module.__class__ = _frozen_class(type(module))


def release_statistics(module: nn.Module) -> None:
    """Undo `freeze_statistics`: the layer follows its mode again, as it was set last."""
    module.__class__ = class_beneath(type(module), _FROZEN)


def mode_of(module: nn.Module) -> bool:
    """Training mode as it was set last, also where `freeze_statistics` hides it."""
    mode: bool = vars(module)["training"]
    return mode


_FROZEN = "_loraio_frozen"
"""In a class, the sign of one that `freeze_statistics` made."""


def _frozen_class(cls: type[nn.Module]) -> type[nn.Module]:
    def training(module: nn.Module) -> bool:
        return False

    def remember(module: nn.Module, mode: bool) -> None:
        vars(module)["training"] = mode

    own: dict[str, Any] = {
        "training": property(training, remember),
        "__deepcopy__": copied_with_its_class,
        "__getstate__": refuse_pickling,
        _FROZEN: True,
    }
    forward = forward_for(cls)
    if forward is not None:
        own["forward"] = forward
    return type(cls.__name__, (cls,), own)


def class_beneath(cls: type[nn.Module], mark: str) -> type[nn.Module]:
    """The class without one of ours that bears a mark, which is on top or, under a parametrization, further down."""
    if mark in vars(cls):
        return cast(type[nn.Module], cls.__bases__[0])
    if not hasattr(cls, mark):
        return cls
    return type(cls.__name__, tuple(class_beneath(base, mark) for base in cls.__bases__), dict(vars(cls)))


def copied_with_its_class(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy without ``__getstate__``, which `refuse_pickling` is."""
    replica: nn.Module = module.__new__(type(module))
    memo[id(module)] = replica
    replica.__dict__ = copy.deepcopy(module.__dict__, memo)
    return replica


def _own_class(module: nn.Module) -> None:
    """Give a parametrized module a class that no other module has, and that refuses to be pickled in our words.

    torch makes such a class when a module is parametrized, but a deep copy of the module shares it: what is put on or
    taken off one of them would come and go on the other.
    """
    if parametrize.is_parametrized(module):
        cls = type(module)
        own = {**vars(cls), "__getstate__": refuse_pickling}
        for name in cast(nn.ModuleDict, module.parametrizations):
            if isinstance(own[name].fget, types.FunctionType) and not hasattr(own[name].fget, "_loraio"):
                own[name] = property(_reader(name, own[name].fget), own[name].fset)
        module.__class__ = type(cls.__name__, cls.__bases__, own)


def _reader(name: str, usual: Callable[[nn.Module], Tensor]) -> Callable[[nn.Module], Tensor]:
    """The getter of a parametrized weight: what is kept is given at once, the rest goes through torch's own getter.

    torch's takes three module calls and as many lookups of submodules, which on a small layer is longer than the layer.
    """

    def read(module: nn.Module) -> Tensor:
        if torch.is_grad_enabled() or is_compiling() or parametrize._cache_enabled:
            return usual(module)
        stack = vars(module)["_modules"]["parametrizations"]._modules[name]
        part = stack._modules["0"]
        if type(part) is not FoldedWeight or len(stack._modules) > 1:
            return usual(module)
        ready = part.ready
        if ready is not None:
            for held, key, tensor, writes in ready.sources:
                if held.get(key) is not tensor or tensor._version != writes:
                    break
            else:
                if ready.holds(part):
                    return ready.given
        given = None if torch._C._len_torch_dispatch_stack() else part.at_hand(stack._parameters["original"])
        if given is None:
            return usual(module)
        if not part.trainable:
            part.ready = _Ready(stack, part, given)
        return given

    read._loraio = True  # type: ignore[attr-defined]
    return read


class _Ready:
    """The answer to the last reading of a weight, and all that must be the same for it to be the answer again.

    It is asked before each layer of a network, when the processor has forgotten whatever the last layer had no use for:
    it takes fewer steps, and looks at fewer things, than `_Kept` does. What it does not look at are the addresses of
    factors, which are buffers here and as such never given other memory by torch.

    Attributes:
        given: the answer.
        sources: a dict, a key, the tensor that must be there and its count of writes: of base weight and factors.
    """

    __slots__ = ("_asking", "_device", "_kept", "_pointer", "_steps", "_strength", "_writes", "given", "sources")

    def __init__(self, stack: Any, part: FoldedWeight, given: Tensor) -> None:
        weight: Tensor = stack._parameters["original"]
        held: dict[str, Any] = part._buffers
        self.given = given
        self.sources: list[tuple[dict[str, Any], str, Tensor, int]] = [
            (stack._parameters, "original", weight, weight._version),
            *((held, name, factor, factor._version) for name, factor in held.items()),
        ]
        self._kept, self._strength, self._steps = part._kept, part.strength, _STEPS.count
        self._pointer, self._writes, self._asking = weight.data_ptr(), given._version, given.requires_grad
        self._device = weight.device.type

    def holds(self, part: FoldedWeight) -> bool:
        """Whether all the rest is the same too."""
        weight = self.sources[0][2]
        return (
            part.enabled
            and part._kept is self._kept
            and part.strength == self._strength
            and _STEPS.count == self._steps
            and weight.data_ptr() == self._pointer
            and self.given._version == self._writes
            and weight.requires_grad == self._asking
            and not torch.is_autocast_enabled(self._device)
            and not torch._C._len_torch_dispatch_stack()
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # a copy of the model finds its own


def refuse_pickling(module: nn.Module) -> NoReturn:
    """Say what to do instead; as ``__getstate__``."""
    if hasattr(module, _FROZEN) or any(isinstance(part, AdapterPart) for part in module.modules()):
        raise StateError(
            "a model with an adapter on it cannot be pickled",
            hint="live.detach() first, or save loraio.base_state_dict(model) and loraio.adapter_from(model)",
        )
    raise StateError("a parametrized module cannot be pickled", hint="save its state dict")

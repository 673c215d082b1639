"""The classes that modules have while an adapter is on them, made once for all modules of a class.

To the interpreter each class is one more place to look for attributes: layers that share theirs are called faster, and
an adapter goes on faster, than where each has a class of its own, as torch makes them for parametrized modules.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, MutableMapping
from threading import get_ident
from typing import Any, NoReturn, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.utils import parametrize

from loraio.bases.attached import carries_adapter
from loraio.errors import StateError
from loraio.live.training_step import forward_for

FROZEN = "_loraio_frozen"
"""In a class, the sign of one whose ``training`` is always False."""

_Class = type[nn.Module]


class _Common(type):
    """The class of classes that several modules have.

    Whoever parametrizes another tensor of such a module by torch's own functions, or takes a parametrization off, puts
    a property into the class or takes one out, and means that module alone. So the properties are such that they count
    only for modules in which the tensor is parametrized, and they stay.
    """

    def __setattr__(cls, name: str, value: Any) -> None:
        from_torch = isinstance(value, property) and getattr(value.fget, "__module__", "") == parametrize.__name__
        super().__setattr__(name, _computed(name) if from_torch else value)

    def __delattr__(cls, name: str) -> None:
        if not isinstance(vars(cls).get(name), property):
            super().__delattr__(name)


def parametrized_class(
    module: nn.Module, names: Iterable[str], *, forward: Callable[..., Any] | None = None
) -> type[nn.Module]:
    """Return the class that a module needs to have these tensors parametrized.

    Args:
        module: the module, parametrized already or not.
        names: of the tensors.
        forward: in the place of the class's own; None leaves what is there.
    """
    cls = type(module)
    plain = cls
    if parametrize.is_parametrized(module):
        plain = cls.__bases__[0]
        forward = forward or vars(cls).get("forward")
        if not isinstance(cls, _Common):  # torch's; a deep copy of the module shares it
            names = {*names, *cast(nn.ModuleDict, module.parametrizations)}
    return _parametrized(plain, names, forward)


def _parametrized(cls: _Class, names: Iterable[str], forward: Callable[..., Any] | None) -> _Class:
    key = cls, tuple(sorted(set(names))), forward
    made = _PARAMETRIZED.get(key)
    if made is None:
        own: dict[str, Any] = {name: _computed(name) for name in key[1]}
        own["__getstate__"] = refuse_pickling
        if not hasattr(cls, "__deepcopy__"):
            own["__deepcopy__"] = copied_with_its_class
        if forward is not None:
            own["forward"] = forward
        made = _PARAMETRIZED[key] = cast(_Class, _Common(f"Parametrized{cls.__name__}", (cls,), own))
    return made


def place_key(name: str) -> str:
    """Return the name of a module's attribute that holds the `loraio.live.places.Place` of a tensor."""
    return f"_loraio_place_{name}"


def _computed(name: str) -> property:
    """Make the property for a tensor: computed where it is parametrized, and else as in any module."""
    key = place_key(name)

    def read(module: Any) -> Tensor:
        place = None if is_compiling() else vars(module).get(key)
        # a replica of torch.nn.DataParallel has the place of the module that it was made of
        if place is None or place.module is not module:
            return read_from_tree(module, name)
        running = place.snapshots.running.get(get_ident())
        if running is None:
            return cast(Tensor, place.read(place.snapshots.current))
        cached = running.weights and running.weights.get(place.name)
        # of what was checked when the pass began only this is checked again
        if (
            cached
            and cached.weight._version == cached.version
            and cached.given._version == cached.given_version
            and not torch.is_grad_enabled()
        ):
            return cast(Tensor, cached.given)
        return cast(Tensor, place.read(running.snapshot))

    def assign(module: Any, value: Tensor) -> None:
        stack = _stack(module, name)
        if stack is None:
            vars(module)[name] = value
        else:
            stack.right_inverse(value)

    return property(read, assign)


def read_from_tree(module: Any, name: str) -> Tensor:
    """Return a tensor as the module tree has it now."""
    stack = _stack(module, name)
    if stack is None:
        if name in vars(module):
            return cast(Tensor, vars(module)[name])
        try:
            return cast(Tensor, module.__getattr__(name))
        except AttributeError:  # another thread can have parametrized it just now
            stack = _stack(module, name)
            if stack is None:
                raise
    if not parametrize._cache_enabled:
        return cast(Tensor, stack())
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError("a model cannot be traced while parametrizations are cached")
    cache: MutableMapping[Any, Any] = parametrize._cache
    key = id(module), name
    if key not in cache:
        cache[key] = stack()
    return cast(Tensor, cache[key])


def _stack(module: nn.Module, name: str) -> Any:
    stacks: Any = module._modules.get("parametrizations")
    return None if stacks is None else stacks._modules.get(name)


def frozen_class(cls: _Class) -> _Class:
    """Return a class whose layers compute as in eval mode, whatever their mode, and leave running statistics alone.

    It goes on top of the layer's own; its ``training`` is always False, and what the flag is set to is stored.
    """
    made = _FROZEN.get(cls)
    if made is None:
        own: dict[str, Any] = {
            "training": property(_never, _remember),
            "__deepcopy__": copied_with_its_class,
            "__getstate__": refuse_pickling,
            FROZEN: True,
        }
        forward = forward_for(cls)
        if forward is not None:
            own["forward"] = forward
        made = _FROZEN[cls] = type(cls.__name__, (cls,), own)
    return made


def mode_of(module: nn.Module) -> bool:
    """Training mode as it was set last, also where `frozen_class` hides it."""
    mode: bool = vars(module)["training"]
    return mode


def _never(module: nn.Module) -> bool:
    return False


def _remember(module: nn.Module, mode: bool) -> None:
    vars(module)["training"] = mode


def class_beneath(cls: _Class, mark: str) -> _Class:
    """The class without one of ours that bears a mark, which is on top or, under a parametrization, further down."""
    if mark in vars(cls):
        return cls.__bases__[0]
    if not hasattr(cls, mark):
        return cls
    beneath = [class_beneath(base, mark) for base in cls.__bases__]
    if isinstance(cls, _Common):
        names = [name for name, value in vars(cls).items() if isinstance(value, property)]
        return _parametrized(beneath[0], names, vars(cls).get("forward"))
    return type(cls.__name__, tuple(beneath), dict(vars(cls)))


def copied_with_its_class(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy without ``__getstate__``, which `refuse_pickling` is."""
    replica: nn.Module = module.__new__(type(module))
    memo[id(module)] = replica
    replica.__dict__ = copy.deepcopy(module.__dict__, memo)
    return replica


def refuse_pickling(module: nn.Module) -> NoReturn:
    """Say what to do instead; as ``__getstate__``."""
    if hasattr(module, FROZEN) or carries_adapter(module):
        raise StateError(
            "a model with an adapter on it cannot be pickled",
            hint="live.detach() first, or save loraio.base_state_dict(model) and loraio.adapter_from(model)",
        )
    raise StateError("a parametrized module cannot be pickled", hint="save its state dict")


_PARAMETRIZED: WeakValueDictionary[Any, _Class] = WeakValueDictionary()
_FROZEN: WeakValueDictionary[_Class, _Class] = WeakValueDictionary()

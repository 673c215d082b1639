"""Make the classes that modules have while an adapter is on them, once for all modules of a class.

Torch gives each parametrized module a class of its own. Layers that share one are called faster, since the interpreter
caches lookups by class, and an adapter goes on faster.
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
"""Mark of a class whose ``training`` is always False."""

_Class = type[nn.Module]


class _Common(type):
    """The metaclass of classes that several modules share.

    Torch's own functions put a property into the class when they parametrize another tensor of such a module, and take
    it out again, but mean that module alone. So the properties here have an effect only on modules in which the tensor
    is parametrized, and they stay.
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
    """Return the class that a module needs to have the tensors ``names`` parametrized, some already or not.

    ``forward`` replaces the class's own.
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
        own.update(_copying(cls))
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
        if name in module.__dict__:
            return cast(Tensor, module.__dict__[name])
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


def class_on_top(cls: _Class, mark: str, **own: Any) -> _Class:
    """Return a class with attributes of its own on top of ``cls``; all modules of ``cls`` share it.

    `class_beneath` finds it by the attribute ``mark``. All calls with one mark give the same attributes.
    """
    made = _ON_TOP.get((cls, mark))
    if made is None:
        made = _ON_TOP[cls, mark] = type(cls.__name__, (cls,), {**own, **_copying(cls), mark: True})
    return made


def _copying(cls: _Class) -> dict[str, Any]:
    own: dict[str, Any] = {"__getstate__": refuse_pickling}
    return own if hasattr(cls, "__deepcopy__") else {**own, "__deepcopy__": _copied_with_its_class}


def frozen_class(cls: _Class) -> _Class:
    """Return a class whose layers compute as in eval mode, in either mode, and leave running statistics alone.

    Its ``training`` is always False; the value that the flag is set to is stored.
    """
    forward = forward_for(cls)
    own = {} if forward is None else {"forward": forward}
    training = property(lambda module: False, lambda module, mode: vars(module).update(training=mode))
    return class_on_top(cls, FROZEN, training=training, **own)


def mode_of(module: nn.Module) -> bool:
    """Return the training mode as it was set last, also where `frozen_class` hides it."""
    mode: bool = vars(module)["training"]
    return mode


def class_beneath(cls: _Class, mark: str) -> _Class:
    """Return the class without the one that has a mark, which can lie below a class of a parametrization."""
    if mark in vars(cls):
        return cls.__bases__[0]
    if not hasattr(cls, mark):
        return cls
    beneath = [class_beneath(base, mark) for base in cls.__bases__]
    if isinstance(cls, _Common):
        names = [name for name, value in vars(cls).items() if isinstance(value, property)]
        return _parametrized(beneath[0], names, vars(cls).get("forward"))
    return type(cls.__name__, tuple(beneath), dict(vars(cls)))


def _copied_with_its_class(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Make a deep copy without ``__getstate__``, which is `refuse_pickling`."""
    replica: nn.Module = module.__new__(type(module))
    memo[id(module)] = replica
    replica.__dict__ = copy.deepcopy(module.__dict__, memo)
    return replica


def refuse_pickling(module: nn.Module) -> NoReturn:
    """Refuse to be pickled: the ``__getstate__`` of our classes."""
    if hasattr(module, FROZEN) or carries_adapter(module):
        raise StateError(
            "a model with an adapter on it cannot be pickled",
            hint="live.detach() first, or save loraio.base_state_dict(model) and loraio.adapter_from(model)",
        )
    raise StateError("a parametrized module cannot be pickled", hint="save its state dict")


_PARAMETRIZED: WeakValueDictionary[Any, _Class] = WeakValueDictionary()
_ON_TOP: WeakValueDictionary[tuple[_Class, str], _Class] = WeakValueDictionary()

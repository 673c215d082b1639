"""Whether a model is still what it was: the same modules with the same tensors, to which nothing was written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from operator import is_, methodcaller
from typing import Any

import torch
from torch import Tensor, nn

SAMPLED = 64
"""How many numbers of a tensor are compared besides torch's own count of writes."""


class Watch:
    """A model as it is now, in a form that is quick to compare with what it is later.

    The same are: the modules, by identity; their parameters and buffers, by identity; of each of these the memory, the
    count of writes that torch keeps and up to `SAMPLED` numbers. What `loraio.bases.identity.BaseIdentity` says of
    writes
    that torch does not count holds here too.

    Args:
        model: the model.
        besides: tells which modules do not belong to it and may come and go.
    """

    def __init__(self, model: nn.Module, besides: Callable[[nn.Module], bool]) -> None:
        self._held: list[Mapping[str, Any]] = []
        tensors: list[Tensor] = []
        for module in model.modules():
            if besides(module):
                continue
            for held in (module._parameters, module._buffers):
                self._held.append(held)
                tensors += [tensor for tensor in held.values() if tensor is not None]
            if not any(child is not None and besides(child) for child in module._modules.values()):
                self._held.append(module._modules)
        self._objects = list(self._objects_now())
        self._lengths = list(map(len, self._held))
        self._tensors = tensors
        self._can_tell = not any(t.is_inference() or t.is_meta or not is_dense(t) for t in tensors)
        if self._can_tell:
            self._marks = self._marks_now()
            groups: dict[Any, list[Tensor]] = {}
            for tensor in tensors:
                if tensor.numel():
                    groups.setdefault((tensor.dtype, tensor.device), []).append(sampled(tensor))
            self._samples = [(views, torch.cat(views)) for views in groups.values()]

    def same(self) -> bool:
        """Whether nothing has changed; False also where that cannot be told."""
        return (
            self._can_tell
            and list(map(len, self._held)) == self._lengths
            and all(map(is_, self._objects_now(), self._objects))
            and self._marks_now() == self._marks
            and all(torch.cat(views).equal(was) for views, was in self._samples)
        )

    def _objects_now(self) -> Iterable[Any]:
        """All modules, parameters and buffers."""
        return chain.from_iterable(map(_values, self._held))

    def _marks_now(self) -> list[tuple[int, int]]:
        """Of each tensor its address and how often it was written to."""
        return [(tensor.data_ptr(), tensor._version) for tensor in self._tensors]


class Glance:
    """A model's tensors as they are now, without holding on to the model.

    For who remembers something of a model for as long as that lives: a module may be the model itself, or refer to it.
    The same are: the names and classes of the modules; the names of their parameters and buffers; of each of these the
    address, shape, strides, dtype, device and count of writes, and some numbers. Their memory is held on to, so that no
    other tensor can come to lie in its place.

    Args:
        modules: by path, under every path that they have.
        state: the model's state dict. Where it has tensors of another origin, nothing can be told.
    """

    def __init__(self, modules: Mapping[str, nn.Module], state: Mapping[str, Tensor]) -> None:
        self._marks = _marks(modules)
        tensors = [] if self._marks is None else [tensor.detach() for tensor in _tensors(modules)]
        places = {tensor.data_ptr() for tensor in tensors if not tensor.is_meta}
        own = all(isinstance(tensor, Tensor) and tensor.data_ptr() in places for tensor in state.values())
        self._can_tell = own and all(map(is_dense, tensors))
        groups: dict[Any, list[Tensor]] = {}
        for tensor in tensors if self._can_tell else ():
            if tensor.numel():
                groups.setdefault((tensor.dtype, tensor.device), []).append(sampled(tensor))
        self._samples = [(views, torch.cat(views)) for views in groups.values()]

    def same(self, modules: Mapping[str, nn.Module]) -> bool:
        """Whether nothing has changed; False also where that cannot be told.

        Args:
            modules: of the model as it is now.
        """
        return (
            self._can_tell
            and _marks(modules) == self._marks
            and all(torch.cat(views).equal(was) for views, was in self._samples)
        )


def _marks(modules: Mapping[str, nn.Module]) -> list[Any] | None:
    """What must be the same for a model's tensors to be; None where one of them cannot be told from another."""
    marks: list[Any] = []
    for path, module in modules.items():
        marks += [path, type(module)]
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    marks.append(name)
                elif type(tensor) not in _PLAIN or tensor.is_inference():
                    return None
                else:
                    form = tensor.dtype, tensor.device, tensor.shape, tensor.stride()
                    marks += (name, tensor.data_ptr(), tensor._version, form)
    return marks


def _tensors(modules: Mapping[str, nn.Module]) -> list[Tensor]:
    held = [tensors for module in modules.values() for tensors in (module._parameters, module._buffers)]
    return [tensor for tensors in held for tensor in tensors.values() if tensor is not None]


_PLAIN = (Tensor, nn.Parameter)

_values = methodcaller("values")


def sampled(tensor: Tensor) -> Tensor:
    """Up to `SAMPLED` numbers, evenly spaced; a view wherever the tensor's memory has no holes."""
    plain = tensor.detach()
    count = plain.numel()
    step = -(-count // SAMPLED) or 1
    if count and is_dense(plain):
        return plain.as_strided((-(-count // step),), (step,))
    return plain.reshape(-1)[::step]


def writes_to(tensor: Tensor) -> int:
    """Torch's count of writes to a tensor; 0 for one made in inference mode."""
    return 0 if tensor.is_inference() else tensor._version  # inference tensors are not counted, nor are they trained


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's memory has no holes, in whatever order its dimensions lie."""
    if tensor.layout != torch.strided:
        return False
    count = tensor.numel()
    return (
        not count or sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) == count - 1
    )

"""Marks of tensors and of models, to tell later if any tensor was written to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_, methodcaller
from typing import Any

import torch
from torch import Tensor, nn

SAMPLED = 64
"""How many numbers of each tensor a mark compares, besides the version counter."""


class TensorMark:
    """Tensors as they are now, to be compared with tensors of a later time.

    A tensor is unchanged while its address, strides and version counter (``Tensor._version``) are the same, and up to
    `SAMPLED` numbers, evenly spaced over it, compare equal. The mark holds on to the memory, so that no other tensor
    can get the same address.

    The version counter misses writes through ``.data``, NumPy views, DLPack, other processes and
    ``_unsafe_preserve_version_counter``. The numbers catch those that change a whole tensor, anything in a tensor of
    at most `SAMPLED` numbers, and any numel / `SAMPLED` neighbours in a larger one.

    Tensors without a version counter (inference mode), without values (meta) or with holes in their memory cannot be
    compared: a mark of one of those never holds.
    """

    __slots__ = ("_addresses", "_can_tell", "_forms", "_samples", "_strides", "_versions")

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._can_tell = all(map(_can_tell, tensors))
        if self._can_tell:
            self._note(tensors)
            groups: dict[Any, list[Tensor]] = {}
            for tensor in tensors:
                groups.setdefault((tensor.dtype, tensor.device), []).append(sampled(tensor))
            self._samples = [(views, torch.cat(views)) for views in groups.values()]

    @classmethod
    def each(cls, tensors: Sequence[Tensor]) -> list[TensorMark]:
        """Return a mark for each tensor; the numbers of all of them are copied together."""
        marks = [cls.__new__(cls) for _ in tensors]
        groups: dict[Any, list[tuple[TensorMark, Tensor]]] = {}
        for mark, tensor in zip(marks, tensors, strict=True):
            mark._can_tell = _can_tell(tensor)
            if mark._can_tell:
                mark._note([tensor])
                groups.setdefault((tensor.dtype, tensor.device), []).append((mark, sampled(tensor)))
        for group in groups.values():
            views = [view for _, view in group]
            for (mark, view), numbers in zip(group, torch.cat(views).split(list(map(len, views))), strict=True):
                mark._samples = [([view], numbers)]
        return marks

    def unwritten(self, tensors: Sequence[Tensor]) -> bool:
        """Return True if nobody wrote to the tensors; they must be the very objects that were marked."""
        return (
            self._can_tell
            and list(map(_VERSION, tensors)) == self._versions
            and list(map(Tensor.data_ptr, tensors)) == self._addresses
            and list(map(Tensor.stride, tensors)) == self._strides
            and all(_joined(views).equal(numbers) for views, numbers in self._samples)
        )

    def same(self, tensors: Sequence[Tensor]) -> bool:
        """Return True if the tensors, any objects, have the memory, form and values of those that were marked."""
        return (
            self._can_tell
            and not any(map(Tensor.is_inference, tensors))
            and list(map(_FORM, tensors)) == self._forms
            and self.unwritten(tensors)
        )

    def _note(self, tensors: Sequence[Tensor]) -> None:
        self._versions = list(map(_VERSION, tensors))
        self._addresses = list(map(Tensor.data_ptr, tensors))
        self._strides = list(map(Tensor.stride, tensors))
        self._forms = list(map(_FORM, tensors))


class ModelMark:
    """A model as it is now, in a form that is quick to compare with the model later.

    Unchanged means: the same objects as modules, parameters and buffers, and the tensors as `TensorMark` compares them.

    Args:
        model: the model; the mark keeps it alive.
        besides: tells which modules do not belong to it and may come and go.
    """

    def __init__(self, model: nn.Module, besides: Callable[[nn.Module], bool]) -> None:
        self._held: list[Mapping[str, Any]] = []
        own = [module for module in model.modules() if not besides(module)]
        for module in own:
            self._held += (module._parameters, module._buffers)
            if not any(child is not None and besides(child) for child in module._modules.values()):
                self._held.append(module._modules)
        self._objects = list(self._objects_now())
        self._lengths = list(map(len, self._held))
        self._tensors = _tensors(own)
        self._mark = TensorMark(self._tensors)

    def unchanged(self) -> bool:
        """Return True if nothing has changed; False also where that cannot be told."""
        return (
            list(map(len, self._held)) == self._lengths
            and all(map(is_, self._objects_now(), self._objects))
            and self._mark.unwritten(self._tensors)
        )

    def _objects_now(self) -> Iterable[Any]:
        return chain.from_iterable(map(_VALUES, self._held))


def _tensors(modules: Iterable[nn.Module]) -> list[Tensor]:
    held = (tensors for module in modules for tensors in (module._parameters, module._buffers))
    return [tensor for tensors in held for tensor in tensors.values() if tensor is not None]


def _can_tell(tensor: Tensor) -> bool:
    return not (tensor.is_inference() or tensor.is_meta) and is_dense(tensor)


def _joined(views: list[Tensor]) -> Tensor:
    return views[0] if len(views) == 1 else torch.cat(views)


_VALUES, _VERSION, _FORM = methodcaller("values"), attrgetter("_version"), attrgetter("shape", "dtype", "device")


def sampled(tensor: Tensor) -> Tensor:
    """Return a view of up to `SAMPLED` evenly spaced numbers of a dense tensor."""
    plain = tensor.detach()
    count = plain.numel()
    step = -(-count // SAMPLED) or 1
    return plain.as_strided((-(-count // step),), (step,))


def version_of(tensor: Tensor) -> int:
    """Return a tensor's version counter; 0 for one made in inference mode, which has none."""
    return 0 if tensor.is_inference() else tensor._version


def is_dense(tensor: Tensor) -> bool:
    """Return True if a tensor's memory has no holes, whatever the order of its dimensions."""
    if tensor.layout != torch.strided:
        return False
    if tensor.is_contiguous():
        return True
    extent = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return extent == tensor.numel() - 1

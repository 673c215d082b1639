"""Adapted weights as inputs of compiled graphs: a swap compiles nothing anew, and no graph uses a stale weight.

A graph that folds a weight holds the rank and the scale of its adapter. A graph that reads the weight from a slot holds
its shape alone: each forward pass takes the tensor that lies there then. Whatever the handle does puts another tensor
there and never writes to the one before, which a pass in another thread may be reading.

What happens past the handle, such as a write to a base weight, is noticed by an operator that stands in the graph in
front of each use. It compares counts of writes, as an eager forward pass does, and takes microseconds. It is declared
to write to the tensor, so that no compiler moves it behind the use or reuses the memory; it writes only where the
weight is no longer what it would be.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Adapted = tuple[Tensor, Callable[[Tensor], bool]]
"""An adapted weight in memory of its own, and a function that tells for the base weight whether it is so still."""


class Slot:
    """Where compiled graphs read one adapted weight from.

    Attributes:
        tensor: the adapted weight, of the base weight's shape, dtype, device and strides.
        token: a number by which a graph knows the slot.
    """

    def __init__(self, stack: Any) -> None:
        """Fill it.

        Args:
            stack: the weight's ``ParametrizationList``. What is on top has a method ``adapted(base) -> Adapted``.
        """
        _define_operator()
        self._stack = stack
        self.token = next(_TOKENS)
        _SLOTS[self.token] = self
        self.fill()

    def fill(self) -> Tensor:
        """Compute the weight and put it in the place of the one before."""
        adapted: Adapted = self._stack[0].adapted(self._stack.original)
        self.tensor, self._is_current = adapted
        return adapted[0]

    def fits(self, base: Tensor) -> bool:
        """Whether what lies here is of the base weight's form: someone may have assigned another one."""
        mine = self.tensor
        return (
            mine.dtype == base.dtype
            and mine.device == base.device
            and mine.shape == base.shape
            and mine.stride() == base.stride()
        )

    def read(self) -> Tensor:
        """The weight as it is when the graph runs; traced."""
        tensor = self.tensor
        torch.ops.loraio.refresh.default(tensor, self.token)
        return tensor

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow the base weight to another device or dtype; what lies here is computed anew before its next use."""
        self.tensor, self._is_current = fn(self.tensor), _never

    def refresh(self, tensor: Tensor) -> None:
        """Write to a tensor that was read from here what it would be now, if it is no longer so."""
        if not self._is_current(self._stack.original):
            tensor.copy_(self.fill())

    def __deepcopy__(self, memo: dict[int, Any]) -> Slot:
        """A copy of the model has slots of its own."""
        twin = Slot.__new__(Slot)
        memo[id(self)] = twin
        twin.token = next(_TOKENS)
        twin.tensor, twin._is_current = self.tensor.clone(), _never
        twin._stack = copy.deepcopy(self._stack, memo)
        _SLOTS[twin.token] = twin
        return twin


def _never(base: Tensor) -> bool:
    return False


_TOKENS = itertools.count(1)
_SLOTS: weakref.WeakValueDictionary[int, Slot] = weakref.WeakValueDictionary()
_LIBRARY: list[torch.library.Library] = []


def _define_operator() -> None:
    """``torch.ops.loraio.refresh``, once."""
    if _LIBRARY:
        return
    library = torch.library.Library("loraio", "DEF")
    tags = [torch.Tag.pt2_compliant_tag]
    if hasattr(torch.Tag, "cudagraph_unsafe"):  # a graph that is replayed would compare nothing
        tags.append(torch.Tag.cudagraph_unsafe)
    library.define("refresh(Tensor(a!) weight, int slot) -> ()", tags=tags)
    library.impl("refresh", _refresh, "CompositeExplicitAutograd")
    torch.library.register_fake("loraio::refresh", _pretend, lib=library)
    _LIBRARY.append(library)


def _refresh(weight: Tensor, slot: int) -> None:
    _SLOTS[slot].refresh(weight)


def _pretend(weight: Tensor, slot: int) -> None:
    """What the operator does to tensors without memory."""

"""Forward passes and changes take turns: a pass runs on the model before a change or after it, never in its midst.

The model is given a class of its own whose ``forward`` announces that a pass is on its way. A change waits for those
that are, and they wait for it; neither holds up its own kind for longer than that. Any number of passes run at a time.

What is not held back:

- passes of a part of the model that is called by itself, and backward passes: a layer that is computed again in them
  (``torch.utils.checkpoint``) takes the weight that is there by then;
- programs of ``torch.compile`` and ``torch.export``, in which nothing of this is left: put a lock of your own around
  them and the handle;
- a model whose instance has a ``forward`` attribute, which goes before its class's;
- steps of an optimizer and writes to weights past the handle.

A pass that waits for another thread's pass of the same model can wait for ever, since a change that came between
them lets no new one begin.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from threading import get_ident
from typing import Any, ParamSpec, TypeVar

from torch import nn
from torch.compiler import is_compiling

from loraio.errors import StateError
from loraio.parametrization import class_beneath, copied_with_its_class, refuse_pickling
from loraio.undoing import Undo

_P = ParamSpec("_P")
_T = TypeVar("_T")

_MARK = "_loraio_sharing"
"""Name of the model's attribute, and in the model's own class the sign of it."""


class Sharing:
    """Who may use a model now: passes together, or one change alone."""

    def __init__(self) -> None:
        self._passes: dict[int, None] = {}  # threads with a pass on its way
        self._changing = False
        self._turn: Any = threading.RLock()  # of changes
        self._left = threading.Event()

    def during(self, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """What ``work(*args, **kwargs)`` gives, as a pass; inside of another one of the thread it is a part of that."""
        me = get_ident()
        passes = self._passes
        if me in passes:
            return work(*args, **kwargs)
        try:
            passes[me] = None  # a change sets its flag and then looks here: one of both sees the other
            if self._changing:
                self._wait(me)
            return work(*args, **kwargs)
        finally:
            passes.pop(me, None)
            if self._changing:
                self._left.set()

    def _wait(self, me: int) -> None:
        del self._passes[me]
        self._left.set()
        with self._turn:
            self._passes[me] = None  # before the next change has its turn

    def change(self, check: Callable[[], None], apply: Callable[[Undo], None]) -> None:
        """Make a change when no pass is on its way; all of it or, when an exception comes, none.

        Args:
            check: runs first, beside passes; raises where there is to be no change.
            apply: makes it, and notes everything that it is about to change.

        Raises:
            StateError: this thread is inside of a forward pass.
        """
        if get_ident() in self._passes:
            raise StateError(
                "the adapter cannot be changed from within a forward pass of the model",
                hint="change it between two passes",
            )
        undo = Undo()
        try:
            self._turn.acquire()
            check()
            self._alone()
            apply(undo)
            self._changing = False
            self._turn.release()
        except BaseException:
            if undo.noted:
                if not self._turn._is_owned():  # the exception came when all was done
                    self._turn.acquire()
                self._alone()
                undo.run()
            if self._turn._is_owned():
                self._changing = False
                self._turn.release()
            raise

    def _alone(self) -> None:
        """Let no pass begin, and wait for those on their way."""
        self._changing = True
        while self._passes:
            self._left.clear()
            if self._passes:
                self._left.wait()

    def __deepcopy__(self, memo: dict[int, Any]) -> Sharing:
        memo[id(self)] = twin = Sharing()
        return twin


def share(model: nn.Module, undo: Undo) -> Sharing:
    """Let the model's forward passes be held back by changes.

    Returns:
        what holds them back; a deep copy of the model has its own.
    """
    undo.note_module(model)
    vars(model)[_MARK] = sharing = Sharing()
    model.__class__ = _sharing_class(type(model))
    return sharing


def unshare(model: nn.Module, undo: Undo) -> None:
    """Undo `share`."""
    undo.note_module(model)
    model.__class__ = class_beneath(type(model), _MARK)
    vars(model).pop(_MARK, None)


def _sharing_class(cls: type[nn.Module]) -> type[nn.Module]:
    usual = cls.forward

    @functools.wraps(usual)
    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            return usual(module, *args, **kwargs)
        sharing: Sharing | None = vars(module).get(_MARK)
        if sharing is None:  # a copy that was made without its attributes
            return usual(module, *args, **kwargs)
        return sharing.during(usual, module, *args, **kwargs)

    own: dict[str, Any] = {"forward": forward, "__getstate__": refuse_pickling, _MARK: True}
    if not hasattr(cls, "__deepcopy__"):
        own["__deepcopy__"] = copied_with_its_class
    return type(cls.__name__, (cls,), own)

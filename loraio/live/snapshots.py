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

import copy
import functools
import sys
import threading
from collections.abc import Callable
from threading import get_ident
from typing import Any, ParamSpec, TypeVar

from torch import nn
from torch.compiler import is_compiling

from loraio.errors import StateError
from loraio.live.module_classes import class_beneath, copied_with_its_class, refuse_pickling
from loraio.live.rollback import Undo
from loraio.live.weight_cache import Readings

_P = ParamSpec("_P")
_T = TypeVar("_T")

_MARK = "_loraio_sharing"
"""Name of the model's attribute, and in the model's own class the sign of it."""


class Sharing:
    """Who may use a model now: passes together, or one change alone.

    A change that comes to its end lets in whoever waited for it, before the next one can begin.

    Attributes:
        readings: of the model's weights, which passes look at when they begin and changes drop.
    """

    def __init__(self) -> None:
        self.readings = Readings()
        self._passes = self.readings.passes  # threads with a pass on its way
        self._waiting: dict[int, bool] = {}  # threads that want to begin one
        self._over: threading.Event | None = None  # set when the change that is on its way is over
        self._left = threading.Event()  # set when the last pass has come to its end
        self._turn: Any = threading.RLock()  # of changes
        self._doors = threading.Lock()  # of what changes and waiting passes say to each other

    def during(self, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """What ``work(*args, **kwargs)`` gives, as a pass; inside of another one of the thread it is a part of that."""
        me = get_ident()
        passes = self._passes
        if me in passes:
            return work(*args, **kwargs)
        try:
            passes[me] = False  # a change says that it comes and then looks here: one of both sees the other
            if self._over is not None:
                self._wait(me)
            passes[me] = self.readings.look()
            return work(*args, **kwargs)
        finally:
            passes.pop(me, None)
            if self._over is not None and not passes:
                self._left.set()

    def _wait(self, me: int) -> None:
        """Take back that there is a pass, until the change lets it in."""
        while True:
            with self._doors:
                over = self._over
                if over is None or self._turn._is_owned():  # a pass that belongs to the change
                    return
                self._passes.pop(me, None)
                self._waiting[me] = False
                if not self._passes:
                    self._left.set()
            try:
                over.wait()
            finally:
                with self._doors:
                    let_in = me not in self._waiting
                    self._waiting.pop(me, None)
            if let_in:
                return
            self._passes[me] = False

    def change(self, apply: Callable[[Undo], None]) -> None:
        """Make a change when no pass is on its way; all of it or, when an exception comes, none.

        No pass runs while it is looked whether the change can be made, either: on the way from one torch operation to
        the next, a thread gets the interpreter back from others that want it after milliseconds only.

        Args:
            apply: makes it, and notes everything that it is about to change.

        Raises:
            StateError: this thread is inside of a forward pass.
        """
        self._refuse_inside()
        undo = Undo()
        try:
            self._turn.acquire()
            self._close()
            self.readings.forget()
            apply(undo)
            self._open()
            self._turn.release()
        except BaseException:
            if undo.noted:
                if not self._turn._is_owned():  # the exception came when all was done
                    self._turn.acquire()
                self._close()
                undo.run()
            if self._turn._is_owned():
                self._open()
                self._turn.release()
            raise

    def _refuse_inside(self) -> None:
        """Refuse a change that would wait for its own thread's pass."""
        if get_ident() not in self._passes:
            return
        frame = sys._getframe()
        while frame.f_back is not None:
            frame = frame.f_back
            if frame.f_code is Sharing.during.__code__ and frame.f_locals["self"] is self:
                raise StateError(
                    "the adapter cannot be changed from within a forward pass of the model",
                    hint="change it between two passes",
                )
        del self._passes[get_ident()]  # an exception came when the pass was about to say that it is over

    def _close(self) -> None:
        """Let no pass begin, and wait for those on their way."""
        with self._doors:
            if self._over is None or self._over.is_set():
                self._over = threading.Event()
        while self._passes:
            self._left.clear()
            if self._passes:
                self._left.wait()

    def _open(self) -> None:
        """Let passes begin, first of all those that are waiting."""
        with self._doors:
            if self._over is not None:
                self._over.set()
                self._passes.update(self._waiting)
                self._waiting.clear()
                self._over = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Sharing:
        memo[id(self)] = twin = Sharing()
        twin.readings = copy.deepcopy(self.readings, memo)
        twin._passes = twin.readings.passes
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


def beside_changes(model: nn.Module, work: Callable[[nn.Module], _T]) -> _T:
    """What ``work(model)`` gives when no change of the model is on its way."""
    sharing: Sharing | None = vars(model).get(_MARK)
    return work(model) if sharing is None else sharing.during(work, model)


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

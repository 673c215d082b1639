"""Let each forward pass see one adapter whole, while other threads change it (read-copy-update).

An adapter on a model is one immutable `Snapshot`. A pass takes the current snapshot when it begins and uses
it to its end. A change builds the next snapshot, checks it, and publishes it by one assignment. So passes never wait,
and a change neither waits for passes nor disturbs them. An exception before the assignment leaves the old snapshot.

Two changes wait for the passes that run when they are made, though not for later ones: `Attachment.detach`, and a swap
that adapts a tensor which no adapter of this attachment has adapted before. They alter the classes of modules, which
each pass looks up anew. A pass that waits for such a change in another thread waits for ever.

Changes wait for each other. A forked child gets a lock of its own, and takes back the change that another thread of
the parent was in the middle of.

A snapshot is not taken by:

- parts of the model that are called by themselves, and layers that a backward pass computes again
  (``torch.utils.checkpoint``): each weight is the current one;
- programs of ``torch.compile`` and ``torch.export``: put a lock of your own around them and the handle;
- a model whose instance has a ``forward`` attribute, which goes before its class's;
- steps of an optimizer and writes to weights past the handle, which every later pass sees.
"""

from __future__ import annotations

import copy
import functools
import os
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any, ParamSpec, TypeVar

from torch import Tensor, nn
from torch.compiler import is_compiling

from loraio.adapter import Adapter
from loraio.errors import StateError
from loraio.live.module_classes import class_beneath, class_on_top
from loraio.live.parametrization import AdapterPart
from loraio.live.places import Place
from loraio.live.rollback import Rollback
from loraio.live.weight_cache import CachedWeight, WeightCache

_P = ParamSpec("_P")
_T = TypeVar("_T")

_MARK = "_loraio_snapshots"
"""Name of the attribute of a model that holds its `Snapshots`, and mark of the class it has meanwhile."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Snapshot:
    """An adapter on a model, as passes see it. Nothing in it is replaced; its tensors can be trained.

    Attributes:
        adapter: the adapter, with its tensors as they came.
        strength: multiplies the adapter's scale.
        enabled: False lets the base through.
        places: where parts sit on the model, by the tensor's name; empty when the adapter is detached.
        parts: the part on each of these.
        cache: adapted weights that passes have computed from the parts.
        learned: after a detach, the adapter's own tensors by name, and the base's tensors that training changed.
    """

    adapter: Adapter
    strength: float
    enabled: bool = True
    places: Mapping[str, Place] = field(default_factory=dict)
    parts: Mapping[str, AdapterPart] = field(default_factory=dict)
    cache: WeightCache = field(default_factory=WeightCache)
    learned: tuple[Mapping[str, Tensor], list[str]] | None = None

    def show(self, rollback: Rollback) -> None:
        """Put the parts into the module tree: state dicts, copies and compiled graphs find them there."""
        for name, place in self.places.items():
            if place.part is not self.parts[name]:
                rollback.set(place.stack._modules, "0", self.parts[name])
            if place.slot is not None and place.slot.part is not self.parts[name]:
                place.slot.put(self.adapted(place), rollback)

    def adapted(self, place: Place) -> CachedWeight | None:
        """Return the adapted weight for a place; None where it cannot be cached."""
        return self.cache.weight(place.name, place.stack, self.parts[place.name])


class Pass:
    """A forward pass on its way: its snapshot, and the adapted weights that were valid when it began."""

    __slots__ = ("snapshot", "weights")

    snapshot: Snapshot
    weights: Mapping[str, CachedWeight] | None


class Snapshots:
    """The snapshots of one model: the current one, those that passes use, and how the next one comes.

    Attributes:
        current: what the next pass takes.
        running: the passes on their way, by thread.
    """

    def __init__(self, first: Snapshot) -> None:
        self.current = first
        self.running: dict[int, Pass] = {}
        self._changes = threading.RLock()
        self._changing: tuple[int, Rollback, Snapshot] | None = None
        self._pass_ended: threading.Event | None = None  # there only while a change waits for passes
        _reset_in_children().add(self)

    def run(self, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Call ``work`` as a forward pass. Within another pass of this thread it belongs to that one."""
        me, running = get_ident(), self.running
        if me in running and self._is_inside():
            return work(*args, **kwargs)
        try:
            # first let changes see the pass, then take the snapshot: whoever waits for passes may have published it
            running[me] = this = Pass()
            this.snapshot = self.current
            this.weights = this.snapshot.cache.valid_weights()
            return work(*args, **kwargs)
        finally:
            running.pop(me, None)
            if self._pass_ended is not None:
                self._pass_ended.set()

    def change(self, make: Callable[[Snapshot, Rollback], Snapshot]) -> None:
        """Publish the next snapshot; when an exception comes, everything is as it was.

        Args:
            make: builds it from the current one, and makes every step on the model by the `Rollback`.

        Raises:
            StateError: this thread is inside of a forward pass.
        """
        if self._is_inside():
            raise StateError(
                "the adapter cannot be changed from within a forward pass of the model",
                hint="change it between two passes",
            )
        rollback = Rollback()
        before = after = None
        try:
            with self._changes:
                before = self.current
                try:
                    self._changing = get_ident(), rollback, before
                    after = make(before, rollback)
                    after.show(rollback)
                    self.current = after
                    self._changing = None
                except BaseException:
                    self._take_back(rollback, before)
                    raise
        except BaseException:
            with self._changes:  # the exception can come after the lock was released
                if before is not None and after is self.current:
                    self._take_back(rollback, before)
            raise

    def _take_back(self, rollback: Rollback, before: Snapshot) -> None:
        rollback.run()
        self.current = before
        self._changing = None

    def wait_for_passes(self) -> None:
        """Wait until the passes that run now have ended; others may begin meanwhile."""
        self._pass_ended = ended = threading.Event()
        try:
            running = dict(self.running)
            while any(self.running.get(thread) is this for thread, this in running.items()):
                ended.wait()
                ended.clear()
        finally:
            self._pass_ended = None

    def _is_inside(self) -> bool:
        """Return True if this thread is in a pass. An exception can keep a pass from saying that it has ended."""
        if get_ident() not in self.running:
            return False
        frame = sys._getframe(1)
        while frame.f_back is not None:
            frame = frame.f_back
            if frame.f_code is Snapshots.run.__code__ and frame.f_locals["self"] is self:
                return True
        del self.running[get_ident()]
        return False

    def _reset(self) -> None:
        """Forget the parent's other threads, in a forked child."""
        me = get_ident()
        for thread in [thread for thread in self.running if thread != me]:
            del self.running[thread]
        self._changes = threading.RLock()
        self._pass_ended = None
        if self._changing is not None and self._changing[0] != me:
            self._take_back(*self._changing[1:])

    def __deepcopy__(self, memo: dict[int, Any]) -> Snapshots:
        memo[id(self)] = twin = Snapshots(self.current)
        twin.current = copy.deepcopy(self.current, memo)
        return twin


@functools.cache
def _reset_in_children() -> weakref.WeakSet[Snapshots]:
    """Return the objects that every forked child resets."""
    found: weakref.WeakSet[Snapshots] = weakref.WeakSet()
    if hasattr(os, "register_at_fork"):

        def reset() -> None:
            for snapshots in list(found):
                snapshots._reset()

        os.register_at_fork(after_in_child=reset)
    return found


def take_snapshots(model: nn.Module, snapshots: Snapshots, rollback: Rollback) -> None:
    """Let each of the model's forward passes take a snapshot. A deep copy of the model has its own."""
    rollback.set(vars(model), _MARK, snapshots)
    rollback.set_class(model, class_on_top(type(model), _MARK, forward=_passing(type(model).forward)))


def take_no_snapshots(model: nn.Module, rollback: Rollback) -> None:
    """Undo `take_snapshots`."""
    rollback.set_class(model, class_beneath(type(model), _MARK))
    rollback.remove(vars(model), _MARK)


def _passing(usual: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(usual)
    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        snapshots: Snapshots | None = None if is_compiling() else vars(module).get(_MARK)
        if snapshots is None:  # a copy may have been made without its attributes
            return usual(module, *args, **kwargs)
        return snapshots.run(usual, module, *args, **kwargs)

    return forward

"""Turn signals that end a program into exceptions, so that open files are closed and half-written ones removed."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

WORDS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "hung up"}
"""The signals, if the system has them, and the word for each."""

PATIENCE = 3.0
"""Seconds after a signal in which further ones are ignored, so that none of them stops the cleaning up. A later one is
obeyed: the exception of the first may have been caught somewhere."""


class Stopped(KeyboardInterrupt):
    """A signal came. Code that handles Ctrl-C handles this too."""


class Signals:
    """The signal that came, if any."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._since = 0.0

    @contextlib.contextmanager
    def obeyed(self, *, to_the_end: bool) -> Iterator[None]:
        """Raise `Stopped` when a signal comes, while the block runs.

        Handlers of other code stay, and ignored signals stay ignored: a background job of a shell ignores Ctrl-C, and
        nohup ignores SIGHUP.

        Args:
            to_the_end: the process ends after the block, so further signals are ignored and leave no traceback.
        """
        before = {}
        if threading.current_thread() is threading.main_thread():  # Python sets no handlers in others
            numbers = [getattr(signal, name) for name in WORDS if hasattr(signal, name)]
            before = {number: signal.getsignal(number) for number in numbers}
        mine = [number for number, handler in before.items() if handler in (signal.SIG_DFL, signal.default_int_handler)]
        try:
            for number in mine:
                signal.signal(number, self._obey)
            yield
        finally:
            for number in mine:
                after = signal.SIG_DFL if self.number is None else signal.SIG_IGN
                signal.signal(number, after if to_the_end else before[number])

    def _obey(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.number is None or now - self._since > PATIENCE:
            self.number, self._since = number, now
            raise Stopped

    @property
    def word(self) -> str:
        """The word for the signal; without one it was Ctrl-C."""
        return WORDS[signal.Signals(self.number or signal.SIGINT).name]

    @property
    def code(self) -> int:
        """The exit code that shells use."""
        return 128 + (self.number or signal.SIGINT)

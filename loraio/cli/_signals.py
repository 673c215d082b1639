"""Signals that end a program, turned into an orderly end: what is open is unwound, what is half written is removed."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

WORDS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "hung up"}
"""The signals, as far as the system has them, and what is said of each."""

PATIENCE = 3.0
"""Seconds after a signal in which others are passed over, so that none of them stops the clearing up. One that comes
later is obeyed: the first may have got lost in a place where exceptions are."""


class Stopped(KeyboardInterrupt):
    """A signal came. Those who know about ctrl-C treat it as that."""


class Signals:
    """The signal that came, if one did."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._since = 0.0

    @contextlib.contextmanager
    def obeyed(self, *, to_the_end: bool) -> Iterator[None]:
        """Raise `Stopped` when a signal comes, while the block runs.

        Handlers of somebody else stay, and so does what is ignored: a job in the background of a shell is born to
        ignore ctrl-C, and nohup ignores SIGHUP.

        Args:
            to_the_end: the process ends after the block. Further signals then do no harm, nor leave a traceback.
        """
        before = {}
        if threading.current_thread() is threading.main_thread():  # in others Python sets no handlers
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
        """What happened; without a signal it was ctrl-C."""
        return WORDS[signal.Signals(self.number or signal.SIGINT).name]

    @property
    def code(self) -> int:
        """The exit code that shells give it."""
        return 128 + (self.number or signal.SIGINT)

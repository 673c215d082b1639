"""Test that signals become exceptions in commands, and that handlers of other code stay."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from loraio.cli import _signals
from loraio.cli._signals import Signals, Stopped

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in NUMBERS}
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in NUMBERS]


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated"), (signal.SIGHUP, 129, "hung up")],
)
def test_a_signal_becomes_an_exception_and_the_handlers_come_back(number: int, code: int, word: str) -> None:
    before, found = handlers(), Signals()
    with pytest.raises(Stopped), found.obeyed(to_the_end=False):
        os.kill(os.getpid(), number)
    assert (found.number, found.code, found.word) == (number, code, word)
    assert handlers() == before


def test_handlers_of_other_code_and_ignored_signals_stay() -> None:
    seen: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    before = handlers()
    with Signals().obeyed(to_the_end=False):
        assert handlers()[1:] == before[1:]
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGHUP)
    assert seen == [signal.SIGTERM]
    assert handlers() == before


def test_a_second_signal_does_not_stop_the_clearing_up_but_a_later_one_is_obeyed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, steps = Signals(), []

    def both() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            steps.append("cleared up")

    with found.obeyed(to_the_end=False):
        with pytest.raises(Stopped):
            both()
        assert steps == ["cleared up"]
        assert found.number == signal.SIGTERM
        monkeypatch.setattr(_signals, "PATIENCE", 0.0)
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGINT)


def test_at_the_end_of_the_process_further_signals_do_no_harm() -> None:
    found = Signals()
    with found.obeyed(to_the_end=True):
        pass
    assert handlers() == [signal.SIG_DFL] * 3
    with pytest.raises(Stopped), found.obeyed(to_the_end=True):
        os.kill(os.getpid(), signal.SIGTERM)
    assert handlers() == [signal.SIG_IGN] * 3


def test_a_command_in_another_thread_touches_no_handlers() -> None:
    before, ended = handlers(), []

    def run() -> None:
        with Signals().obeyed(to_the_end=False):
            ended.append(handlers())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert ended == [before]

"""What the timings share: interleaved rounds in one process, the order rotated, medians of ratios, and the machine."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def ratios(
    works: Mapping[str, Callable[[], Any]],
    *,
    against: str,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, float]]:
    """Times of several pieces of work, taken in turn; each round begins with another of them.

    Args:
        works: by name; each is called once for every round, and once before that is not counted.
        against: the name of the work that the others are compared with, round by round.
        rounds: how many.
        clock: seconds, of the wall or, by ``time.process_time``, of the process.

    Returns:
        for each name ``ratio``, the median over the rounds, ``low`` and ``high``, its quartiles, and ``seconds``, the
        median time.
    """
    names = list(works)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            start = clock()
            works[name]()
            if number:
                times[name].append(clock() - start)
    found = {}
    for name, row in times.items():
        shares = [mine / other for mine, other in zip(row, times[against], strict=True)]
        low, middle, high = statistics.quantiles(shares, n=4) if len(shares) > 1 else shares * 3
        found[name] = {"ratio": middle, "low": low, "high": high, "seconds": statistics.median(row)}
    return found


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }

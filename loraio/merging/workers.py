"""Run one job for each of many tensors, in threads that share the processors."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits

from loraio.errors import ConfigError
from loraio.files.copying import Progress, StoppedError

T = TypeVar("T")


def worker_count(workers: int | None) -> int:
    """Return the number of threads: as asked for, else one for each processor, but at most four."""
    count = min(os.cpu_count() or 1, 4) if workers is None else workers
    if count < 1:
        raise ConfigError(f"there must be at least one worker, not {count} workers")
    return count


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Keep each operation of torch and of NumPy to the thread of its worker.

    NumPy's OpenBLAS has one set of threads, which wait in a busy loop: workers that call it at once slow each other
    down.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(limits=1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)


def counting(report: Callable[[int, int], None] | None, total: int) -> Progress:
    """Return a progress that reports the bytes done so far, and ``total``."""
    if report is None:
        return Progress()
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        report(done, total)

    return Progress(add)


def run_each(names: Iterable[str], job: Callable[[str], T], *, workers: int, progress: Progress) -> dict[str, T]:
    """Run a job for each name in threads, and return the results by name; the first exception stops all jobs."""
    names = list(names)

    def guarded(name: str) -> T:
        try:
            return job(name)
        except BaseException:
            progress.stopped = True
            raise

    with ThreadPoolExecutor(max_workers=workers) as pool:
        futures = [pool.submit(guarded, name) for name in names]
        try:
            results = wait(futures, return_when=FIRST_EXCEPTION)
        except BaseException:  # an interrupt
            progress.stopped = True
            raise
        finally:
            for future in futures:
                future.cancel()
    failures = [failure for future in results.done if not future.cancelled() and (failure := future.exception())]
    if failures:
        raise next((failure for failure in failures if not isinstance(failure, StoppedError)), failures[0])
    return {name: future.result() for name, future in zip(names, futures, strict=True)}

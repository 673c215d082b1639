"""Run one job for each of many tensors, in threads that share the processors."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from loraio.errors import ConfigError
from loraio.files.copying import Progress, StoppedError

T = TypeVar("T")


def worker_count(workers: int | None) -> int:
    """Return the number of threads: as asked for, else one for each processor, but at most four.

    Raises:
        ConfigError: fewer than one.
    """
    count = min(os.cpu_count() or 1, 4) if workers is None else workers
    if count < 1:
        raise ConfigError(f"there must be at least one worker, not {count} workers")
    return count


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """The workers share the processors; each operation keeps to the one of its worker.

    For products of NumPy too: the threads of its OpenBLAS wait for each other by running in circles, and several
    workers that call it at once wait for its threads.
    """
    counts = [(torch.get_num_threads, torch.set_num_threads), *_openblas()]
    before = [get() for get, _ in counts]
    try:
        for _, put in counts:
            put(1)
        yield
    finally:
        for (_, put), count in zip(counts, before, strict=True):
            put(count)


@functools.cache
def _openblas() -> list[tuple[Callable[[], int], Callable[[int], None]]]:
    """How many threads NumPy's OpenBLAS has, and how to set that; nothing where NumPy has another library."""
    modules = (sys.modules.get(f"numpy.{core}._multiarray_umath") for core in ("_core", "core"))
    module = next((module for module in modules if module is not None), None)
    if module is None:
        return []
    try:
        library = ctypes.CDLL(module.__file__)  # and those that it is linked with
    except OSError:
        return []
    names = [f"{start}{{}}_num_threads{end}" for start in ("scipy_openblas_", "openblas_") for end in ("64_", "")]
    return [
        (getattr(library, name.format("get")), getattr(library, name.format("set")))
        for name in names
        if hasattr(library, name.format("set")) and hasattr(library, name.format("get"))
    ]


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
    """Run a job for each name in threads, and return the results by name.

    Raises:
        BaseException: the first exception of any job; it stops all others.
    """
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

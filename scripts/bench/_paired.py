"""Measure works in interleaved rounds, and print medians of ratios: shared by all rows."""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import loraio

SCHEMA = "loraio/bench/1"

NETWORKS = {
    "digit-cnn": (1, 28, 28),
    "torchvision:mobilenet_v3_small": (3, 224, 224),
    "torchvision:resnet50": (3, 224, 224),
}
"""The networks that rows are measured on, and the shape of their inputs."""

CLOCKS: dict[str, Callable[[], float]] = {"processor": time.process_time, "wall": time.perf_counter}
"""Processor time is that of this process: what neighbours on a shared machine take is not in it."""

QUICK_ROUNDS = 2

PACKAGES = ("torch", "torchvision", "safetensors", "peft", "minlora")

Works = Mapping[str, Callable[..., Any]]
Times = dict[str, list[float]]


class WrongResultError(Exception):
    """Something that was to be timed gives another result than it must."""


def require(right: bool, what: str) -> None:
    """Refuse to time what is wrong.

    Raises:
        WrongResultError: it is not right.
    """
    if not right:
        raise WrongResultError(what)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number of one row.

    Attributes:
        row: the row's name, that of its file.
        case: what was measured: the network, and whatever else tells it from others of the row.
        who: "loraio", a way of it ("loraio fast"), a peer, or a bound.
        value: the median.
        low, high: its quartiles over the rounds; the value itself where there is only one.
        unit: what the value is: "x W.add_(0)" is a multiple of the time that that takes; "s", "share".
        seconds: the median time, where the value is a ratio of times.
        target: the value must not be larger; None where there is none.
    """

    row: str
    case: str
    who: str
    value: float
    low: float
    high: float
    unit: str
    seconds: float | None = None
    target: float | None = None

    @property
    def met(self) -> bool | None:
        """True if the value is within its target; None without one."""
        return None if self.target is None else self.value <= self.target


def exactly(row: str, case: str, who: str, value: float, unit: str, *, target: float | None = None) -> Figure:
    """A figure that does not change from round to round."""
    return Figure(row=row, case=case, who=who, value=value, low=value, high=value, unit=unit, target=target)


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile; of one value three times that.

    >>> spread([4.0, 1.0, 3.0, 2.0, 5.0])
    (2.0, 3.0, 4.0)
    """
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def interleaved(
    works: Works,
    *,
    rounds: int,
    clock: Callable[[], float] = time.process_time,
    before: Mapping[str, Callable[[], Any]] | None = None,
    warmup: int = 1,
) -> Times:
    """Times of several pieces of work, taken in turn; each round begins with another of them.

    So whatever else the machine does falls on all of them. What a call returns is dropped after its time was taken, and
    Python collects garbage between the rounds.

    Args:
        works: by name; each is called once in every round.
        rounds: how many are counted, at least 1.
        clock: gives seconds.
        before: by the name of a work, what is called before it and not timed; the work gets what it returns.
        warmup: rounds beforehand that are not counted.

    Returns:
        for each name the seconds of each round.
    """
    names = list(works)
    times: Times = {name: [] for name in names}
    with _garbage_kept():
        for number in range(rounds + warmup):
            gc.collect()
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                given = [before[name]()] if before and name in before else []
                start = clock()
                result = works[name](*given)
                seconds = clock() - start
                del result, given
                if number >= warmup:
                    times[name].append(seconds)
    return times


@contextmanager
def _garbage_kept() -> Iterator[None]:
    """Python collects no garbage by itself, and what is there already is never looked at."""
    is_on = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if is_on:
            gc.enable()


def ratio_of(
    times: Times, who: str, against: str, *, row: str, case: str, unit: str, name: str = "", target: float | None = None
) -> Figure:
    """The median over the rounds of one work's time over that of another in the same round.

    Args:
        times: from `interleaved`.
        who, against: names in it.
        name: of the figure, where it is not ``who``.
        row, case, unit, target: see `Figure`.
    """
    shares = [mine / other for mine, other in zip(times[who], times[against], strict=True)]
    low, middle, high = spread(shares)
    return Figure(
        row=row,
        case=case,
        who=name or who,
        value=middle,
        low=low,
        high=high,
        unit=unit,
        seconds=statistics.median(times[who]),
        target=target,
    )


def ratios(
    times: Times,
    against: str,
    *,
    row: str,
    case: str,
    unit: str,
    targets: Mapping[str, float | None] | None = None,
    names: Iterable[str] | None = None,
) -> list[Figure]:
    """Return `ratio_of` for each of these names, by default all others; ``targets`` by name."""
    chosen = [who for who in times if who != against] if names is None else names
    return [
        ratio_of(times, who, against, row=row, case=case, unit=unit, target=(targets or {}).get(who)) for who in chosen
    ]


def short(network: str) -> str:
    """A network's name without where it comes from."""
    return network.rpartition(":")[2]


def versions() -> dict[str, str | None]:
    """Of loraio and of what is installed of `PACKAGES`; null for a peer that can be imported and says no version."""
    found: dict[str, str | None] = {"loraio": loraio.__version__}
    for package in PACKAGES:
        if importlib.util.find_spec(package) is not None:
            try:
                found[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                found[package] = None
    return found


def machine() -> dict[str, Any]:
    """Return the versions and the machine that the figures are of."""
    return {
        "python": platform.python_version(),
        "versions": versions(),
        "machine": platform.machine(),
        "system": platform.system(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def described(about: Mapping[str, Any]) -> str:
    """Describe the result of `machine` in one line."""
    names = ", ".join(f"{name} {version or 'of unknown version'}" for name, version in about["versions"].items())
    threads = "one thread" if about["threads"] == 1 else f"{about['threads']} threads"
    hardware = f"{about['cpus']} processors, {about['machine']} {about['vectors']}"
    return f"{names}, Python {about['python']}, {hardware}, {threads}"


def parser(doc: str | None, *, networks: Iterable[str] = NETWORKS, clock: str = "processor") -> argparse.ArgumentParser:
    """The options that all rows take; a row adds its own."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(networks)
    if names:
        made.add_argument("--networks", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    made.add_argument("--rounds", type=int, default=None, help="how many are counted  [default: the row's own]")
    made.add_argument("--clock", choices=list(CLOCKS), default=clock, help=f"[default: {clock}]")
    made.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds and small sizes: does it run?")
    made.add_argument("--json", action="store_true", help=f"one object, {SCHEMA}")
    return made


def rounds(options: argparse.Namespace, usual: int) -> int:
    """As asked for, else two for a quick run, else the row's own."""
    return options.rounds or (QUICK_ROUNDS if options.quick else usual)


Measured = tuple[list[Figure], list[str]]
"""Figures, and a line for each thing that a reader should know, such as a peer that is not there."""


def gathered(parts: Iterable[Measured]) -> Measured:
    """The figures of all parts in their order, each note once."""
    figures: list[Figure] = []
    notes: dict[str, None] = {}
    for found, said in parts:
        figures += found
        notes |= dict.fromkeys(said)
    return figures, list(notes)


def console() -> Console:
    """Standard output; where it is no terminal, wide enough for every row's table."""
    return Console(width=None if sys.stdout.isatty() else 150)


def run_row(
    row: str, options: argparse.Namespace, measure: Callable[[argparse.Namespace], Measured], *, title: str
) -> None:
    """Measure one row on one thread and print it; exit code 3 where a result is wrong."""
    torch.set_num_threads(1)
    try:
        figures, notes = measure(options)
    except WrongResultError as error:
        print(f"{row}: wrong result, nothing is timed: {error}", file=sys.stderr)
        sys.exit(3)
    found = {
        "schema": SCHEMA,
        "row": row,
        "title": title,
        "machine": machine(),
        "settings": {name: value for name, value in vars(options).items() if name != "json"},
        "figures": [asdict(figure) for figure in figures],
        "notes": notes,
    }
    if options.json:
        print(json.dumps(found, default=str))
    else:
        show(found, console())


def run_networks(
    row: str,
    doc: str | None,
    measure_one: Callable[[str, int, Callable[[], float]], Measured],
    *,
    title: str,
    counts: Mapping[str, int],
) -> None:
    """Measure and print a row that takes no options of its own, one network after the other.

    Args:
        row, title: see `run_row`.
        doc: the help.
        measure_one: takes a network, a number of rounds and a clock.
        counts: by network, how many rounds are counted.
    """

    def measure(options: argparse.Namespace) -> Measured:
        clock = CLOCKS[options.clock]
        return gathered(measure_one(name, rounds(options, counts[name]), clock) for name in options.networks)

    run_row(row, parser(doc).parse_args(), measure, title=title)


def shown(value: float, unit: str) -> str:
    """A number with as many digits as its unit needs.

    >>> shown(1.234567, "x cp"), shown(0.0, "share"), shown(12.345, "x cp")
    ('1.235', '0', '12.35')
    """
    if unit == "bytes":
        return f"{value:,.0f}"
    if unit == "share" and 0 < value < 0.001:
        return f"{value:.1e}"
    return f"{value:.4g}" if value < 1000 else f"{value:,.0f}"


def mark(figure: Figure) -> str:
    """Of a figure with a target whether it is met."""
    return {None: "", True: "met", False: "missed"}[figure.met]


def figures_of(document: Mapping[str, Any]) -> list[Figure]:
    """The figures of one row's JSON.

    Raises:
        ValueError: it is of another schema.
    """
    if document.get("schema") != SCHEMA:
        raise ValueError(f"schema is {document.get('schema')!r}, not {SCHEMA!r}")
    return [Figure(**each) for each in document["figures"]]


def show(document: Mapping[str, Any], printer: Console) -> None:
    """One row as a table for a person."""
    columns = ("case", "who", "median", "quartiles", "unit", "time", "target", "")
    table = Table(title=f"{document['row']}: {document['title']}", title_justify="left", box=None, pad_edge=False)
    for name in columns:
        table.add_column(
            name, no_wrap=True, justify="right" if name in ("median", "quartiles", "time", "target") else "left"
        )
    for figure in figures_of(document):
        same = figure.low == figure.high
        table.add_row(
            figure.case,
            figure.who,
            shown(figure.value, figure.unit),
            "" if same else f"{shown(figure.low, figure.unit)} to {shown(figure.high, figure.unit)}",
            figure.unit,
            "" if figure.seconds is None else f"{figure.seconds * 1e3:,.3f} ms",
            "" if figure.target is None else f"{figure.target:g}",
            mark(figure),
            style={None: None, True: "green", False: "red"}[figure.met],
        )
    printer.print(table)
    for note in document["notes"]:
        printer.print(f"  {note}", markup=False, highlight=False)
    printer.print(f"  {described(document['machine'])}", markup=False, highlight=False)

"""What commands print: the result on stdout, everything else on stderr.

All text of commands goes through here, so that nothing out of a file can take hold of the terminal.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from loraio.files.names import shown
from loraio.registry import known

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from torch import nn

    from loraio.adapter import Adapter, WholeTensor
    from loraio.errors import LoraioError
    from loraio.training.optimizing import Progress

PIPE_WIDTH = 10_000
"""Columns of a table that does not go to a terminal: no cell of it is ever wrapped."""


def print_json(command: str, result: Mapping[str, Any]) -> None:
    """The one object that ``--json`` promises, with the name and version of its layout.

    JSON has no word for NaN and infinity; they become null.
    """
    click.echo(json.dumps({"schema": f"loraio/{command}/1", **_plain(result)}, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def console(*, stderr: bool = False) -> Console:
    """A rich console that takes text as it is: file names may look like rich's markup."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PIPE_WIDTH
    return Console(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)


def table(title: str, columns: Sequence[str]) -> Table:
    """An empty table: the first column is text, the others are numbers. Its cells are shown as a `line` is."""
    from rich import box
    from rich.table import Table

    class Escaped(Table):
        def add_row(self, *cells: Any, **options: Any) -> None:
            super().add_row(*(shown(cell) if isinstance(cell, str) else cell for cell in cells), **options)

    made = Escaped(title=shown(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    made.add_column(columns[0], overflow="fold")
    for column in columns[1:]:
        made.add_column(column, justify="right")
    return made


def line(text: str) -> None:
    """A line of the result, on stdout; what is no printable character is escaped, whatever file it is from."""
    click.echo(shown(text))


def note(text: str) -> None:
    """A line on stderr, as `line`."""
    click.echo(shown(text), err=True)


def failure(error: LoraioError) -> None:
    """An error on stderr."""
    for text in f"{type(error).__name__}: {error}".split("\n"):
        note(text)


def note_stripped(prefix: str, *, as_json: bool) -> None:
    """Say what was taken off the names of a base; with ``--json`` the result itself says it."""
    if prefix and not as_json:
        note(f"note: names had the prefix {prefix!r}, which was taken off")


def note_effects(
    network: nn.Module, adapters: Mapping[str, Adapter], strength: float, *, allow_base_mismatch: bool, as_json: bool
) -> None:
    """A line for each adapter on what it does to the network's weights, and how the base differs if that is allowed."""
    if as_json:
        return
    from loraio.bases.identity import check_base
    from loraio.merging.effect import merge_effect
    from loraio.merging.in_memory import merge

    state = network.state_dict()
    for name, adapter in adapters.items():
        for line in check_base(adapter, state, allow_mismatch=allow_base_mismatch):
            note(f"note: {name}: another base: {line}")
        merged = merge(state, adapter, strength, allow_base_mismatch=allow_base_mismatch)
        note(f"note: {name} {merge_effect(state, merged, adapter)}")


def whole_facts(whole: WholeTensor) -> dict[str, Any]:
    """A tensor that an adapter replaces, as plain JSON values."""
    shapes = {"shape": list(whole.shape), "base_shape": list(whole.base_shape)}
    return {"role": whole.role, "dtype": whole.dtype, **shapes, "parameters": whole.parameters}


def whole_lines(whole: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What an adapter replaces, from `whole_facts`: a line for each head, one for normalisation, one for the rest."""
    lines = []
    heads = dict.fromkeys(name.rpartition(".")[0] for name, tensor in whole.items() if tensor["role"] == "head")
    for path in heads:
        names = (f"{path}.{last}" if path else last for last in ("weight", "bias"))
        tensor = next(whole[name] for name in names if name in whole)
        outputs, before = tensor["shape"][0], tensor["base_shape"][0]
        lines.append(f"head {path}: {outputs} outputs, in the base {before}; replaced whole")
    norms = {name: tensor for name, tensor in whole.items() if tensor["role"] == "norm"}
    if norms:
        layers = len({name.rpartition(".")[0] for name in norms})
        kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in norms))
        numbers = sum(tensor["parameters"] for tensor in norms.values())
        lines.append(f"normalisation: {numbers:,} numbers of {layers} layers ({kinds}); replaced whole")
    others = {name: tensor for name, tensor in whole.items() if tensor["role"] in ("bias", "layer")}
    if others:
        numbers = sum(tensor["parameters"] for tensor in others.values())
        lines.append(f"{len(others)} other tensors, {numbers:,} numbers ({known(others, limit=5)}); replaced whole")
    return lines


def size(count: int) -> str:
    """Bytes for people.

    >>> size(512), size(19_656), size(3_500_000)
    ('512 bytes', '19.7 kB', '3.5 MB')
    """
    if count < 1000:
        return f"{count} bytes"
    return f"{count / 1e3:.1f} kB" if count < 1e6 else f"{count / 1e6:.1f} MB"


@contextlib.contextmanager
def byte_progress(label: str, *, as_json: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Where copying is reported to: a bar on stderr with rate and time left; None where that is no terminal."""
    if as_json or not sys.stderr.isatty():
        yield None
        return
    from rich import progress as bars

    columns = (
        bars.TextColumn("{task.description}", markup=False),
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=console(stderr=True)) as bar:
        task = bar.add_task(shown(label), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def progress(*, lines: bool = True) -> Iterator[Callable[[Progress], None]]:
    """Where training loops report to, on stderr: bars on a terminal, elsewhere lines, unless they would be in the way.

    Args:
        lines: whether to print lines; with ``--json`` a file or pipe gets nothing but the error, if there is one.
    """
    if not sys.stderr.isatty():
        yield lambda now: note(f"{now.label}: step {now.step}/{now.steps}, loss {now.loss:.4f}") if lines else None
        return
    from rich import progress as bars

    columns = (
        bars.TextColumn("{task.description}", markup=False),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("loss {task.fields[loss]:.4f}"),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=console(stderr=True)) as bar:
        tasks: dict[str, bars.TaskID] = {}

        def report(now: Progress) -> None:
            if now.label not in tasks:
                tasks[now.label] = bar.add_task(shown(now.label), total=now.steps, loss=now.loss)
            bar.update(tasks[now.label], completed=now.step, loss=now.loss)

        yield report

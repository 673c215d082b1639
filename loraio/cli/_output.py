"""Print: the result on stdout, everything else on stderr.

All text of commands goes through here, so that nothing in a file can control the terminal.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from loraio.adapter.layers import tensor_name
from loraio.files.names import shown
from loraio.registry import known

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.table import Table
    from torch import nn

    from loraio.adapter import Adapter, WholeTensor
    from loraio.errors import LoraioError
    from loraio.training.optimizing import Progress

PIPE_WIDTH = 10_000
"""Columns of a table that does not go to a terminal, so that no cell is wrapped."""


def print_json(command: str, result: Mapping[str, Any]) -> None:
    """Print the one object that ``--json`` promises, with the name and version of its layout.

    JSON has no NaN and infinity; they become null.
    """
    click.echo(json.dumps({"schema": f"loraio/{command}/1", **_plain(result)}, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def console(*, stderr: bool = False) -> Console:
    """Return a rich console that prints text as it is: file names may look like rich's markup."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PIPE_WIDTH
    return Console(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)


def table(title: str, columns: Sequence[str]) -> Table:
    """Return an empty table: text in the first column, numbers in the others, all of it escaped as in `line`."""
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
    """Print a line of the result on stdout; characters that are not printable are escaped."""
    click.echo(shown(text))


def note(text: str) -> None:
    """Print a line on stderr, escaped as in `line`."""
    click.echo(shown(text), err=True)


def notes(texts: Iterable[str]) -> None:
    """Print remarks on stderr."""
    for text in texts:
        note(f"note: {text}")


def failure(error: LoraioError) -> None:
    """Print an error on stderr."""
    for text in f"{type(error).__name__}: {error}".split("\n"):
        note(text)


def note_stripped(prefix: str, *, as_json: bool) -> None:
    """Print which prefix was removed from the names of a base; with ``--json`` the result has it."""
    if prefix and not as_json:
        notes([f"names had the prefix {prefix!r}, which was removed"])


def note_effects(
    network: nn.Module, adapters: Mapping[str, Adapter], strength: float, *, allow_base_mismatch: bool, as_json: bool
) -> None:
    """Print how much each adapter changes the network's weights, and how the base differs if that is allowed."""
    if as_json:
        return
    from loraio.bases.identity import check_base
    from loraio.merging.effect import merge_effect
    from loraio.merging.in_memory import merge

    state = network.state_dict()
    for name, adapter in adapters.items():
        mismatch = check_base(adapter, state, allow_mismatch=allow_base_mismatch)
        merged = merge(state, adapter, strength, allow_base_mismatch=allow_base_mismatch)
        notes(f"{name}: another base: {line}" for line in mismatch)
        notes([f"{name} {merge_effect(state, merged, adapter)}"])


def whole_facts(whole: WholeTensor) -> dict[str, Any]:
    """Return a tensor that an adapter replaces whole, as plain JSON values."""
    return {key: getattr(whole, key) for key in ("role", "dtype", "shape", "base_shape", "parameters")}


def whole_lines(whole: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Describe the results of `whole_facts`: a line for each head, one for normalisation, one for the rest."""
    lines = []
    heads = dict.fromkeys(name.rpartition(".")[0] for name, tensor in whole.items() if tensor["role"] == "head")
    for path in heads:
        names = (tensor_name(path, last) for last in ("weight", "bias"))
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
    """Return a number of bytes in the largest unit that fits.

    >>> size(512), size(19_656), size(3_500_000)
    ('512 bytes', '19.7 kB', '3.5 MB')
    """
    if count < 1000:
        return f"{count} bytes"
    return f"{count / 1e3:.1f} kB" if count < 1e6 else f"{count / 1e6:.1f} MB"


def _bars(*columns: str) -> Bars:
    """Return progress bars on stderr; columns are classes of rich.progress, or text with fields."""
    from rich import progress

    made = [getattr(progress, each)() if each.isidentifier() else progress.TextColumn(each) for each in columns]
    label = progress.TextColumn("{task.description}", markup=False)
    return progress.Progress(
        label, progress.BarColumn(), *made, progress.TimeRemainingColumn(), console=console(stderr=True)
    )


@contextlib.contextmanager
def byte_progress(label: str, *, as_json: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Give a function that shows copied bytes as a bar on stderr, or None if stderr is no terminal."""
    if as_json or not sys.stderr.isatty():
        yield None
        return
    with _bars("DownloadColumn", "TransferSpeedColumn") as bar:
        task = bar.add_task(shown(label), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def progress(*, lines: bool = True) -> Iterator[Callable[[Progress], None]]:
    """Give a function that shows the progress of training on stderr: bars on a terminal, else lines.

    Args:
        lines: False with ``--json``: then a file or pipe gets only the error, if there is one.
    """
    if not sys.stderr.isatty():
        yield lambda now: note(f"{now.label}: step {now.step}/{now.steps}, loss {now.loss:.4f}") if lines else None
        return
    with _bars("MofNCompleteColumn", "loss {task.fields[loss]:.4f}") as bar:
        tasks: dict[str, Any] = {}

        def report(now: Progress) -> None:
            if now.label not in tasks:
                tasks[now.label] = bar.add_task(shown(now.label), total=now.steps, loss=now.loss)
            bar.update(tasks[now.label], completed=now.step, loss=now.loss)

        yield report

"""All rows, each a process of its own: one table, one JSON file, one picture of the bars.

usage: scripts/bench/run [--rows NAME ...] [--all] [--networks NAME ...] [--quick] [--out FOLDER] [--draw | --markdown]

`scripts/bench/run` makes the environment and calls this file. Each row checks its results before it takes a time. A row
that fails is named, the others go on, and the exit code is 1; a target that is missed is marked, and is no failure.
FOLDER gets results.json, with versions, threads and sizes, after every row, and bars.png at the end. Rows that are not
run again stay in results.json. --draw and --markdown run nothing: from results.json they draw the picture, or print the
table for README.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from _paired import NETWORKS, QUICK_ROUNDS, Figure, console, described, figures_of, show, shown

FOLDER = Path(__file__).resolve().parent
SCHEMA = "loraio/bench/suite/1"
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
PEERS = ("PEFT", "minLoRA")


class Row(NamedTuple):
    """How a row is called: whether it takes --networks, and whether only --all or --rows runs it."""

    networks: bool = True
    asked_for: bool = False


ROWS = {
    "merge": Row(),
    "loading": Row(),
    "swap": Row(),
    "serving": Row(),
    "training_step": Row(),
    "mixed_batches": Row(),
    "bank": Row(networks=False),
    "file_size": Row(),
    "residues": Row(),
    "cold_start": Row(networks=False),
    "compiled_swap": Row(asked_for=True),  # minutes of compiling, with a C++ compiler
    "streamed_merge": Row(networks=False, asked_for=True),  # 18 GB of disk
}
"""By name, each in NAME.py, in the order of the table."""


class RowFailedError(Exception):
    """A row that gave no figures, and why."""


def run_one(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The JSON of one row.

    Raises:
        RowFailedError: its process failed.
    """
    words = ["--json", *(["--quick"] if options.quick else [])]
    if options.networks and ROWS[name].networks:
        words += ["--networks", *options.networks]
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py"), *words],
        capture_output=True, text=True, check=False, env={**os.environ, **ONE_THREAD},
    )  # fmt: skip
    if done.returncode:
        raise RowFailedError(f"exit code {done.returncode}\n{done.stderr.strip()}")
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document


def read(path: Path) -> dict[str, Any]:
    """results.json, or what it is before any row was run."""
    if not path.exists():
        return {"schema": SCHEMA, "rows": {}, "failed": {}}
    results: dict[str, Any] = json.loads(path.read_text())
    if results.get("schema") != SCHEMA:
        raise SystemExit(f"{path}: schema is {results.get('schema')!r}, not {SCHEMA!r}; give another --out")
    return results


def write(results: Mapping[str, Any], path: Path) -> None:
    """Write whole or not at all, one line for each row."""
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in results["rows"].items())
    rest = "".join(f" {json.dumps(key)}: {json.dumps(results[key])},\n" for key in results if key != "rows")
    part = path.with_suffix(".part")
    part.write_text(f'{{\n{rest} "rows": {{\n{rows}\n }}\n}}\n')
    part.replace(path)


def run_rows(names: Sequence[str], options: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Run them in turn, print each, keep what was found after each."""
    printer, results = console(), read(path)
    if any(row["settings"]["quick"] != options.quick for row in results["rows"].values()):
        results["rows"] = {}  # quick figures and real ones do not belong into one table
    results["failed"] = {}
    for name in names:
        results["rows"].pop(name, None)
        start = time.perf_counter()
        try:
            document = run_one(name, options)
        except RowFailedError as error:
            results["failed"][name] = str(error).splitlines()[-1]
            printer.print(f"{name}: failed, {error}", style="red", markup=False, highlight=False)
        else:
            results["rows"][name] = document
            show(document, printer)
            printer.print(f"  took {time.perf_counter() - start:.0f} s\n", highlight=False)
        results["rows"] = {row: results["rows"][row] for row in ROWS if row in results["rows"]}
        write(results, path)
    with_target = [figure for figure in all_figures(results) if figure.target is not None]
    missed = [figure for figure in with_target if not figure.met]
    printer.print(f"{len(with_target) - len(missed)} of {len(with_target)} targets met", highlight=False)
    for figure in missed:
        measured = f"{shown(figure.value, figure.unit)}, target {figure.target:g}"
        printer.print(f"  missed: {label(figure)}: {measured}", markup=False, highlight=False)
    for name, why in results["failed"].items():
        printer.print(f"  failed: {name}: {why}", markup=False, highlight=False)
    return results


def all_figures(results: Mapping[str, Any]) -> list[Figure]:
    """Those of all rows, in their order."""
    return [figure for document in results["rows"].values() for figure in figures_of(document)]


def label(figure: Figure) -> str:
    """Row, case and, where it is not plain loraio, the way of it."""
    way = figure.who.removeprefix("loraio").strip(" ,")
    return f"{figure.row}: {figure.case}{f', {way}' if way else ''}"


def beside(figure: Figure, figures: Sequence[Figure]) -> dict[str, Figure]:
    """The peers' figures of the same case and unit."""
    key = (figure.row, figure.case, figure.unit)
    return {each.who: each for each in figures if each.who in PEERS and (each.row, each.case, each.unit) == key}


def markdown(results: Mapping[str, Any]) -> str:
    """The table for README: all figures that have a target, and the peers' beside them."""
    figures = all_figures(results)
    lines = [
        f"| what | unit | target | loraio | {' | '.join(PEERS)} |",
        f"|------|------|-------:|-------:|{'|'.join('-----:' for _ in PEERS)}|",
    ]
    for figure in figures:
        if figure.target is None:
            continue
        found = beside(figure, figures)
        peers = [shown(found[peer].value, figure.unit) if peer in found else "-" for peer in PEERS]
        own = shown(figure.value, figure.unit) + ("" if figure.met else ", missed")
        lines.append(f"| {label(figure)} | {figure.unit} | {figure.target:g} | {own} | {' | '.join(peers)} |")
    notes = dict.fromkeys(note for document in results["rows"].values() for note in document["notes"])
    machines = dict.fromkeys(f"{described(document['machine'])}." for document in results["rows"].values())
    peers = [note for note in notes if "PEFT: " in note or "minLoRA: " in note]
    return "\n".join([*lines, "", *machines, *(f"{note}." for note in peers)])


def draw(results: Mapping[str, Any], path: Path) -> bool:
    """A bar for each figure against its target, and the peers as marks; false where nothing has one."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    figures = all_figures(results)
    bars = [figure for figure in figures if figure.target]  # no share of a target of 0
    if not bars:
        return False
    end, met, missed = 2.0, "#2a7f62", "#c2452d"
    picture, axes = plt.subplots(figsize=(10, 1.3 + 0.27 * len(bars)), dpi=150, layout="constrained")
    marks = dict(zip(PEERS, (("D", "#3b4a6b"), ("o", "#b8860b")), strict=True))
    for place, figure in enumerate(bars):
        assert figure.target is not None
        share = figure.value / figure.target
        axes.barh(place, min(share, end), height=0.62, color=met if figure.met else missed, zorder=2)
        low, high = (min(edge / figure.target, end) for edge in (figure.low, figure.high))
        if high > low:
            axes.plot([low, high], [place, place], color="black", linewidth=1, zorder=3)
        beyond = 0
        for peer, other in beside(figure, figures).items():
            marker, color = marks[peer]
            at = other.value / figure.target
            if at > end:
                marker, at, beyond = ">", end - 0.04 * beyond, beyond + 1
            axes.plot(
                at, place, marker=marker, color=color, markersize=6, clip_on=False, zorder=4, markeredgecolor="white"
            )
        text = f"{shown(figure.value, figure.unit)} / {figure.target:g}  {figure.unit}"
        axes.text(end * 1.03, place, text, va="center", fontsize=7.5)
    axes.axvline(1, color="black", linewidth=1.2, zorder=5)
    axes.set_yticks(range(len(bars)), [label(figure) for figure in bars], fontsize=8)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, end)
    axes.set_xlabel("measured, of the target; shorter is better, at the line the target is just met", fontsize=8.5)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6, zorder=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    handles: list[Any] = [Patch(color=met, label="loraio, target met"), Patch(color=missed, label="missed")]
    handles += [
        Line2D([], [], marker=marker, color=color, linestyle="", label=peer)
        for peer, (marker, color) in marks.items()
        if any(figure.who == peer for figure in figures)
    ]
    handles.append(Line2D([], [], marker=">", color="#555555", linestyle="", label="a peer beyond the edge"))
    picture.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=8, frameon=False)
    picture.savefig(path)
    plt.close(picture)
    return True


def main() -> None:
    """Run, print, write; or print what was written before."""
    made = argparse.ArgumentParser(
        prog="scripts/bench/run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    usual = [name for name, row in ROWS.items() if not row.asked_for]
    made.add_argument("--rows", nargs="+", choices=list(ROWS), default=usual, metavar="NAME", help=", ".join(ROWS))
    made.add_argument("--all", action="store_true", help="also the rows that need much disk")
    made.add_argument("--networks", nargs="+", choices=list(NETWORKS), metavar="NAME", help=", ".join(NETWORKS))
    made.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds and small sizes: does it run?")
    made.add_argument("--out", type=Path, default=FOLDER / "results", help="[default: scripts/bench/results]")
    made.add_argument("--draw", action="store_true", help="draw bars.png from results.json, run nothing")
    made.add_argument("--markdown", action="store_true", help="print the table from results.json, run nothing")
    options = made.parse_args()
    path = options.out / "results.json"
    if options.markdown:
        print(markdown(read(path)))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    if options.draw:
        results = read(path)
    else:
        results = run_rows(list(ROWS) if options.all else options.rows, options, path)
        print(path)
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture: matplotlib cannot be imported; with it, scripts/bench/run --draw", file=sys.stderr)
    elif draw(results, options.out / "bars.png"):
        print(options.out / "bars.png")
    sys.exit(1 if results["failed"] else 0)


if __name__ == "__main__":
    main()

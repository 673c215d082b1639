"""The benchmarks: their statistics, what they refuse to time, and one command that runs them all."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loraio

FOLDER = Path(__file__).parents[2] / "scripts/bench"
ROWS = (
    "merge", "loading", "swap", "serving", "training_step", "mixed_batches", "bank", "file_size",
    "residues", "cold_start", "streamed_merge",
    *(["compiled_swap"] if any(map(shutil.which, ("g++", "clang++", "c++"))) else []),
)  # fmt: skip
SLOW = ("compiled_swap", "streamed_merge", "cold_start")  # processes of their own, and a compiler
WITHOUT_NETWORKS = ("bank", "cold_start", "streamed_merge")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A module of the benchmarks by name."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


def words_of(row: str) -> list[str]:
    return ["--quick", "--rounds", "1", *([] if row in WITHOUT_NETWORKS else ["--networks", "digit-cnn"])]


class Clock:
    """Goes only when something works."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, seconds: float) -> Callable[..., None]:
        def work(*given: object) -> None:
            self.log.append(name)
            self.now += seconds

        return work


def test_rounds_are_interleaved_in_rotating_order_and_a_warm_up_does_not_count(
    bench: Callable[[str], ModuleType],
) -> None:
    clock = Clock()
    works = {name: clock.work(name, seconds) for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 4.0))}
    times = bench("_paired").interleaved(works, rounds=3, clock=clock, warmup=1)
    assert ["".join(clock.log[start : start + 3]) for start in range(0, 12, 3)] == ["abc", "bca", "cab", "abc"]
    assert times == {"a": [1.0] * 3, "b": [2.0] * 3, "c": [4.0] * 3}


def test_what_is_called_before_a_work_is_not_timed_and_gives_it_its_argument(
    bench: Callable[[str], ModuleType],
) -> None:
    clock, given = Clock(), []

    def prepare() -> str:
        clock.now += 100
        return "fresh"

    def work(what: str) -> None:
        given.append(what)
        clock.now += 1

    works = {"a": work, "b": clock.work("b", 3.0)}
    assert bench("_paired").interleaved(works, rounds=2, clock=clock, before={"a": prepare}, warmup=0) == {
        "a": [1.0, 1.0],
        "b": [3.0, 3.0],
    }
    assert given == ["fresh", "fresh"]


def test_a_ratio_is_the_median_of_the_rounds_ratios_not_the_ratio_of_medians(
    bench: Callable[[str], ModuleType],
) -> None:
    paired = bench("_paired")
    times = {"ours": [2.0, 30.0, 4.0, 10.0, 3.0], "theirs": [1.0, 10.0, 4.0, 2.0, 1.0]}
    figure = paired.ratio_of(times, "ours", "theirs", row="r", case="c", unit="x theirs", target=2.5)
    assert (figure.low, figure.value, figure.high) == (2.0, 3.0, 3.0)
    assert figure.seconds == 4.0
    assert figure.met is False
    assert dataclasses.replace(figure, target=3.0).met is True
    assert dataclasses.replace(figure, target=None).met is None
    assert paired.spread([7.0]) == (7.0, 7.0, 7.0)


def test_figures_of_another_schema_are_refused(bench: Callable[[str], ModuleType]) -> None:
    with pytest.raises(ValueError, match="loraio/bench/0"):
        bench("_paired").figures_of({"schema": "loraio/bench/0", "figures": []})


def require_document(document: dict[str, Any], row: str, paired: ModuleType) -> None:
    """Of the schema, with figures that are numbers."""
    assert set(document) == {"schema", "row", "title", "machine", "settings", "figures", "notes"}
    assert (document["schema"], document["row"]) == (paired.SCHEMA, row)
    assert document["machine"]["threads"] == 1
    assert torch.__version__.startswith(document["machine"]["versions"]["torch"])
    figures = paired.figures_of(document)
    assert any(figure.who.startswith("loraio") for figure in figures)
    for figure in figures:
        assert figure.row == row
        assert 0 <= figure.low <= figure.value <= figure.high < math.inf
        assert figure.seconds is None or figure.seconds > 0


def rows_of(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in names]


@pytest.mark.parametrize("row", rows_of(ROWS))
def test_every_row_runs_and_prints_the_one_schema(
    row: str,
    bench: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if row == "streamed_merge" and not Path("/proc/self/status").exists():
        pytest.skip("reads Linux's /proc")
    monkeypatch.setattr(sys, "argv", [row, "--json", *words_of(row)])
    bench(row).main()
    require_document(json.loads(capsys.readouterr().out), row, bench("_paired"))


def test_the_suite_knows_every_row_of_this_list(bench: Callable[[str], ModuleType]) -> None:
    rows = bench("suite").ROWS
    assert set(ROWS) <= set(rows)
    assert {name for name, row in rows.items() if not row.networks} >= set(WITHOUT_NETWORKS)
    assert all((FOLDER / f"{name}.py").exists() for name in rows)


def unfolded(patch: pytest.MonkeyPatch, row: ModuleType) -> None:
    patch.setattr(row, "fold", lambda adapter, weights, exact: {name: w.clone() for name, w in weights.items()})


def rounded_twice(patch: pytest.MonkeyPatch, row: ModuleType) -> None:
    real = row.fold
    patch.setattr(row, "fold", lambda adapter, weights, exact: real(adapter, weights, exact=False))


def half_attached(patch: pytest.MonkeyPatch, row: ModuleType) -> None:
    real = loraio.attach
    patch.setattr(loraio, "attach", lambda model, adapter: real(model, adapter, 0.5))


def not_swapped(patch: pytest.MonkeyPatch, row: ModuleType) -> None:
    patch.setattr(row, "in_turn", lambda swap, adapters, forward: forward)


def one_gradient_off(patch: pytest.MonkeyPatch, row: ModuleType) -> None:
    real = row.attached

    def attached(model: nn.Module, adapter: loraio.Adapter) -> dict[str, nn.Parameter]:
        factors: dict[str, nn.Parameter] = real(model, adapter)
        factors["conv2.weight.lora_A"].register_hook(lambda gradient: gradient * 1.0001)
        return factors

    patch.setattr(row, "attached", attached)


def rows_mixed_up(patch: pytest.MonkeyPatch, row: ModuleType) -> None:
    def forced(layers: bool, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return lambda: run().roll(1, 0)

    patch.setattr(row, "forced", forced)


def always_the_first(patch: pytest.MonkeyPatch, row: ModuleType) -> None:
    real = loraio.Bank.swap
    patch.setattr(loraio.Bank, "swap", lambda bank, model, name: real(bank, model, "a0"))


def another_adapter(patch: pytest.MonkeyPatch, row: ModuleType) -> None:
    shipped = loraio.load(FOLDER.parents[1] / "adapters/digit-3.safetensors")
    patch.setattr(loraio, "load", lambda path: shipped)


def no_help(patch: pytest.MonkeyPatch, row: ModuleType) -> None:
    patch.setitem(row.COMMANDS, "loraio --help", [sys.executable, "-c", "print('usage')"])


def cut_copy(patch: pytest.MonkeyPatch, row: ModuleType) -> None:
    patch.setattr(row, "COPY", "import sys; open(sys.argv[2], 'wb').close()")


BREAKAGES = {
    "merge": (unfolded, rounded_twice),
    "loading": (half_attached, another_adapter),
    "swap": (not_swapped,),
    "serving": (half_attached,),
    "training_step": (one_gradient_off,),
    "mixed_batches": (rows_mixed_up,),
    "bank": (always_the_first,),
    "file_size": (another_adapter,),
    "cold_start": (no_help,),
    "streamed_merge": (cut_copy,),
}


@pytest.mark.parametrize(
    ("row", "breakage"),
    [
        pytest.param(row, breakage, marks=pytest.mark.slow if row in SLOW else ())
        for row, breakages in BREAKAGES.items()
        for breakage in breakages
    ],
)
def test_a_wrong_result_is_refused_before_any_time_is_taken(
    row: str,
    breakage: Callable[[pytest.MonkeyPatch, ModuleType], None],
    bench: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def never() -> float:
        pytest.fail("a time was taken")

    for clock in ("processor", "wall"):
        monkeypatch.setitem(bench("_paired").CLOCKS, clock, never)
    breakage(monkeypatch, bench(row))
    monkeypatch.setattr(sys, "argv", [row, "--json", *words_of(row)])
    with pytest.raises(SystemExit) as caught:
        bench(row).main()
    printed = capsys.readouterr()
    assert caught.value.code == 3
    assert not printed.out
    assert f"{row}: wrong result" in printed.err


@pytest.mark.slow
def test_one_command_gives_the_table_the_json_and_the_picture(
    tmp_path: Path, bench: Callable[[str], ModuleType]
) -> None:
    command = [FOLDER / "run", "--out", tmp_path / "out"]
    environment = {**os.environ, "BENCH_PYTHON": sys.executable}
    words = ["--rows", "bank", "merge", "--networks", "digit-cnn", "--quick"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "merge: merge in memory" in done.stdout
    assert "of 4 targets met" in done.stdout
    assert (tmp_path / "out/bars.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["schema"] == "loraio/bench/suite/1"
    assert list(results["rows"]) == ["merge", "bank"]
    for row, document in results["rows"].items():
        require_document(document, row, bench("_paired"))
    printed = subprocess.run([*command, "--markdown"], capture_output=True, text=True, check=True, env=environment)
    assert "| merge: digit-cnn, float32 | share not correctly rounded | 0 | 0 |" in printed.stdout
    assert f"torch {torch.__version__.partition('+')[0]}" in printed.stdout


def figure_of(paired: ModuleType, **changes: Any) -> Any:
    usual = {"row": "serving", "case": "a network", "who": "loraio", "unit": "x plain forward", "target": 1.2}
    return paired.Figure(**{**usual, "value": 1.5, "low": 1.4, "high": 1.6, "seconds": 0.1, **changes})


def document_of(bench: Callable[[str], ModuleType], row: str, figures: list[Any], *, quick: bool) -> dict[str, Any]:
    paired = bench("_paired")
    return {
        "schema": paired.SCHEMA, "row": row, "title": "a title", "machine": paired.machine(), "notes": [],
        "settings": {"quick": quick}, "figures": [dataclasses.asdict(figure) for figure in figures],
    }  # fmt: skip


def test_a_row_that_fails_is_named_and_the_others_go_on(
    tmp_path: Path,
    bench: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    suite, paired = bench("suite"), bench("_paired")

    def run_one(name: str, options: object) -> dict[str, Any]:
        if name == "merge":
            raise suite.RowFailedError("exit code 3\nmerge: wrong result")
        figures = [figure_of(paired), figure_of(paired, who="PEFT", value=2.5, low=2.4, high=2.6, target=None)]
        return document_of(bench, name, figures, quick=False)

    monkeypatch.setattr(suite, "run_one", run_one)
    monkeypatch.setattr(sys, "argv", ["run", "--rows", "merge", "serving", "--out", str(tmp_path)])
    monkeypatch.setattr(suite, "draw", lambda results, path: False)
    with pytest.raises(SystemExit) as caught:
        suite.main()
    printed = capsys.readouterr().out
    assert caught.value.code == 1
    assert "failed: merge: merge: wrong result" in printed
    assert "missed: serving: a network: 1.5, target 1.2" in printed
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["rows"]) == ["serving"]
    assert list(results["failed"]) == ["merge"]
    assert "| serving: a network | x plain forward | 1.2 | 1.5, missed | 2.5 | - |" in suite.markdown(results)


@pytest.mark.parametrize("quick", [False, True])
def test_rows_that_are_not_run_again_stay_unless_the_new_ones_are_only_quick(
    quick: bool, tmp_path: Path, bench: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, paired = bench("suite"), bench("_paired")
    monkeypatch.setattr(
        suite,
        "run_one",
        lambda name, options: document_of(bench, name, [figure_of(paired, row=name)], quick=options.quick),
    )
    monkeypatch.setattr(suite, "draw", lambda results, path: False)
    for words in (["serving"], ["merge", *(["--quick"] if quick else [])]):
        monkeypatch.setattr(sys, "argv", ["run", "--out", str(tmp_path), "--rows", *words])
        with pytest.raises(SystemExit):
            suite.main()
    kept = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert list(kept) == (["merge"] if quick else ["merge", "serving"])

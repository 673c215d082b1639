"""The comparison of attached, merged and exact outputs: loraio is right everywhere, and mistakes are seen."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts/bench")
    return importlib.import_module("correctness_vs_peers")


def test_a_quick_run_finds_loraio_right_everywhere_and_every_base_restored(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["correctness_vs_peers.py", "--tools", "loraio", "--quick", "--json"])
    try:
        with pytest.raises(SystemExit) as caught:
            bench.main()
    finally:
        torch.set_num_threads(threads)
    assert caught.value.code == 0
    found = json.loads(capsys.readouterr().out)
    own = found["tools"]["loraio"]
    assert own["all"]["cases"] == own["all"]["right"] == found["cases"] > 150
    assert own["all"]["detached"] == own["all"]["unmerged"] == [found["cases"]] * 2
    assert own["all"]["largest_difference_right"] < bench.TOLERANCE < own["all"]["smallest_effect_right"] / 100
    assert list(own["layers"]) == list(dict.fromkeys(case.layer for case in bench.grid(quick=False)))
    assert not own["refusals"]


def test_a_quick_grid_has_every_value_of_every_axis(bench: ModuleType) -> None:
    def values(quick: bool) -> set[tuple[str, str, str]]:
        cases = bench.grid(quick=quick)
        return {(c.layer[:-2], name, repr(value)) for c in cases for name, value in c.arguments.items()}

    assert values(True) == values(False)
    assert len(bench.grid(quick=False)) == 2 * 1_159


class Tampered:
    """loraio, with one thing done otherwise."""

    kinds = ("lora",)
    version = "0"

    def __init__(self, bench: ModuleType, **changes: Any) -> None:
        self.loraio, self.changes = bench.TOOLS["loraio"](), changes

    def attach(self, model: Any, kind: str) -> Any:
        handle = self.loraio.attach(model, kind)
        for name, change in self.changes.items():
            setattr(handle, name, change(getattr(handle, name)))
        return handle


def scaled(weights: Any) -> Any:
    return lambda: {name: 1.01 * weight for name, weight in weights().items()}


def refusing(_merge: Any) -> Any:
    def merge() -> None:
        raise NotImplementedError("not for this layer\nsecond line")

    return merge


def test_an_output_that_differs_is_wrong(bench: ModuleType) -> None:
    case = bench.grid(quick=True)[0]

    def louder(forward: Any) -> Any:
        def run(x: Any) -> Tensor:
            result: Tensor = forward(x) * 1.01
            return result

        return run

    result = bench.run(Tampered(bench, forward=louder), case)
    assert result.outcome == "wrong"
    assert result.attached_merged > bench.TOLERANCE > result.merged_formula


def test_two_equal_outputs_that_are_not_the_formulas_are_wrong(bench: ModuleType) -> None:
    result = bench.run(Tampered(bench, weights=scaled), bench.grid(quick=True)[0])
    assert result.outcome == "wrong"
    assert result.attached_merged == 0
    assert bench.summary([result])["wrong_though_attached_equals_merged"] == 1


def test_a_step_that_raises_is_a_refusal_with_its_first_line(bench: ModuleType) -> None:
    result = bench.run(Tampered(bench, merge=refusing), bench.grid(quick=True)[0])
    assert result.outcome == "refused"
    assert result.message == "merge: NotImplementedError: not for this layer"
    assert result.detached is True
    assert result.unmerged is None
    assert bench.summary([result])["refused_to_merge_but_attached_right"] == 1
    assert bench.refusals([result]) == {result.message: 1}


def test_a_base_that_comes_back_changed_is_counted(bench: ModuleType) -> None:
    def nudged(back: Any) -> Any:
        return lambda: {name: torch.nextafter(t, t + 1) for name, t in back().items()}

    result = bench.run(Tampered(bench, unmerge=nudged, detach=nudged), bench.grid(quick=True)[0])
    assert result.outcome == "right"
    assert (result.detached, result.unmerged) == (False, False)


def test_a_peer_that_is_not_there_is_a_gap_in_the_table(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "minlora", None)
    found = bench.measure(bench.grid(quick=True)[-2:], ["loraio", "minLoRA"])
    lines = "\n".join(bench.report(found))
    assert "minLoRA: not installed" in lines
    assert "MultiheadAttention        2      2      0        0" in lines.replace("  2 of 2", "")

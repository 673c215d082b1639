"""Does a network compute the same with an adapter attached as after its merge, and does it get its base back?

usage: python scripts/bench/correctness_vs_peers.py [--tools loraio PEFT ...] [--quick] [--json]

Runs loraio and those of its peers that can be imported (PEFT, LyCORIS, minLoRA: `pip install peft lycoris-lora`) over
one grid: convolutions and transposed convolutions of 1, 2 and 3 dimensions x kernel x stride x padding x dilation x
groups x padding mode, and Linear, Bilinear, Embedding and MultiheadAttention; kinds lora and dora; float32, rank 4,
alpha 8, every factor random and not zero. `--quick` takes every 13th convolution.

A case is
  right           outputs attached and merged, and those of the tool's own formula, evaluated here in float64 from the
                  tool's own factors, are equal within TOLERANCE times the mean size of the output
  wrong, silently it runs, but two of the three differ by more
  refused         it raises while it attaches, runs or merges, or adapts nothing
"detached" counts the bases that came back bit for bit when the adapter was taken off after a forward pass, of those
that it was put on; "unmerged" those that came back by the tool's own way, of those that were merged. All on the CPU,
one thread.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from _tools import ALPHA, RANK, TOOLS, Only, State
from torch import Tensor, nn

CHANNELS = 4

TOLERANCE = 1e-4
"""Of the mean size of the output. Sums in another order stay below it in float32, a mistake is thousands of times more:
every run prints the largest difference that it called right and the smallest that it called wrong."""

QUICK_STEP = 13
"""Shares no factor with the grid's sizes, so that a quick run still meets every value of every axis."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layer in one geometry and the kind of adapter to put on it."""

    number: int
    layer: str
    kind: str
    trait: str
    arguments: Mapping[str, Any]
    shapes: tuple[tuple[int, ...], ...]

    def build(self) -> tuple[Only, tuple[Tensor, ...]]:
        """The frozen network in eval mode and its inputs, the same for every tool."""
        torch.manual_seed(self.number)
        model = Only(getattr(nn, self.layer)(**self.arguments)).eval().requires_grad_(False)
        if self.layer == "Embedding":
            return model, (torch.randint(self.arguments["num_embeddings"], self.shapes[0]),)
        return model, tuple(torch.randn(shape) for shape in self.shapes)

    def __str__(self) -> str:
        return f"{self.layer}({', '.join(f'{name}={value!r}' for name, value in self.arguments.items())}), {self.kind}"


def convolutions(layer: str) -> Iterator[tuple[str, dict[str, Any], tuple[tuple[int, ...], ...]]]:
    """Trait, arguments and input shape of each geometry."""
    dims, transposed = int(layer[-2]), "Transpose" in layer
    kernels: list[Any] = [1, 3, *{1: [], 2: [(1, 3)], 3: [(1, 1, 3)]}[dims]]
    paddings: list[Any] = [0, 1] if transposed else [0, 1, "same"]
    modes = ["zeros"] if transposed else ["zeros", "reflect", "replicate", "circular"]
    for kernel, stride, padding, dilation, groups, mode in itertools.product(
        kernels, [1, 2], paddings, [1, 2], [1, 2, CHANNELS], modes
    ):
        if padding == "same" and stride != 1:
            continue  # torch refuses it
        arguments = {
            "in_channels": CHANNELS, "out_channels": 2 * CHANNELS, "kernel_size": kernel, "stride": stride,
            "padding": padding, "dilation": dilation, "groups": groups, "padding_mode": mode,
        }  # fmt: skip
        pads = padding == 1 or (padding == "same" and kernel != 1)
        traits = {
            "dilation": dilation != 1 and kernel != 1,
            "padding mode": mode != "zeros" and pads,
            "groups": groups != 1,
        }
        present = [name for name, here in traits.items() if here]
        trait = "plain" if not present else present[0] if len(present) == 1 else "several of these"
        yield trait, arguments, ((2, CHANNELS, *[6] * dims),)


def others() -> Iterator[tuple[str, dict[str, Any], tuple[tuple[int, ...], ...]]]:
    """Layer, arguments and input shapes."""
    yield "Linear", {"in_features": 6, "out_features": 8}, ((3, 6),)
    yield "Linear", {"in_features": 6, "out_features": 8, "bias": False}, ((2, 3, 6),)
    yield "Bilinear", {"in1_features": 4, "in2_features": 5, "out_features": 6}, ((2, 4), (2, 5))
    yield "Embedding", {"num_embeddings": 9, "embedding_dim": 5}, ((2, 6),)
    same = {"embed_dim": 8, "num_heads": 2, "batch_first": True}
    yield "MultiheadAttention", same, ((2, 3, 8),) * 3
    yield "MultiheadAttention", {**same, "bias": False}, ((2, 3, 8),) * 3
    yield "MultiheadAttention", {**same, "kdim": 6, "vdim": 5}, ((2, 3, 8), (2, 3, 6), (2, 3, 5))


CONVOLUTIONS = [f"{name}{dims}d" for name in ("Conv", "ConvTranspose") for dims in (1, 2, 3)]


def grid(*, quick: bool) -> list[Case]:
    """All cases."""
    cells = [(layer, *geometry) for layer in CONVOLUTIONS for geometry in convolutions(layer)]
    cells = cells[:: QUICK_STEP if quick else 1] + [(name, "plain", *rest) for name, *rest in others()]
    return [
        Case(number=number, layer=layer, kind=kind, trait=trait, arguments=arguments, shapes=shapes)
        for number, ((layer, trait, arguments, shapes), kind) in enumerate(itertools.product(cells, ("lora", "dora")))
    ]


@dataclass(kw_only=True)
class Result:
    """The outcome of one tool in one case.

    Attributes:
        outcome: "right", "wrong", "refused".
        effect: largest difference that the adapter makes by the formula, of the mean size of the formula's output.
        attached_merged: the same for the attached and the merged output.
        attached_formula: the same for the attached output and the formula's.
        merged_formula: the same for the merged output and the formula's.
        other_shape: whether the attached output has another shape than the merged one; it is broadcast to compare.
        message: of the refusal, with the step that raised.
        warned: first lines of the warnings up to the first output.
        detached: whether the base came back bit for bit; None where nothing was attached.
        unmerged: the same after a merge; None where nothing was merged or there is no way back.
    """

    outcome: str = "refused"
    effect: float | None = None
    attached_merged: float | None = None
    attached_formula: float | None = None
    merged_formula: float | None = None
    other_shape: bool = False
    message: str | None = None
    warned: tuple[str, ...] = ()
    detached: bool | None = None
    unmerged: bool | None = None

    @property
    def difference(self) -> float:
        """The largest of the three; 0 before there are any."""
        three = (self.attached_merged, self.attached_formula, self.merged_formula)
        return max((value for value in three if value is not None), default=0.0)


def first_line(error: object) -> str:
    """Return the first line of an error's text."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else ""


def same_bits(state: Mapping[str, Tensor], kept: State) -> bool:
    """Return True if every tensor of the base is there again, with its bits."""
    return state.keys() == kept.keys() and all(
        state[name].dtype == tensor.dtype and state[name].view(torch.int32).equal(tensor.view(torch.int32))
        for name, tensor in kept.items()
    )


def by_formula(case: Case, weights: State) -> Tensor:
    """Output of the plain layer with these weights, all in float64."""
    model, inputs = case.build()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    return torch.func.functional_call(model.double(), weights, (inputs,))


def ratio(one: Tensor, other: Tensor, size: float) -> float:
    """Largest difference of two outputs, of the mean size of one."""
    return float((one.double() - other.double()).abs().max()) / size


def run(tool: Any, case: Case) -> Result:
    """One case on one tool, step by step; the first step that raises is named."""
    result = Result()
    step = "attach"
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            model, inputs = case.build()
            kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            handle = tool.attach(model, case.kind)
            step, result.detached = "forward", False
            attached = handle.forward(inputs).clone()
            result.warned = tuple(sorted({first_line(w.message) for w in caught}))
            step = "formula"
            weights = handle.weights()
            formula = None if weights is None else by_formula(case, weights)
            expected = attached if formula is None else formula
            size = float(expected.abs().mean())
            result.effect = ratio(expected, by_formula(case, {}), size)
            if formula is not None:
                result.attached_formula = ratio(attached, formula, size)
            step = "merge"
            merged = handle.merge()(inputs).clone()
            result.other_shape = attached.shape != merged.shape
            result.attached_merged = ratio(attached, merged, size)
            if formula is not None:
                result.merged_formula = ratio(merged, formula, size)
            right = result.difference <= TOLERANCE and not result.other_shape
            result.outcome = "right" if right else "wrong"
            if handle.unmerge is not None:
                step = "unmerge"
                result.unmerged = False
                result.unmerged = same_bits(handle.unmerge(), kept)
    except Exception as error:
        if step == "formula":
            raise  # a mistake of this script, not of the tool
        result.message = f"{step}: {type(error).__name__}: {first_line(error)}"
    if result.detached is False:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model, inputs = case.build()
                handle = tool.attach(model, case.kind)
                if step != "forward":
                    handle.forward(inputs)
                result.detached = same_bits(handle.detach(), kept)
        except Exception as error:
            result.message = result.message or f"detach: {type(error).__name__}: {first_line(error)}"
    return result


def summary(results: list[Result]) -> dict[str, Any]:
    """Counts of some cases of one tool."""
    wrong = [result for result in results if result.outcome == "wrong"]
    right = [result for result in results if result.outcome == "right"]
    detached = [result.detached for result in results if result.detached is not None]
    unmerged = [result.unmerged for result in results if result.unmerged is not None]
    return {
        "cases": len(results),
        "right": len(right),
        "wrong": len(wrong),
        "wrong_in_shape": sum(result.other_shape for result in wrong),
        "wrong_though_attached_equals_merged": sum(result.attached_merged <= TOLERANCE for result in wrong),
        "wrong_with_a_warning": sum(bool(result.warned) for result in wrong),
        "refused": sum(result.outcome == "refused" for result in results),
        "refused_to_merge_but_attached_right": sum(
            result.outcome == "refused" and result.attached_formula is not None and result.attached_formula <= TOLERANCE
            for result in results
        ),
        "smallest_effect_right": min((result.effect for result in right), default=None),
        "largest_difference_right": max((result.difference for result in right), default=None),
        "smallest_difference_wrong": min((result.difference for result in wrong), default=None),
        "largest_difference_wrong": max((result.difference for result in wrong), default=None),
        "detached": [sum(detached), len(detached)],
        "unmerged": [sum(unmerged), len(unmerged)],
    }


def refusals(results: list[Result]) -> dict[str, int]:
    """Messages by how often they came; numbers and arguments that differ from case to case are left out."""
    messages = [re.sub(r"\(.*\)", "(...)", result.message) for result in results if result.message]
    return dict(Counter(re.sub(r"\b\d+\b", "N", message) for message in messages).most_common())


def measure(cases: list[Case], names: list[str]) -> dict[str, Any]:
    """All figures, as plain JSON values."""
    tools: dict[str, Any] = {}
    for name in names:
        try:
            tool = TOOLS[name]()
        except ImportError as error:
            tools[name] = {"version": None, "gap": f"not installed ({first_line(error)})"}
            continue
        start = time.perf_counter()
        mine = [case for case in cases if case.kind in tool.kinds]
        with torch.no_grad():
            results = [run(tool, case) for case in mine]
        pairs = list(zip(mine, results, strict=True))
        layers = list(dict.fromkeys(case.layer for case in mine))
        traits = dict.fromkeys(case.trait for case in mine if case.layer in CONVOLUTIONS[:3])
        worst = [pair for pair in pairs if pair[1].outcome == "wrong"]
        worst.sort(key=lambda pair: -pair[1].difference)
        tools[name] = {
            "version": tool.version,
            "kinds": tool.kinds,
            "seconds": time.perf_counter() - start,
            "all": summary(results),
            "layers": {layer: summary([r for case, r in pairs if case.layer == layer]) for layer in layers},
            "convolutions": {
                trait: summary([r for case, r in pairs if case.trait == trait and case.layer in CONVOLUTIONS[:3]])
                for trait in traits
            },
            "refusals": refusals(results),
            "worst": [{"case": str(case), **asdict(result)} for case, result in worst[:5]],
            "not_right": [{"case": str(case), **asdict(result)} for case, result in pairs if result.outcome != "right"],
        }
    return {
        "schema": "loraio/bench/correctness/1",
        "rank": RANK,
        "alpha": ALPHA,
        "tolerance": TOLERANCE,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "machine": platform.machine(),
        "cases": len(cases),
        "tools": tools,
    }


def table(rows: dict[str, dict[str, Any]]) -> Iterator[str]:
    """One line for each summary."""
    heads = f"{'cases':>6} {'right':>6} {'wrong':>6} {'refused':>8} {'largest':>9} {'detached':>12} {'unmerged':>12}"
    yield f"  {'':<20} {heads}"
    for name, row in rows.items():
        largest = row["largest_difference_wrong"]
        back = [f"{k} of {n}" if n else "-" for k, n in (row["detached"], row["unmerged"])]
        yield (
            f"  {name:<20} {row['cases']:6d} {row['right']:6d} {row['wrong']:6d} {row['refused']:8d} "
            f"{'-' if largest is None else format(largest, '9.3g'):>9} {back[0]:>12} {back[1]:>12}"
        )


def report(found: dict[str, Any]) -> Iterator[str]:
    """The tables for a person."""
    yield (
        f"{found['cases']:,} cases, float32, rank {RANK}, alpha {ALPHA}, torch {found['versions']['torch']}, CPU, "
        f"{found['threads']} thread; right: within {TOLERANCE:g} of the mean output"
    )
    for name, tool in found["tools"].items():
        if "gap" in tool:
            yield f"\n{name}: {tool['gap']}"
            continue
        yield f"\n{name} {tool['version']}, {' and '.join(tool['kinds'])}, {tool['seconds']:.0f} s"
        yield from table({**tool["layers"], "all": tool["all"]})
        yield "  Conv1d, 2d and 3d by what is special about them:"
        yield from table(tool["convolutions"])
        whole = tool["all"]
        yield (
            f"  largest difference called right {whole['largest_difference_right'] or 0:.2g}, "
            f"smallest called wrong {whole['smallest_difference_wrong'] or 0:.2g}; "
            f"smallest effect of an adapter {whole['smallest_effect_right'] or 0:.2g}"
        )
        yield (
            f"  wrong although attached equals merged: {whole['wrong_though_attached_equals_merged']}; "
            f"of another shape: {whole['wrong_in_shape']}; wrong after a warning: {whole['wrong_with_a_warning']}; "
            f"merge refused, attached right: {whole['refused_to_merge_but_attached_right']}"
        )
        for worst in tool["worst"][:1]:
            yield f"  worst: {worst['case']}"
        for message, count in tool["refusals"].items():
            yield f"  {count:5d} x {message[:150]}"


def main() -> None:
    """Measure and print; exit code 1 if loraio is wrong, refuses, or leaves a bit changed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", choices=list(TOOLS), default=list(TOOLS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(grid(quick=options.quick), options.tools)
    print(json.dumps(found) if options.json else "\n".join(report(found)))
    own = found["tools"].get("loraio", {}).get("all")
    good = own is None or (
        own["right"] == own["cases"] and all(own[way] == [own["cases"]] * 2 for way in ("detached", "unmerged"))
    )
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()

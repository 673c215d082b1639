"""``loraio verify``: check a merged checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from loraio.cli import _options, _output

if TYPE_CHECKING:
    from loraio.merging.verification import Report


@click.command(epilog=_options.example("loraio verify base.safetensors one.safetensors merged.safetensors"))
@click.argument("base", type=click.Path())
@click.argument("adapter", type=click.Path())
@click.argument("merged", type=click.Path())
@_options.dataset_option(default=None, text="Compare outputs on the test images of this data set.")
@click.option("--random", "samples", type=_options.Count(min=1), default=None, help="Random inputs.  [default: 256]")
@_options.data_root_option
@_options.adapter_options
@_options.seed_option
@_options.json_option
def verify(
    base: str,
    adapter: str,
    merged: str,
    dataset: str | None,
    samples: int | None,
    data_root: str | None,
    strength: float,
    allow_base_mismatch: bool,
    alpha: float | None,
    seed: int,
    model: str | None,
    model_args: dict[str, Any] | None,
    as_json: bool,
) -> None:
    """Check MERGED against BASE and ADAPTER.

    Every weight is checked, and the outputs. If one is wrong, the exit code is 3. If the network gives another answer
    for the same input on this machine, the weights alone decide.
    """
    import loraio
    from loraio.bases.checkpoints import fitted
    from loraio.bases.models import network_for
    from loraio.formats.conversion import load_for

    if dataset is not None and samples is not None:
        raise click.UsageError("--dataset and --random exclude each other")
    before, after = loraio.read_base(base).for_network(model, model_args), loraio.read_base(merged)
    loaded = load_for(adapter, before, alpha=alpha, allow_base_mismatch=allow_base_mismatch)
    before, after = (fitted(checkpoint, loaded.targets) for checkpoint in (before, after))
    _output.note_stripped(before.stripped, as_json=as_json)
    if model_args is not None and model is None and before.network is None:
        raise click.UsageError("--model-args needs --model, since BASE does not name its network")
    named = model is not None or before.network is not None
    report = loraio.verify(
        before.state,
        loaded,
        after.state,
        strength,
        model=network_for(before) if named else None,
        inputs=loraio.load_dataset(dataset, "test", root=data_root).images if dataset is not None else None,
        samples=samples or 256,
        seed=seed,
        allow_base_mismatch=allow_base_mismatch,
        exact=after.merged_exactly,
    )
    if as_json:
        _output.print_json(
            "verify",
            {
                "ok": report.ok,
                "strength": strength,
                "exact": after.merged_exactly,
                "stripped": before.stripped,
                "weights": {"ok": report.weights.ok, **asdict(report.weights)},
                "outputs": report.outputs and {"ok": report.outputs.ok, **asdict(report.outputs)},
                "nondeterministic": report.nondeterministic and asdict(report.nondeterministic),
            },
        )
    else:
        for line in _lines(report, exact=after.merged_exactly):
            _output.line(line)
    if not report.ok:
        _options.say_no()


def _lines(report: Report, *, exact: bool) -> list[str]:
    weights, outputs = report.weights, report.outputs
    wrong = f"{weights.not_correctly_rounded:,}, the worst weight off by {weights.max_ulp:.3g} ulp"
    lines = [
        f"weights: {'ok' if weights.ok else 'WRONG'}{'' if exact else ', as far as float32 sums go'}",
        f"  folded tensors: {weights.folded}, with {weights.values:,} values",
        f"  not correctly rounded: {wrong}",
        *([f"  tensors that must be the adapter's own: {weights.replaced}"] if weights.replaced else []),
        f"  tensors that must be untouched: {weights.untouched}",
        *(f"  {problem}" for problem in weights.problems),
    ]
    if report.nondeterministic is not None:
        lines += [
            "outputs: not compared",
            "  this network gives another answer for the same input on this machine,",
            f"  first in {report.nondeterministic}; the merge is not to blame",
        ]
    elif outputs is None:
        lines.append("outputs: not run, since the weights do not fit the network")
    else:
        lines += [
            f"outputs: {'ok' if outputs.ok else 'WRONG'}, merged against attached on {outputs.samples:,} inputs",
            f"  largest difference: {outputs.max_abs:.3g}, allowed {outputs.bound:.2g}",
            f"  the adapter's own effect: {outputs.effect:.3g}",
            f"  the same answer: {outputs.argmax_agreement:.2%}",
        ]
    verified = "verified" if report.nondeterministic is None else "weights verified"
    return [*lines, verified if report.ok else "NOT VERIFIED"]

"""``loraio verify``: is a merged checkpoint what it should be."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from loraio.cli import _options, _output

if TYPE_CHECKING:
    from loraio.merging.verification import Report

FAILED = 3
"""Exit code when the check ran and says no."""


@click.command(epilog=_options.example("loraio verify base.safetensors three.safetensors merged.safetensors"))
@click.argument("base", type=click.Path())
@click.argument("adapter", type=click.Path())
@click.argument("merged", type=click.Path())
@_options.dataset_option(default=None, text="Compare outputs on the test images of this data set.")
@click.option("--random", "samples", type=click.IntRange(min=1), default=None, help="Random inputs.  [default: 256]")
@_options.data_root_option
@_options.strength_option
@_options.mismatch_option
@_options.alpha_option
@_options.seed_option
@_options.model_option
@_options.json_option
@click.pass_context
def verify(
    ctx: click.Context,
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

    Every weight is checked, and the outputs. Exit code 3 says no. The weights alone
    decide if the network gives another answer for the same input on this machine.
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
    inputs = loraio.load_dataset(dataset, "test", root=data_root).images if dataset is not None else None
    report = loraio.verify(
        before.state,
        loaded,
        after.state,
        strength,
        model=network_for(before) if named else None,
        inputs=inputs,
        samples=samples or 256,
        seed=seed,
        allow_base_mismatch=allow_base_mismatch,
        exact=after.merged_exactly,
    )
    if as_json:
        weights = {"ok": report.weights.ok, **asdict(report.weights)}
        outputs = report.outputs and {"ok": report.outputs.ok, **asdict(report.outputs)}
        facts = {
            "ok": report.ok,
            "strength": strength,
            "exact": after.merged_exactly,
            "stripped": before.stripped,
            "weights": weights,
            "outputs": outputs,
            "nondeterministic": report.nondeterministic and asdict(report.nondeterministic),
        }
        _output.print_json("verify", facts)
    else:
        _print(report, exact=after.merged_exactly)
    if not report.ok:
        ctx.exit(FAILED)


def _print(report: Report, *, exact: bool) -> None:
    weights, outputs = report.weights, report.outputs
    _output.line(f"weights: {'ok' if weights.ok else 'WRONG'}{'' if exact else ', as far as float32 sums go'}")
    _output.line(f"  folded tensors: {weights.folded}, with {weights.values:,} values")
    _output.line(
        f"  not correctly rounded: {weights.not_correctly_rounded:,}, the worst weight off by {weights.max_ulp:.3g} ulp"
    )
    if weights.replaced:
        _output.line(f"  tensors that must be the adapter's own: {weights.replaced}")
    _output.line(f"  tensors that must be untouched: {weights.untouched}")
    for problem in weights.problems:
        _output.line(f"  {problem}")
    if report.nondeterministic is not None:
        _output.line("outputs: not compared")
        _output.line("  this network gives another answer for the same input on this machine,")
        _output.line(f"  first in {report.nondeterministic}; the merge is not to blame")
    elif outputs is None:
        _output.line("outputs: not run, since the weights do not fit the network")
    else:
        _output.line(
            f"outputs: {'ok' if outputs.ok else 'WRONG'}, merged against attached on {outputs.samples:,} inputs"
        )
        _output.line(f"  largest difference: {outputs.max_abs:.3g}, it may be {outputs.bound:.2g}")
        _output.line(f"  the adapter's own effect: {outputs.effect:.3g}")
        _output.line(f"  the same answer: {outputs.argmax_agreement:.2%}")
    verified = "weights verified" if report.nondeterministic is not None else "verified"
    _output.line(verified if report.ok else "NOT VERIFIED")

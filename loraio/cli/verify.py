"""``loraio verify``: is a merged checkpoint what it should be."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from loraio.cli import _options, _output

if TYPE_CHECKING:
    from loraio.verification import Report

FAILED = 3
"""Exit code when the check ran and says no."""


@click.command()
@click.argument("base", type=click.Path())
@click.argument("adapter", type=click.Path())
@click.argument("merged", type=click.Path())
@_options.dataset_option(default=None, text="Compare outputs on the test images of this data set.")
@click.option("--random", "samples", type=click.IntRange(min=1), default=None, help="Random inputs.  [default: 256]")
@_options.data_root_option
@_options.strength_option
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
    seed: int,
    model: str | None,
    as_json: bool,
) -> None:
    """Check MERGED against BASE and ADAPTER: every weight, and the outputs. Exit code 3 says no.

    \b
    Example:
      loraio verify base.safetensors three.safetensors merged.safetensors
    """
    import loraio

    if dataset is not None and samples is not None:
        raise click.UsageError("--dataset and --random exclude each other")
    before, loaded, after = loraio.read_base(base), loraio.load(adapter), loraio.read_base(merged)
    inputs = loraio.load_dataset(dataset, "test", root=data_root).images if dataset is not None else None
    report = loraio.verify(
        before.state,
        loaded,
        after.state,
        strength,
        model=model or before.network,
        inputs=inputs,
        samples=samples or 256,
        seed=seed,
    )
    if as_json:
        weights = {"ok": report.weights.ok, **asdict(report.weights)}
        outputs = {"ok": report.outputs.ok, **asdict(report.outputs)}
        facts = {"ok": report.ok, "strength": strength, "weights": weights, "outputs": outputs}
        _output.print_json("verify", facts)
    else:
        _print(report)
    if not report.ok:
        ctx.exit(FAILED)


def _print(report: Report) -> None:
    weights, outputs = report.weights, report.outputs
    click.echo(
        f"weights: {'ok' if weights.ok else 'WRONG'}; {weights.values:,} in {weights.folded} folded tensors, "
        f"{weights.not_correctly_rounded:,} not correctly rounded, the worst {weights.max_ulp:.3g} ulp; "
        f"{weights.untouched} tensors untouched"
    )
    for problem in weights.problems:
        click.echo(f"  {problem}")
    click.echo(
        f"outputs: {'ok' if outputs.ok else 'WRONG'}; merged against attached on {outputs.samples:,} inputs: "
        f"max difference {outputs.max_abs:.3g} (bound {outputs.bound:.2g}), the adapter's effect is "
        f"{outputs.effect:.3g}; argmax agreement {outputs.argmax_agreement:.2%}"
    )
    click.echo("verified" if report.ok else "NOT VERIFIED")

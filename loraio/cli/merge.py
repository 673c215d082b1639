"""``loraio merge``: fold an adapter into a base for good."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from loraio.cli import _options, _output


@click.command(epilog=_options.example("loraio merge base.safetensors three.safetensors -o merged.safetensors"))
@click.argument("base", type=click.Path())
@click.argument("adapter", type=click.Path())
@click.option("-o", "--output", type=click.Path(dir_okay=False), required=True, help="The merged checkpoint to make.")
@_options.strength_option
@_options.mismatch_option
@_options.force_option
@_options.json_option
def merge(
    base: str, adapter: str, output: str, strength: float, allow_base_mismatch: bool, force: bool, as_json: bool
) -> None:
    """Fold ADAPTER into BASE for good.

    Each weight becomes W + strength * scale * (B @ A), rounded once. The weights of what was
    written are verified before the file gets its name.
    """
    import loraio

    merged = loraio.merge_file(
        base,
        adapter,
        output,
        strength=strength,
        overwrite=force,
        allow_base_mismatch=allow_base_mismatch,
        allow_noop=force,
    )
    weights = merged.weights
    facts: dict[str, Any] = {"folded": weights.folded, "replaced": weights.replaced, "untouched": weights.untouched}
    facts["max_ulp"] = weights.max_ulp
    facts |= {"stripped": merged.stripped, "landing": asdict(merged.landing), "base_mismatch": list(merged.mismatch)}
    _output.note_stripped(merged.stripped, as_json=as_json)
    for line in () if as_json else merged.mismatch:
        _output.note(f"note: another base: {line}")
    if as_json:
        _output.print_json("merge", {"file": output, "sha256": merged.sha256, "strength": strength, **facts})
        return
    click.echo(
        f"{output}: {weights.folded} tensors folded, "
        f"{f'{weights.replaced} replaced, ' if weights.replaced else ''}{weights.untouched} left bit-identical;\n"
        f"the worst weight is {weights.max_ulp:.3g} ulp from the exact sum\n{merged.landing}"
    )

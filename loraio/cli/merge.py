"""``loraio merge``: fold an adapter into a base for good."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from loraio.cli import _options, _output

if TYPE_CHECKING:
    from loraio.merging.on_files import MergedFile

LARGE = 0.5
"""Share of the base above which the size of a residue gets a note."""


@click.command(epilog=_options.example("loraio merge base.safetensors one.safetensors -o merged.safetensors"))
@click.argument("base", type=click.Path())
@click.argument("adapter", type=click.Path())
@click.option(
    "-o",
    "--output",
    type=click.Path(),
    required=True,
    help="Merged checkpoint: a file; for a sharded base a folder, an index in a folder, or *.safetensors.",
)
@_options.adapter_options
@click.option(
    "--fast", is_flag=True, help="Sum in float32: faster, but not the nearest float nor the attached adapter's bits."
)
@click.option(
    "--reversible", is_flag=True, help="Also write OUTPUT.residue, so that loraio unmerge does not need BASE."
)
@_options.workers_option
@click.option(
    "--force",
    is_flag=True,
    help="Replace an existing output; merge an adapter that changes nothing, that was merged already, or that was made "
    "for the base before its merges.",
)
@_options.json_option
def merge(
    base: str, adapter: str, output: str, strength: float, fast: bool, force: bool, as_json: bool, **settings: Any
) -> None:
    """Fold ADAPTER into BASE for good.

    Each weight becomes W + strength * scale * (B @ A), summed in float64 and rounded once. The written weights are
    verified before the file gets its name. A sharded base gives the same shards; after a kill, the same command
    continues with the first unfinished shard.
    """
    import loraio

    with _output.byte_progress(output, as_json=as_json) as progress:
        merged = loraio.merge_file(
            base,
            adapter,
            output,
            strength=strength,
            overwrite=force,
            allow_noop=force,
            force=force,
            exact=not fast,
            progress=progress,
            **settings,
        )
    if as_json:
        given = {"file": output, "sha256": merged.sha256, "strength": strength, "fast": fast}
        _output.print_json("merge", {**given, **_facts(merged)})
    else:
        _print(merged, output, reference="the range of float32 sums" if fast else "the exact sum")


def _facts(merged: MergedFile) -> dict[str, Any]:
    residue = merged.residue
    sizes = residue and {key: getattr(residue, key) for key in ("bytes", "bits_per_weight", "share")}
    return {
        **{key: getattr(merged.weights, key) for key in ("folded", "replaced", "untouched", "max_ulp")},
        "stripped": merged.stripped,
        "landing": asdict(merged.effect),
        "base_mismatch": merged.mismatch,
        "forced": merged.receipt.forced,
        "parts": [str(part) for part in merged.parts],
        "reused": merged.reused,
        "residue": residue and {"file": str(residue.path), **(sizes or {})},
    }


def _print(merged: MergedFile, output: str, *, reference: str) -> None:
    weights, residue = merged.weights, merged.residue
    _output.note_stripped(merged.stripped, as_json=False)
    if merged.reused:
        _output.notes([f"{merged.reused} of {len(merged.parts)} shards had been finished by an earlier run"])
    _output.notes(f"forced: {line}" for line in merged.receipt.forced)
    _output.notes(f"another base: {line}" for line in merged.mismatch)
    replaced = f"{weights.replaced} replaced, " if weights.replaced else ""
    _output.line(f"{output}: {weights.folded} tensors folded, {replaced}{weights.untouched} left bit-identical;")
    _output.line(f"the worst weight is {weights.max_ulp:.3g} ulp from {reference}")
    _output.line(str(merged.effect))
    if residue is not None:
        about = f"{_output.size(residue.bytes)}, {residue.bits_per_weight:.3g} bits for each folded weight"
        _output.line(f"{residue.path}: {about}, {residue.share:.2%} of the base")
        if residue.share > LARGE:
            _output.notes(["little of the base is left: the residue is nearly as large as the base itself"])

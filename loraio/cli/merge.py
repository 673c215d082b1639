"""``loraio merge``: fold an adapter into a base for good."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from loraio.cli import _options, _output

if TYPE_CHECKING:
    from loraio.merging.residue_files import Residue


LARGE = 0.5
"""A residue of more than this share of the base is remarked upon."""


@click.command(epilog=_options.example("loraio merge base.safetensors three.safetensors -o merged.safetensors"))
@click.argument("base", type=click.Path())
@click.argument("adapter", type=click.Path())
@click.option(
    "-o",
    "--output",
    type=click.Path(),
    required=True,
    help="The merged checkpoint to make: a file; of a parted base a folder, or an index in one, or *.safetensors.",
)
@_options.strength_option
@_options.mismatch_option
@_options.alpha_option
@_options.model_option
@click.option(
    "--fast", is_flag=True, help="Sum in float32: no longer the nearest float, nor the bits of the attached adapter."
)
@click.option(
    "--reversible",
    is_flag=True,
    help="Also write OUTPUT.residue, with which loraio unmerge gives BASE back without it.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=None,
    help="Threads.  [default: one for each processor, at most 4]",
)
@click.option(
    "--force",
    is_flag=True,
    help="Replace an existing output; merge what changes nothing, what was merged already, or onto a merged file.",
)
@_options.json_option
def merge(
    base: str,
    adapter: str,
    output: str,
    strength: float,
    allow_base_mismatch: bool,
    fast: bool,
    reversible: bool,
    alpha: float | None,
    model: str | None,
    model_args: dict[str, Any] | None,
    workers: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Fold ADAPTER into BASE for good.

    Each weight becomes W + strength * scale * (B @ A), in float64 and rounded once. The weights of what was
    written are verified before the file gets its name. A base in several parts gives the same
    parts; one that was killed goes on where it was.
    """
    import loraio

    with _output.byte_progress(output, as_json=as_json) as progress:
        merged = loraio.merge_file(
            base,
            adapter,
            output,
            strength=strength,
            overwrite=force,
            allow_base_mismatch=allow_base_mismatch,
            allow_noop=force,
            force=force,
            exact=not fast,
            reversible=reversible,
            workers=workers,
            model=model,
            model_args=model_args,
            alpha=alpha,
            progress=progress,
        )
    weights = merged.weights
    facts: dict[str, Any] = {"folded": weights.folded, "replaced": weights.replaced, "untouched": weights.untouched}
    facts["max_ulp"] = weights.max_ulp
    facts |= {"stripped": merged.stripped, "landing": asdict(merged.effect), "base_mismatch": list(merged.mismatch)}
    facts |= {
        "forced": list(merged.receipt.forced),
        "parts": [str(part) for part in merged.parts],
        "reused": merged.reused,
    }
    facts["residue"] = _residue_facts(merged.residue)
    _output.note_stripped(merged.stripped, as_json=as_json)
    if merged.reused and not as_json:
        _output.note(f"note: {merged.reused} of {len(merged.parts)} parts had been finished by an earlier run")
    for line in () if as_json else merged.receipt.forced:
        _output.note(f"note: forced: {line}")
    for line in () if as_json else merged.mismatch:
        _output.note(f"note: another base: {line}")
    if as_json:
        _output.print_json(
            "merge", {"file": output, "sha256": merged.sha256, "strength": strength, "fast": fast, **facts}
        )
        return
    reference = "what a float32 sum may be" if fast else "the exact sum"
    _output.line(
        f"{output}: {weights.folded} tensors folded, "
        f"{f'{weights.replaced} replaced, ' if weights.replaced else ''}{weights.untouched} left bit-identical;"
    )
    _output.line(f"the worst weight is {weights.max_ulp:.3g} ulp from {reference}")
    _output.line(str(merged.effect))
    if merged.residue is not None:
        kept = merged.residue
        _output.line(
            f"{kept.path}: {_output.size(kept.bytes)}, {kept.bits_per_weight:.3g} bits for each folded weight, "
            f"{kept.share:.2%} of the base"
        )
        if kept.share > LARGE:
            _output.note("note: little of the base is left: the residue is nearly as large as the base itself")


def _residue_facts(residue: Residue | None) -> dict[str, Any] | None:
    if residue is None:
        return None
    sizes = {"bytes": residue.bytes, "bits_per_weight": residue.bits_per_weight, "share": residue.share}
    return {"file": str(residue.path), **sizes}

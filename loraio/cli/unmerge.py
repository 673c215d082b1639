"""``loraio unmerge``: take a merge back, and prove that the base came out."""

from __future__ import annotations

from typing import Any

import click

from loraio.cli import _options, _output


@click.command(
    epilog=_options.example("loraio unmerge merged.safetensors --base base.safetensors -o again.safetensors")
)
@click.argument("merged", type=click.Path())
@click.argument("adapter", type=click.Path(), required=False)
@click.option("--base", type=click.Path(), default=None, help="What MERGED was before: its tensors are the output's.")
@click.option(
    "-o",
    "--output",
    type=click.Path(),
    required=True,
    help="The base to make: a file; of a parted one a folder, or an index in one, or *.safetensors.",
)
@click.option("--all", "every", is_flag=True, help="Take all merges back, not the last one alone; with --base.")
@click.option("--residue", type=click.Path(), default=None, help="The residue of the merge.  [default: MERGED.residue]")
@_options.alpha_option
@_options.model_option
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=None,
    help="Threads.  [default: one for each processor, at most 4]",
)
@_options.force_option
@_options.json_option
def unmerge(
    merged: str,
    adapter: str | None,
    base: str | None,
    output: str,
    every: bool,
    residue: str | None,
    alpha: float | None,
    model: str | None,
    model_args: dict[str, Any] | None,
    workers: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write what MERGED was before its last merge, bit for bit.

    With --base, which is proven to be the one; or with ADAPTER, the one that was merged last, and the residue that
    loraio merge --reversible wrote. MERGED must be what its receipts left, and the output has the digest that the
    receipt names before it gets its name.
    """
    import loraio

    if (adapter is None) == (base is None):
        raise click.UsageError("give ADAPTER or --base, one of the two")
    with _output.byte_progress(output, as_json=as_json) as progress:
        done = loraio.unmerge_file(
            merged,
            output,
            base=base,
            adapter=adapter,
            residue=residue,
            every=every,
            overwrite=force,
            workers=workers,
            model=model,
            model_args=model_args,
            alpha=alpha,
            progress=progress,
        )
    if as_json:
        facts: dict[str, Any] = {"file": output, "sha256": done.sha256, "parts": [str(part) for part in done.parts]}
        lists = {"taken_off": done.taken_off, "left": done.left}
        facts |= {key: [receipt.document() for receipt in receipts] for key, receipts in lists.items()}
        _output.print_json("unmerge", facts)
        return
    count = len(done.taken_off)
    _output.line(f"{output}: the base bit for bit, sha256 {done.sha256}")
    _output.line(f"{count} merge{'s' if count > 1 else ''} taken back, {len(done.left)} left")

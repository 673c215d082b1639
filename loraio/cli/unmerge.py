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
@click.option("--base", type=click.Path(), default=None, help="The base before the merge.")
@click.option(
    "-o",
    "--output",
    type=click.Path(),
    required=True,
    help="Base to write: a file; for a sharded one a folder, an index in a folder, or *.safetensors.",
)
@click.option("--all", "every", is_flag=True, help="Take back all merges instead of the last one; needs --base.")
@click.option("--residue", type=click.Path(), default=None, help="Residue of the merge.  [default: MERGED.residue]")
@_options.alpha_option
@_options.model_option
@_options.workers_option
@_options.force_option
@_options.json_option
def unmerge(
    merged: str, adapter: str | None, base: str | None, output: str, force: bool, as_json: bool, **settings: Any
) -> None:
    """Write the state of MERGED before its last merge, bit for bit.

    Give --base, the base before the merge. Or give ADAPTER, the adapter that was merged last, and keep beside MERGED
    the residue that loraio merge --reversible wrote. The receipts of MERGED must describe its weights. The output
    gets its name once its digest is that of the receipt.
    """
    import loraio

    if (adapter is None) == (base is None):
        raise click.UsageError("give ADAPTER or --base, one of the two")
    with _output.byte_progress(output, as_json=as_json) as progress:
        done = loraio.unmerge_file(
            merged, output, base=base, adapter=adapter, overwrite=force, progress=progress, **settings
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

"""``loraio convert``: an adapter in another tool's layout, with a line on everything that it says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from loraio.cli import _options, _output

if TYPE_CHECKING:
    from loraio.formats.report import Report

LOST = 3
"""Exit code when something has no place in the output."""


@click.command(epilog=_options.example("loraio convert three.safetensors -o three-peft --to peft"))
@click.argument("adapter", type=click.Path())
@click.option("-o", "--output", required=True, type=click.Path(), help="What to make: a file; for peft a folder.")
@click.option(
    "--to",
    required=True,
    metavar="DIALECT",
    help="native, or another tool's: peft, lycoris, kohya, diffusers, torchtune, minlora, loralib.",
)
@click.option("--base", type=click.Path(), default=None, help="The base; adapters of other tools need it.")
@_options.alpha_option
@click.option(
    "--enable-lora",
    type=_options.Flags(),
    default=None,
    help="Parts of the output that a MergedLinear of loralib adapts, such as 1,0,1; its files do not say it.",
)
@click.option("--lossy", is_flag=True, help="Leave out what has no place in the output.")
@click.option("--approximate", is_flag=True, help="Make pairs of layers that are none (LoHa, LoKr); says the error.")
@click.option("--rank", type=click.IntRange(min=1), default=None, help="Of those pairs; else the file's own.")
@click.option("--as-full-delta", is_flag=True, help="Write the whole change of each weight; for lycoris.")
@click.option("--prefix", default=None, help="In front of the names of modules; for kohya, lycoris and diffusers.")
@_options.mismatch_option
@click.option("--dry-run", is_flag=True, help="Print the report, write nothing.")
@_options.model_option
@_options.force_option
@_options.json_option
@click.pass_context
def convert(
    ctx: click.Context,
    adapter: str,
    output: str,
    to: str,
    base: str | None,
    alpha: float | None,
    enable_lora: tuple[bool, ...] | None,
    lossy: bool,
    approximate: bool,
    rank: int | None,
    as_full_delta: bool,
    prefix: str | None,
    allow_base_mismatch: bool,
    dry_run: bool,
    model: str | None,
    model_args: dict[str, Any] | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write ADAPTER as another tool has it.

    Says what became of each tensor and each setting. Where something would be lost nothing is
    written and the exit code is 3, unless --lossy.
    """
    import loraio

    made = loraio.convert(
        adapter,
        output,
        to=to,
        base=base,
        model=model,
        model_args=model_args,
        alpha=alpha,
        enable_lora=enable_lora,
        lossy=lossy,
        approximate=approximate,
        rank=rank,
        as_full_delta=as_full_delta,
        prefix=prefix,
        allow_base_mismatch=allow_base_mismatch,
        dry_run=dry_run,
        overwrite=force,
    )
    if as_json:
        facts = {"from": made.source, "reason": made.reason, "to": made.dialect, "lost": made.lost, "done": made.done}
        reports = {"read": made.read.to_json(), "written": made.written.to_json(), "base_mismatch": list(made.mismatch)}
        _output.print_json("convert", {"file": output, **facts, **reports})
    else:
        _output.line(f"{adapter}: {made.source} adapter, by {made.reason}")
        for line in made.mismatch:
            _output.note(f"note: another base: {line}")
        _print("reading", made.read)
        _print("writing", made.written)
        _output.line(f"{output}: {to} adapter" if made.done else "nothing written")
    if made.lost and not lossy:
        ctx.exit(LOST)


def _print(step: str, report: Report) -> None:
    for line in report.lines:
        _output.line(f"{step}: {line}")

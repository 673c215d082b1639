"""``loraio convert``: write an adapter in another tool's layout, and report on everything in it."""

from __future__ import annotations

from typing import Any

import click

from loraio.cli import _options, _output


@click.command(epilog=_options.example("loraio convert one.safetensors -o one-peft --to peft"))
@click.argument("adapter", type=click.Path())
@click.option("-o", "--output", required=True, type=click.Path(), help="Output file; for peft a folder.")
@click.option(
    "--to",
    required=True,
    metavar="DIALECT",
    help="native, or another tool's: peft, lycoris, kohya, diffusers, torchtune, minlora, loralib.",
)
@click.option("--base", type=click.Path(), default=None, help="The base; needed to read other tools' adapters.")
@_options.alpha_option
@click.option(
    "--enable-lora",
    type=_options.Parsed("flags", _options.flags),
    default=None,
    help="Which parts of the output a MergedLinear of loralib adapts, such as 1,0,1; its files do not state it.",
)
@click.option("--lossy", is_flag=True, help="Leave out what the output cannot hold.")
@click.option("--approximate", is_flag=True, help="Make pairs of LoHa and LoKr layers, and report the error.")
@click.option("--rank", type=_options.Count(min=1), default=None, help="Rank of those pairs.  [default: the file's]")
@click.option("--as-full-delta", is_flag=True, help="Write the whole change of each weight; for lycoris.")
@click.option("--prefix", default=None, help="Prefix of the module names; for kohya, lycoris and diffusers.")
@_options.mismatch_option
@click.option("--dry-run", is_flag=True, help="Print the report and write nothing.")
@_options.model_option
@_options.force_option
@_options.json_option
def convert(adapter: str, output: str, to: str, lossy: bool, force: bool, as_json: bool, **settings: Any) -> None:
    """Write ADAPTER in another tool's layout.

    The report has a line for each tensor and each setting. If something would be lost, nothing is written and the
    exit code is 3, unless --lossy is given.
    """
    import loraio

    made = loraio.convert(adapter, output, to=to, lossy=lossy, overwrite=force, **settings)
    if as_json:
        facts = {"from": made.source, "reason": made.reason, "to": made.dialect, "lost": made.lost, "done": made.done}
        reports = {"read": made.read.to_json(), "written": made.written.to_json(), "base_mismatch": made.mismatch}
        _output.print_json("convert", {"file": output, **facts, **reports})
    else:
        _output.line(f"{adapter}: {made.source} adapter, by {made.reason}")
        _output.notes(f"another base: {line}" for line in made.mismatch)
        for step, report in (("reading", made.read), ("writing", made.written)):
            for line in report.lines:
                _output.line(f"{step}: {line}")
        _output.line(f"{output}: {to} adapter" if made.done else "nothing written")
    if made.lost and not lossy:
        _options.say_no()

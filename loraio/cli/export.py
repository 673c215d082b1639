"""``loraio export``: a checkpoint's network for other programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from loraio.cli import _options, _output
from loraio.cli.verify import FAILED


@click.command(epilog=_options.example("loraio export merged.safetensors -o merged.onnx"))
@click.argument("merged", type=click.Path())
@click.option("-o", "--output", type=click.Path(), required=True, help="The file to make: NAME.onnx or NAME.pt2.")
@_options.model_option
@click.option(
    "--input-shape",
    type=_options.Shape(),
    default=None,
    metavar="C,H,W",
    help="Shape of one input, without the batch.  [default: the network's usual one, where its name says it]",
)
@click.option("--opset", type=click.IntRange(min=1), default=None, help="ONNX opset.  [default: torch's]")
@click.option(
    "--batch",
    "batches",
    type=click.IntRange(min=1),
    multiple=True,
    help="A batch size to compare besides 1 and 3; may be repeated.",
)
@click.option(
    "--rtol",
    type=_options.Number(least=0),
    default=None,
    help="Share of the largest output that any may be off by.  [default: 2e-5 for float32, 1e-9 for float64, 1e-2 for "
    "float16, 5e-2 for bfloat16]",
)
@click.option(
    "--atol", type=_options.Number(least=0), default=0.0, show_default=True, help="What it may be off by besides."
)
@_options.seed_option
@_options.force_option
@_options.json_option
@click.pass_context
def export(
    ctx: click.Context,
    merged: str,
    output: str,
    model: str | None,
    model_args: dict[str, Any] | None,
    input_shape: tuple[int, ...] | None,
    opset: int | None,
    batches: tuple[int, ...],
    rtol: float | None,
    atol: float,
    seed: int,
    force: bool,
    as_json: bool,
) -> None:
    """Write the network of MERGED as ONNX or for torch.export.load.

    MERGED is a merged checkpoint or any other base. The file takes batches of any size. It is run
    on random inputs before it gets its name; exit code 3 says that it computes something else,
    and nothing was written. ONNX needs loraio[onnx].
    """
    import loraio
    from loraio.errors import VerificationError

    try:
        written = loraio.export(
            merged,
            output,
            model=model,
            model_args=model_args,
            input_shape=input_shape,
            opset=opset,
            batches=batches,
            seed=seed,
            rtol=rtol,
            atol=atol,
            overwrite=force,
        )
    except VerificationError as error:
        if as_json:
            _output.print_json("export", {"ok": False, "file": output, "problems": [error.message, *error.problems]})
        else:
            _output.failure(error)
        ctx.exit(FAILED)
    _output.note_stripped(written.stripped, as_json=as_json)
    if as_json:
        facts = {key: value for key, value in asdict(written).items() if key != "path"}
        _output.print_json("export", {"ok": True, "file": output, "problems": [], **facts, "max_abs": written.max_abs})
        return
    opset_text = f" opset {written.opset}" if written.opset else ""
    shape = ", ".join(map(str, written.input_shape))
    _output.line(f"{output}: {written.format}{opset_text}, {_output.size(written.bytes)}, inputs (batch, {shape})")
    sizes = ", ".join(map(str, written.batches))
    for found in written.outputs:
        line = (
            f"{found.name}: largest difference {found.max_abs:.3g} in batches of {sizes}, it may be {found.bound:.2g}"
        )
        agreement = found.argmax_agreement
        _output.line(line if agreement is None else f"{line}; the same answer: {agreement:.2%}")

"""``loraio export``: write a checkpoint's network for other programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from loraio.cli import _options, _output


@click.command(epilog=_options.example("loraio export merged.safetensors -o merged.onnx"))
@click.argument("merged", type=click.Path())
@click.option("-o", "--output", type=click.Path(), required=True, help="Output file: NAME.onnx or NAME.pt2.")
@_options.model_option
@click.option(
    "--input-shape",
    type=_options.Parsed("shape", _options.shape),
    default=None,
    metavar="C,H,W",
    help="Shape of one input, without the batch.  [default: the network's usual one, if its name tells it]",
)
@click.option("--opset", type=_options.Count(min=1), default=None, help="ONNX opset.  [default: torch's]")
@click.option(
    "--batch",
    "batches",
    type=_options.Count(min=1),
    multiple=True,
    help="A batch size to compare besides 1 and 3; repeatable.",
)
@click.option(
    "--rtol",
    type=_options.Number(least=0),
    default=None,
    help="Allowed difference, as a share of the largest output.  [default: 2e-5 for float32, 1e-9 for float64, 1e-2 "
    "for float16, 5e-2 for bfloat16]",
)
@click.option("--atol", type=_options.Number(least=0), default=0.0, help="Allowed difference besides.")
@_options.seed_option
@_options.force_option
@_options.json_option
def export(merged: str, output: str, force: bool, as_json: bool, **settings: Any) -> None:
    """Write the network of MERGED as ONNX or for torch.export.

    MERGED is a merged checkpoint or any other base. The file takes batches of any size. It runs on random inputs
    before it gets its name. If its outputs differ, the exit code is 3 and nothing is written. ONNX needs the extra
    loraio[onnx].
    """
    import loraio
    from loraio.errors import VerificationError

    try:
        written = loraio.export(merged, output, overwrite=force, **settings)
    except VerificationError as error:
        if as_json:
            _output.print_json("export", {"ok": False, "file": output, "problems": [error.message, *error.problems]})
        else:
            _output.failure(error)
        _options.say_no()
    _output.note_stripped(written.stripped, as_json=as_json)
    if as_json:
        facts = {key: value for key, value in asdict(written).items() if key != "path"}
        _output.print_json("export", {"ok": True, "file": output, "problems": [], **facts, "max_abs": written.max_abs})
        return
    opset = f" opset {written.opset}" if written.opset else ""
    shape, sizes = (", ".join(map(str, numbers)) for numbers in (written.input_shape, written.batches))
    _output.line(f"{output}: {written.format}{opset}, {_output.size(written.bytes)}, inputs (batch, {shape})")
    for found in written.outputs:
        line = f"{found.name}: largest difference {found.max_abs:.3g} in batches of {sizes}, allowed {found.bound:.2g}"
        agreement = found.argmax_agreement
        _output.line(line if agreement is None else f"{line}; same answer: {agreement:.2%}")

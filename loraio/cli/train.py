"""``loraio train``: adapters on a frozen base."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from loraio.cli import _options, _output

FILE_NAME = "digit-{}.safetensors"
"""Name of each file that ``--digit all`` makes."""


@click.command(epilog=_options.example("loraio train base.safetensors --digit 3 -o three.safetensors --dataset digits"))
@click.argument("base", type=click.Path())
@click.option(
    "--digit",
    type=_options.Digit(),
    metavar="N|all",
    required=True,
    help="The class to adapt to; all makes one file each.",
)
@click.option("-o", "--output", type=click.Path(), required=True, help="The adapter file; with --digit all a folder.")
@click.option("--rank", type=click.IntRange(min=1), default=4, show_default=True, help="Inner size of the factors, r.")
@click.option("--alpha", type=_options.Number(above=0), help="Above 0; scale is alpha / r.  [default: the rank]")
@click.option(
    "--targets",
    type=_options.Words(),
    default="conv",
    show_default=True,
    help="Weights to adapt, with commas: conv, linear, all, or globs such as 'conv[12]'.",
)
@click.option(
    "--focus",
    type=_options.Number(above=0, most=1),
    default=0.5,
    show_default=True,
    help="Share of each batch drawn from the digit, above 0 to 1; 1 teaches to answer it always.",
)
@click.option("--steps", type=click.IntRange(min=1), default=None, help="Batches.  [default: one pass over the data]")
@_options.lr_option
@click.option(
    "--schedule",
    default="constant",
    show_default=True,
    metavar="NAME",
    help="How the learning rate goes down: constant or cosine.",
)
@_options.batch_size_option
@click.option("--init", default="kaiming", show_default=True, metavar="NAME", help="Start of A: kaiming or gaussian.")
@_options.seed_option
@_options.dataset_option()
@_options.data_root_option
@_options.model_option
@_options.force_option
@_options.json_option
def train(
    base: str,
    digit: int | str,
    output: str,
    dataset: str,
    data_root: str | None,
    model: str | None,
    force: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train LoRA factors on a frozen BASE and save them alone."""
    import loraio

    config = loraio.TrainConfig(**settings)
    digits = [digit] if isinstance(digit, int) else None
    _check_outputs(base, output, digits, force=force)
    network = loraio.load_base(base, model=model)
    data, held_out = (loraio.load_dataset(dataset, split, root=data_root) for split in ("train", "test"))
    rows = []

    def save(n: int, adapter: loraio.Adapter) -> None:
        file = Path(output)
        if digits is None:
            file.mkdir(exist_ok=True)
            file /= FILE_NAME.format(n)
        loraio.save(adapter, file, overwrite=force)
        results = {key: adapter.training["results"][key] for key in ("before", "after")}
        rows.append({"file": str(file), "digit": n, "bytes": file.stat().st_size, **results})

    with _output.progress(lines=not as_json) as report:
        adapters = loraio.train_each(
            network, config, data, digits=digits, held_out=held_out, on_progress=report, on_trained=save
        )
    parameters = loraio.parameter_report(network, next(iter(adapters.values())))
    if as_json:
        _output.print_json("train", {"base": base, "parameters": parameters, "adapters": rows})
        return
    _print_rows(rows, f"{len(held_out):,} test images of {dataset}")
    click.echo(
        f"{parameters['adapted']:,} parameters in the adapted layers, {parameters['added']:,} added: "
        f"{parameters['percent']:.3f} %"
    )


def _check_outputs(base: str, output: str, digits: list[int] | None, *, force: bool) -> None:
    """Refuse before the training what could not be written after it."""
    from loraio.errors import OutputError
    from loraio.outputs import check_output

    if digits is not None:
        check_output(output, overwrite=force, inputs=[base])
    elif Path(output).is_file():
        raise OutputError(f"{output!r} is a file", hint="with --digit all the output is a folder")
    elif Path(output).is_dir():
        check_output(Path(output) / FILE_NAME.format(0), overwrite=True)  # may files be made in it at all?
        for file in sorted(Path(output).iterdir()):
            if re.fullmatch(FILE_NAME.format(r"\d+"), file.name):
                check_output(file, overwrite=force, inputs=[base])
    else:
        check_output(output)


def _print_rows(rows: list[dict[str, Any]], images: str) -> None:
    columns = ("", "size", "misread,\nbase", "misread,\nadapter", "accuracy,\nbase", "accuracy,\nadapter")
    table = _output.table(f"On {images}; misread: those of the adapter's own digit", columns)
    for row in rows:
        n, before, after = row["digit"], row["before"], row["after"]
        wrong = [str(result["wrong"][n]) for result in (before, after)]
        accuracy = [f"{result['accuracy']:.2%}" for result in (before, after)]
        table.add_row(row["file"], _output.size(row["bytes"]), *wrong, *accuracy)
    _output.console().print(table)

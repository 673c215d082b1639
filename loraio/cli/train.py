"""``loraio train``: train adapters on a frozen base."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from loraio.cli import _inputs, _options, _output, _training

FILE_NAME = "digit-{}.safetensors"
"""Name of each file that ``--digit all`` writes."""

FILE_OPTIONS = ("log", "tensorboard", "checkpoint", "checkpoint_every", "resume")
"""Options for `loraio.RunFiles`."""

IMAGE_OPTIONS = ("data_root", "image_size", "workers", "data_limit")
"""Options for `_inputs.read_images`."""


@click.command(epilog=_options.example("loraio train base.safetensors --digit 1 -o one.safetensors --dataset digits"))
@click.argument("base", type=click.Path())
@click.option(
    "--digit",
    type=_options.Parsed("digit", _options.digit),
    metavar="N|all",
    default=None,
    help="Number of the class to adapt to; all writes a file for each.  [default: one adapter for all classes]",
)
@click.option("--class", "class_name", metavar="NAME", default=None, help="Name of the class to adapt to.")
@click.option("-o", "--output", type=click.Path(), required=True, help="Adapter to write; with --digit all a folder.")
@_training.target_options
@_training.course_options
@_training.file_options
@_training.image_options
@_options.model_option
@_options.force_option
@_options.json_option
def train(
    base: str,
    digit: int | str | None,
    class_name: str | None,
    output: str,
    dataset: str,
    model: str | None,
    model_args: dict[str, Any] | None,
    force: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train an adapter on a frozen BASE."""
    import loraio
    from loraio.files.folders import make_folder
    from loraio.files.sharded import checkpoint_files

    if digit is not None and class_name is not None:
        raise click.UsageError("--digit and --class exclude each other")
    files = loraio.RunFiles(**{name: settings.pop(name) for name in FILE_OPTIONS}, overwrite=force)
    images = {name: settings.pop(name) for name in IMAGE_OPTIONS}
    config = _training.config_of(settings)
    every = digit == "all"

    def may_replace(n: int | str | None) -> bool:
        return force or (every and files.of(f"digit-{n}").resume)  # a killed run leaves the adapters that it finished

    _check_outputs(base, output, every=every, may_replace=may_replace)
    if not every:
        files.check(inputs=(*checkpoint_files(base), output))
    network, stripped = _inputs.load_network(base, model=model, model_args=model_args, as_json=as_json)
    data, held_out = (_inputs.read_images(network, dataset, split, images) for split in ("train", "test"))
    chosen = data.class_number(class_name) if class_name is not None else digit if isinstance(digit, int) else None
    rows: list[dict[str, Any]] = []

    def save(n: int | None, adapter: loraio.Adapter) -> None:
        file = Path(output)
        if every:
            make_folder(file)
            file /= FILE_NAME.format(n)
        loraio.save(adapter, file, overwrite=may_replace(n))
        results = {key: adapter.training["results"].get(key) for key in ("before", "after")}
        rows.append({"file": str(file), "digit": n, "bytes": file.stat().st_size, **results})

    with _output.progress(lines=not as_json) as report:
        adapters = loraio.train_each(
            network,
            config,
            data,
            digits=None if every else [chosen],
            held_out=held_out,
            files=files,
            on_progress=report,
            on_trained=save,
        )
    parameters = loraio.parameter_report(network, next(iter(adapters.values())))
    if as_json:
        _output.print_json("train", {"base": base, "stripped": stripped, "parameters": parameters, "adapters": rows})
        return
    _print_rows(rows, f"{len(held_out):,} test images of {dataset}")
    added = f"{parameters['added']:,} added: {parameters['percent']:.3f} %"
    _output.line(f"{parameters['adapted']:,} parameters in the adapted layers, {added}")
    if parameters["replaced"]:
        _output.line(f"{parameters['replaced']:,} numbers in tensors that are replaced whole")


def _check_outputs(base: str, output: str, *, every: bool, may_replace: Callable[[int | str | None], bool]) -> None:
    """Refuse outputs before the training that could not be written after it."""
    from loraio.errors import OutputError
    from loraio.files.atomic import check_output
    from loraio.files.sharded import checkpoint_files

    inputs = checkpoint_files(base)
    if not every:
        check_output(output, overwrite=may_replace(None), inputs=inputs)
    elif Path(output).is_file():
        raise OutputError(f"{output!r} is a file", hint="with --digit all the output is a folder")
    elif Path(output).is_dir():
        check_output(Path(output) / FILE_NAME.format(0), overwrite=True)  # can files be made in it?
        for file in sorted(Path(output).iterdir()):
            if found := re.fullmatch(FILE_NAME.format(r"(\d+)"), file.name):
                check_output(file, overwrite=may_replace(found[1]), inputs=inputs)
    else:
        check_output(output)


def _print_rows(rows: list[dict[str, Any]], images: str) -> None:
    columns = ("", "size", "misread,\nbase", "misread,\nadapter", "accuracy,\nbase", "accuracy,\nadapter")
    own = "of the own class" if rows[0]["digit"] is not None else "of all classes"
    table = _output.table(f"{images}; misread: {own}", columns)
    for row in rows:
        n, both = row["digit"], (row["before"], row["after"])
        wrong = ["-" if one is None else str(sum(one["wrong"]) if n is None else one["wrong"][n]) for one in both]
        accuracy = ["-" if one is None else f"{one['accuracy']:.2%}" for one in both]
        table.add_row(row["file"], _output.size(row["bytes"]), *wrong, *accuracy)
    _output.console().print(table)

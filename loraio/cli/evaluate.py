"""``loraio evaluate``: count right and wrong answers of a base and of any number of adapters."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loraio.cli import _inputs, _options, _output, _training

if TYPE_CHECKING:
    from loraio.training.evaluation import Evaluation


@click.command(epilog=_options.example("loraio evaluate base.safetensors --adapter one.safetensors --dataset digits"))
@click.argument("base", type=click.Path())
@click.option(
    "--adapter", "adapters", type=click.Path(), multiple=True, help="An adapter, or a folder of them; repeatable."
)
@_training.image_options
@click.option("--split", type=click.Choice(["test", "train"]), default="test", help="Which images to use.")
@_options.adapter_options
@_options.json_option
def evaluate(
    base: str,
    adapters: tuple[str, ...],
    dataset: str,
    split: str,
    strength: float,
    allow_base_mismatch: bool,
    alpha: float | None,
    model: str | None,
    model_args: dict[str, Any] | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Count the wrong answers of BASE, alone and with each adapter."""
    import loraio

    files = _named(_files(adapters))
    network, stripped = _inputs.load_network(base, model=model, model_args=model_args, as_json=as_json)
    loaded = {
        name: loraio.load(path, base=network, alpha=alpha, allow_base_mismatch=allow_base_mismatch)
        for name, path in files.items()
    }
    images = _inputs.read_images(network, dataset, split, settings)
    alone, results = loraio.evaluate_each(
        network, loaded, images, strength=strength, allow_base_mismatch=allow_base_mismatch
    )
    _output.note_effects(network, loaded, strength, allow_base_mismatch=allow_base_mismatch, as_json=as_json)
    own = {name: adapter.training.get("digit") for name, adapter in loaded.items()}
    if as_json:
        rows = {name: result.to_json() for name, result in results.items()}
        where = {"dataset": dataset, "split": split, "images": len(images), "stripped": stripped}
        _output.print_json("evaluate", {**where, "base": alone and alone.to_json(), "adapters": rows})
        return
    _output.line(f"{len(images):,} {split} images of {dataset}")
    _print_counts("Images of each class that were misread", alone, results, own, "wrong")
    _print_counts("Images of other classes that were read as it", alone, results, own, "false_alarms")


def _files(paths: Iterable[str]) -> list[Path]:
    """Return the adapters among the paths and in their folders; other files of a folder are ignored."""
    from loraio.errors import MissingFileError
    from loraio.formats import dialects
    from loraio.formats.sources import is_adapter_folder

    files: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir() or is_adapter_folder(path):
            files.append(path)
            continue
        candidates = [one for one in sorted(path.iterdir()) if one.suffix == ".safetensors" or one.is_dir()]
        inside = [one for one in candidates if dialects.is_adapter(one)]
        if not inside:
            raise MissingFileError(f"there is no adapter in the folder {str(path)!r}")
        files += inside
    return list(dict.fromkeys(files))


def _named(files: list[Path]) -> dict[str, Path]:
    """Return the files by their stem, or by their whole path if two have the same stem."""
    stems = [file.stem for file in files]
    return {str(file) if stems.count(file.stem) > 1 else file.stem: file for file in files}


def _print_counts(
    title: str, alone: Evaluation | None, results: dict[str, Evaluation], own: dict[str, int | None], field: str
) -> None:
    from rich.text import Text

    shown = {**({"base": alone} if alone else {}), **results}
    classes = range(len(next(iter(shown.values())).wrong))
    table = _output.table(title, ["", *map(str, classes), "all", "accuracy"])
    for name, result in shown.items():
        counts = getattr(result, field)
        cells = [Text(str(counts[n]), style="bold" if n == own.get(name) else "") for n in classes]
        table.add_row(name, *cells, str(sum(counts)), f"{result.accuracy:.2%}")
    _output.console().print(table)

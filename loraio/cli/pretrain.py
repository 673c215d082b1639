"""``loraio pretrain``: a base model from nothing."""

from __future__ import annotations

from pathlib import Path

import click

from loraio.cli import _options, _output


@click.command(epilog=_options.example("loraio pretrain -o base.safetensors --dataset digits --epochs 20"))
@click.option("-o", "--output", type=click.Path(dir_okay=False), required=True, help="The base checkpoint to make.")
@click.option("--model", default="digit-cnn", show_default=True, metavar="NAME", help="Network by name.")
@_options.dataset_option()
@_options.data_root_option
@click.option("--epochs", type=click.IntRange(min=1), default=1, show_default=True, help="Passes over the data set.")
@_options.batch_size_option
@_options.lr_option
@_options.seed_option
@_options.force_option
@_options.json_option
def pretrain(
    output: str,
    model: str,
    dataset: str,
    data_root: str | None,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    force: bool,
    as_json: bool,
) -> None:
    """Train a base network with Adam and save it."""
    import loraio
    from loraio import outputs
    from loraio.bases import NETWORKS
    from loraio.registry import lookup
    from loraio.training.loop import base_record

    outputs.check_output(output, overwrite=force)
    lookup(NETWORKS, model, what="network")
    config = loraio.PretrainConfig(epochs=epochs, batch_size=batch_size, lr=lr, seed=seed)
    data = loraio.load_dataset(dataset, "train", root=data_root)
    held_out = loraio.load_dataset(dataset, "test", root=data_root)
    with _output.progress(lines=not as_json) as report:
        network = loraio.pretrain(model, config, data, on_progress=report)
    result = loraio.evaluate(network, held_out)
    loraio.save_base(network, output, training=base_record(config, data, held_out, result), overwrite=force)
    parameters, size = sum(parameter.numel() for parameter in network.parameters()), Path(output).stat().st_size
    if as_json:
        facts = {"file": output, "bytes": size, "network": model, "parameters": parameters}
        _output.print_json("pretrain", {**facts, "test": result.to_json()})
        return
    click.echo(
        f"{output}: {model}, {parameters:,} parameters, {_output.size(size)}; "
        f"{result.accuracy:.2%} of {result.images:,} test images right"
    )

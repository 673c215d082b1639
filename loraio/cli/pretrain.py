"""``loraio pretrain``: train a base network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loraio.cli import _inputs, _options, _output, _training


@click.command(epilog=_options.example("loraio pretrain -o base.safetensors --dataset digits --epochs 12"))
@click.option("-o", "--output", type=click.Path(dir_okay=False), required=True, help="The base checkpoint to write.")
@_options.network_options(
    default="digit-cnn", text="Network: digit-cnn, torchvision:NAME, timm:NAME or package.module:callable."
)
@_training.image_options
@click.option("--epochs", type=_options.Count(min=1), default=1, help="Passes over the data set.")
@_options.batch_size_option
@_options.lr_option
@_options.seed_option
@_options.force_option
@_options.json_option
def pretrain(
    output: str,
    model: str,
    model_args: dict[str, Any] | None,
    dataset: str,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    force: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train a base network with Adam and save it."""
    import loraio
    from loraio.bases.networks import find_network
    from loraio.files import atomic
    from loraio.training.provenance import base_record

    atomic.check_output(output, overwrite=force)
    find_network(model, model_args)
    config = loraio.PretrainConfig(epochs=epochs, batch_size=batch_size, lr=lr, seed=seed)
    fresh = loraio.build_network(model, args=model_args, seed=seed)
    data, held_out = (_inputs.read_images(fresh, dataset, split, settings) for split in ("train", "test"))
    with _output.progress(lines=not as_json) as report:
        network = loraio.pretrain(model, config, data, network_args=model_args, on_progress=report)
    result = loraio.evaluate(network, held_out)
    loraio.save_base(network, output, training=base_record(config, data, held_out, result), overwrite=force)
    parameters, size = sum(parameter.numel() for parameter in network.parameters()), Path(output).stat().st_size
    if as_json:
        facts = {"file": output, "bytes": size, "network": model, "parameters": parameters}
        _output.print_json("pretrain", {**facts, "test": result.to_json()})
        return
    about = f"{model}, {parameters:,} parameters, {_output.size(size)}"
    _output.line(f"{output}: {about}; {result.accuracy:.2%} of {result.images:,} test images right")

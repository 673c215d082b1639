"""``loraio predict``: read the digit in an image."""

from __future__ import annotations

from typing import Any

import click

from loraio.cli import _inputs, _options, _output


@click.command(epilog=_options.example("loraio predict base.safetensors photo.jpg --adapter one.safetensors"))
@click.argument("base", type=click.Path())
@click.argument("images", type=click.Path(), nargs=-1, required=True, metavar="IMAGE...")
@click.option("--adapter", type=click.Path(), default=None, help="An adapter to attach.")
@_options.adapter_options
@_options.json_option
def predict(
    base: str,
    images: tuple[str, ...],
    adapter: str | None,
    strength: float,
    allow_base_mismatch: bool,
    alpha: float | None,
    model: str | None,
    model_args: dict[str, Any] | None,
    as_json: bool,
) -> None:
    """Read the digit in each IMAGE.

    An image is a PNG or JPEG of any size, dark on light or light on dark.
    """
    import torch

    import loraio

    network, stripped = _inputs.load_network(base, model=model, model_args=model_args, as_json=as_json)
    allowed: dict[str, Any] = {"allow_base_mismatch": allow_base_mismatch}
    loaded = None if adapter is None else loraio.load(adapter, base=network, alpha=alpha, **allowed)
    pixels = torch.cat([loraio.read_image(image) for image in images])
    if loaded is None:
        outputs = loraio.predict(network, pixels)
    else:
        _output.note_effects(network, {str(adapter): loaded}, strength, as_json=as_json, **allowed)
        with loraio.attach(network, loaded, strength, **allowed):
            outputs = loraio.predict(network, pixels)
    rows: list[dict[str, Any]] = [
        {"image": image, "digit": int(shares.argmax()), "probabilities": shares.tolist()}
        for image, shares in zip(images, outputs.double().softmax(1), strict=True)
    ]
    if as_json:
        _output.print_json("predict", {"base": base, "stripped": stripped, "adapter": adapter, "predictions": rows})
        return
    for row in rows:
        _output.line(f"{row['image']}: {row['digit']} ({max(row['probabilities']):.1%})")

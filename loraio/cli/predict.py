"""``loraio predict``: which digit an image shows."""

from __future__ import annotations

from typing import Any

import click

from loraio.cli import _options, _output


@click.command(epilog=_options.example("loraio predict base.safetensors photo.jpg --adapter three.safetensors"))
@click.argument("base", type=click.Path())
@click.argument("images", type=click.Path(), nargs=-1, required=True, metavar="IMAGE...")
@click.option("--adapter", type=click.Path(), default=None, help="An adapter to attach.")
@_options.strength_option
@_options.mismatch_option
@_options.alpha_option
@_options.model_option
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
    from loraio.bases.models import stripped_of

    network = loraio.load_base(base, model=model, model_args=model_args)
    loaded = None
    if adapter is not None:
        loaded = loraio.load(adapter, base=network, alpha=alpha, allow_base_mismatch=allow_base_mismatch)
    stripped = stripped_of(network)
    _output.note_stripped(stripped, as_json=as_json)
    pixels = torch.cat([loraio.read_image(image) for image in images])
    if loaded is None:
        outputs = loraio.predict(network, pixels)
    else:
        _output.note_effects(
            network, {str(adapter): loaded}, strength, allow_base_mismatch=allow_base_mismatch, as_json=as_json
        )
        with loraio.attach(network, loaded, strength, allow_base_mismatch=allow_base_mismatch):
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

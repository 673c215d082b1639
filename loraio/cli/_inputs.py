"""Load the networks and images that commands name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loraio.cli import _output

if TYPE_CHECKING:
    from torch import nn

    import loraio


def load_network(
    base: str, *, model: str | None, model_args: dict[str, Any] | None, as_json: bool
) -> tuple[nn.Module, str]:
    """Return the network of a base, and the prefix that was removed from its names, which is also said on stderr."""
    import loraio
    from loraio.bases.models import stripped_of

    network = loraio.load_base(base, model=model, model_args=model_args)
    stripped = stripped_of(network)
    _output.note_stripped(stripped, as_json=as_json)
    return network, stripped


def read_images(network: nn.Module, dataset: str, split: str, settings: dict[str, Any]) -> loraio.Dataset:
    """Return the images that ``_training.image_options`` name, in the form that the network takes."""
    import loraio

    return loraio.load_dataset(
        dataset,
        split,
        root=settings["data_root"],
        form=loraio.image_form(network, size=settings["image_size"]),
        workers=settings["workers"],
        max_bytes=int(settings["data_limit"] * 2**30),
    )

"""Networks of torchvision and timm, by name, always without weights: nothing is ever downloaded."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from loraio.errors import ConfigError
from loraio.registry import lookup

WEIGHT_ARGUMENTS = (
    "weights", "weights_backbone", "pretrained", "pretrained_backbone", "pretrained_cfg", "pretrained_cfg_overlay",
    "checkpoint_path", "cache_dir",
)  # fmt: skip
"""Arguments by which builders of torchvision and timm fetch or open weights."""

OWN_DEFAULTS: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": True},
    "inception_v3": {"init_weights": True},
    "vit_h_14": {"image_size": 224},
}
"""torchvision's defaults, stated: the first two builders warn that theirs will change, and without weights the third
takes other images than its usual weights are for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A network that can be built by name.

    Attributes:
        build: makes it with fresh weights, drawn from torch's global generator; takes the network's keyword options.
        input_shape: of one sample: (channels, height, width); None if not known.
        classes: number of outputs; None if not known, or if the outputs are no classes.
    """

    build: Callable[..., nn.Module]
    input_shape: tuple[int, ...] | None = None
    classes: int | None = None


def find_in_torchvision(name: str, args: Mapping[str, Any]) -> Network:
    """Find a network of torchvision: for classification, segmentation or detection."""
    from torchvision import models

    lookup(dict.fromkeys(torchvision_names()), name, what="torchvision network")
    builder = models.get_model_builder(name)
    defaults: dict[str, Any] = {"weights": None} | OWN_DEFAULTS.get(name, {})
    if "weights_backbone" in inspect.signature(builder).parameters:
        defaults["weights_backbone"] = None

    def build(**options: Any) -> nn.Module:
        model: nn.Module = builder(**{**defaults, **options})
        return model

    if name not in models.list_models(module=models):
        return Network(build=build)
    facts = models.get_model_weights(name).DEFAULT
    size = _size({**defaults, **args}.get("image_size"), _crop_size(facts.transforms), *facts.meta.get("min_size", ()))
    classes = args.get("num_classes", len(facts.meta["categories"]))
    return Network(build=build, input_shape=(3, *size) if size else None, classes=classes)


def torchvision_names() -> list[str]:
    """Return the names of all networks of torchvision, quantized ones and videos excepted."""
    from torchvision import models

    modules = (models, models.segmentation, models.detection)
    return [name for module in modules for name in models.list_models(module=module)]


def find_in_timm(name: str, args: Mapping[str, Any]) -> Network:
    """Find a network of timm, if that is installed."""
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise ConfigError(
            f"'timm:{name}' needs timm, which cannot be imported: {error}", hint="pip install timm"
        ) from error
    # in "resnet18.a1_in1k" the second half names weights; a colon would name a model hub or a folder
    lookup(dict.fromkeys(timm.list_models()), name.partition(".")[0], what="timm network")

    def build(**options: Any) -> nn.Module:
        model: nn.Module = timm.create_model(name, **{"pretrained": False, **options})
        return model

    facts = timm.get_pretrained_cfg(name)
    shape = getattr(facts, "input_size", None)
    if shape is not None:
        size = _size(args.get("img_size"), None) or tuple(shape[1:])
        shape = (args.get("in_chans", shape[0]), *size)
    classes = args.get("num_classes", getattr(facts, "num_classes", None))
    return Network(build=build, input_shape=shape, classes=classes)


LIBRARIES: dict[str, Callable[[str, Mapping[str, Any]], Network]] = {
    "torchvision": find_in_torchvision,
    "timm": find_in_timm,
}
"""By the word before the colon of a network's name. Any other word there is a module of the user's own."""


def _crop_size(transforms: Any) -> int | None:
    """Return the image size of a weights enum's preprocessing, which is a partial of a preset; load nothing."""
    size = getattr(transforms, "keywords", {}).get("crop_size")
    return size if isinstance(size, int) else None


def _size(asked: Any, usual: int | None, *least: int) -> tuple[int, int] | None:
    """Return (height, width): the size that was asked for, else the usual one, but never less than the least."""
    if isinstance(asked, int) and not isinstance(asked, bool):
        return asked, asked
    if usual is None:
        return None
    side = max(usual, *least) if least else usual
    return side, side

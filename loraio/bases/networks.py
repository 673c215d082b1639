"""Networks by name: our own, torchvision's, timm's, and those of the user's own code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loraio.bases.network_libraries import LIBRARIES, WEIGHT_ARGUMENTS, Network, torchvision_names
from loraio.bases.own_code import import_callable, place_of
from loraio.bases.targets import find_head
from loraio.errors import ConfigError, UnknownNameError, first_line
from loraio.files.strictjson import canonical_json
from loraio.registry import known, nearest


class DigitCNN(nn.Module):
    """Three stride-2 convolutions and one linear layer, for 28x28 grey images and ten classes; 113,162 parameters.

    Input (n, 1, 28, 28), output (n, 10) logits. The convolutions alone hold 92,672 parameters, biases included.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, kernel_size=3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(64, 128, kernel_size=3, stride=2, padding=1)
        self.fc = nn.Linear(128 * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (n, 10) of images (n, 1, 28, 28)."""
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        # flatten before the activation: its gradient is then contiguous, whatever the memory format of the images
        logits: Tensor = self.fc(F.relu(self.conv3(x).flatten(1)))
        return logits


NETWORKS = {"digit-cnn": Network(build=DigitCNN, input_shape=(1, 28, 28), classes=10)}
"""The networks with a name of their own; they take their input shape and no other."""

NAME_FORMS = f"{', '.join(f'{library}:NAME' for library in LIBRARIES)} or package.module:callable"
"""Names of networks besides those of `NETWORKS`, in words."""


def find_network(name: str, args: Mapping[str, Any] | None = None) -> Network:
    """Find a network by name, without building it.

    Args:
        name: a name in `NETWORKS`, ``torchvision:NAME``, ``timm:NAME`` or ``package.module:callable``.
        args: the keyword options that it will be built with; some of them change its input shape and classes.

    Raises:
        UnknownNameError: no such network, module or callable; the error says the nearest.
        ConfigError: timm is not installed, importing the module failed, or the options ask for weights.
    """

    def unknown(reason: str) -> UnknownNameError:
        if reason:
            hint = "the folder of the module has to be on PYTHONPATH, or be the current one of the command line"
        else:
            hint = f"{known(NETWORKS)}, {NAME_FORMS}"
        return UnknownNameError(f"no network {name!r}{reason}{_nearest_network(name)}", hint=hint)

    args = {} if args is None else dict(args)
    scheme, colon, rest = name.partition(":")
    if name in NETWORKS:
        return NETWORKS[name]
    if not colon:
        raise unknown("")
    if scheme not in LIBRARIES:
        return Network(build=import_callable(name, unknown=unknown))
    asked = [key for key in WEIGHT_ARGUMENTS if args.get(key) not in (None, False)]
    if asked:
        raise ConfigError(
            f"{name!r}: networks are built without weights, and the option {asked[0]!r} asks for them",
            hint="save the state dict of the network with its weights, and load it as a base",
        )
    return LIBRARIES[scheme](rest, args)


def _nearest_network(name: str) -> str:
    """Suggest the nearest of all names; torchvision's may be given without ``torchvision:``."""
    inside = torchvision_names()
    if name in inside:
        return f"; did you mean 'torchvision:{name}'?"
    return nearest(name, [*NETWORKS, *(f"torchvision:{word}" for word in inside)]) or nearest(name, inside)


def build_network(name: str, *, args: Mapping[str, Any] | None = None, seed: int | None = None) -> nn.Module:
    """Build a network by name with fresh weights, in eval mode; the model remembers its name and options.

    Args:
        name: as `find_network`: ``"digit-cnn"``, ``"torchvision:resnet18"``, ``"mine.nets:Small"``.
        args: keyword options of the builder, as plain JSON values, since files repeat them: ``{"num_classes": 10}``.
        seed: of the start weights; the global generator is left as it was. Without it the global generator draws.

    Raises:
        UnknownNameError: no such network, module or callable.
        ConfigError: it cannot be built with these options, or the callable does not return an ``nn.Module``.
    """
    options = checked_args(args)
    network = find_network(name, options)
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            model: Any = network.build(**options)
        except (Exception, SystemExit) as error:  # a foreign builder may raise anything
            given = f" with {canonical_json(options)}" if options else ""
            raise ConfigError(f"{name!r} cannot be built{given}: {first_line(error)}", where=place_of(error)) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{name!r} gives {type(model).__name__}, not a torch.nn.Module")
    # plain attributes; nn.Module's own __setattr__ is for tensors and modules
    object.__setattr__(model, "loraio_network", name)
    object.__setattr__(model, "loraio_network_args", options)
    return model.eval()


def checked_args(args: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return keyword options as a file would give them back: a copy in plain JSON values.

    Raises:
        ConfigError: not a mapping from words to plain JSON values.

    >>> checked_args({"num_classes": 10, "sizes": (1, 2)})
    {'num_classes': 10, 'sizes': [1, 2]}
    """
    if args is None:
        return {}
    if not isinstance(args, Mapping) or not all(isinstance(key, str) for key in args):
        raise ConfigError(f"the network's options are {args!r}, not an object of keyword options")
    try:
        plain: dict[str, Any] = json.loads(canonical_json(dict(args)))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"the network's options are not plain JSON values: {error}",
            hint="a function of your own that sets them, as package.module:callable",
        ) from error
    return {key: plain[key] for key in args}  # in their own order


def network_of(model: nn.Module) -> str | None:
    """Return the name of the network that `build_network` or `load_base` built; None for other models."""
    name = getattr(model, "loraio_network", None)
    return name if isinstance(name, str) else None


def network_args_of(model: nn.Module) -> dict[str, Any]:
    """Return the keyword options that `build_network` or `load_base` used; empty for other models."""
    args = getattr(model, "loraio_network_args", None)
    return dict(args) if isinstance(args, dict) else {}


def input_shape_of(model: nn.Module) -> tuple[int, ...] | None:
    """Return the shape of one sample that a model takes; None if its network has no name or no known shape."""
    name = network_of(model)
    return None if name is None else find_network(name, network_args_of(model)).input_shape


def resize_heads(model: nn.Module, heads: Mapping[str, int]) -> None:
    """Give layers of a network another number of outputs, with fresh weights; the model remembers it.

    ``heads`` maps names of layers, such as "fc", to numbers of outputs. The model's own parameters are replaced.

    Raises:
        UnknownNameError: no such layer, or it cannot be a head.
    """
    found = {path: (*find_head(model, path), outputs) for path, outputs in heads.items()}
    for module, attribute, outputs in found.values():
        for name, values in fresh_head(module, outputs).items():
            module._parameters[name] = nn.Parameter(values)
        setattr(module, attribute, outputs)
    object.__setattr__(model, "loraio_heads", {**heads_of(model), **heads})


def heads_of(model: nn.Module) -> dict[str, int]:
    """Return the layers that `resize_heads` gave other numbers of outputs; empty for other models."""
    heads = getattr(model, "loraio_heads", None)
    return dict(heads) if isinstance(heads, dict) else {}


def fresh_head(module: nn.Module, outputs: int) -> dict[str, Tensor]:
    """Return weight and bias of a head with another number of outputs, as torch draws them from its global generator.

    They have the layer's own dtype and device. `loraio.bases.targets.find_head` finds the layers that can be heads.
    """
    layer: Any = module
    bias = layer.bias is not None
    if isinstance(module, nn.Linear):
        fresh: nn.Module = nn.Linear(module.in_features, outputs, bias=bias)
    else:
        convolution = next(cls for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(module, cls))
        fresh = convolution(layer.in_channels, outputs, layer.kernel_size, bias=bias)
    weight = layer.weight
    return {name: values.detach().to(weight.device, weight.dtype) for name, values in fresh.named_parameters()}

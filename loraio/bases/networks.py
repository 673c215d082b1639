"""Networks by name: our own, torchvision's, timm's, and those of the user's own code. Nothing is ever downloaded."""

from __future__ import annotations

import importlib
import inspect
import json
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loraio.bases.targets import find_head
from loraio.errors import ConfigError, UnknownNameError
from loraio.files.strictjson import canonical_json
from loraio.registry import known, lookup, nearest

NAME_FORMS = "torchvision:NAME, timm:NAME or package.module:callable"
"""What a network's name can be besides a registered one, in words."""

LIBRARIES = ("torchvision", "timm")
"""What may stand before the colon of a name besides a module of the user's own."""

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
        """Logits (n, 10) of images (n, 1, 28, 28)."""
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        # flat before the activation: its gradient comes in the order of a flat one, whatever that of the images is
        logits: Tensor = self.fc(F.relu(self.conv3(x).flatten(1)))
        return logits


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A network that can be built by name.

    Attributes:
        build: makes it with fresh weights, drawn from torch's global generator; takes the network's keyword options.
        input_shape: of one sample that it takes: (channels, height, width); None where that is not known.
        classes: number of outputs; None where that is not known, or has no such meaning.
    """

    build: Callable[..., nn.Module]
    input_shape: tuple[int, ...] | None = None
    classes: int | None = None


NETWORKS: dict[str, Network] = {
    "digit-cnn": Network(build=DigitCNN, input_shape=(1, 28, 28), classes=10),
}
"""The networks with a name of their own; they take their input shape and no other."""


def find_network(name: str, args: Mapping[str, Any] | None = None) -> Network:
    """What is known of a network before it is built.

    Args:
        name: a name in `NETWORKS`, ``torchvision:NAME``, ``timm:NAME`` or ``package.module:callable``.
        args: the keyword options that it will be built with; some of them change its input shape and classes.

    Raises:
        UnknownNameError: no such network, module or callable; the error says the nearest.
        ConfigError: timm is not installed, importing the module failed, or the options ask for weights.
    """
    args = {} if args is None else dict(args)
    scheme, colon, rest = name.partition(":")
    if not colon:
        if name in NETWORKS:
            return NETWORKS[name]
        raise UnknownNameError(f"no network {name!r}{_nearest_network(name)}", hint=f"{known(NETWORKS)}, {NAME_FORMS}")
    if scheme not in LIBRARIES:
        return Network(build=_own_callable(name))
    asked = [key for key in WEIGHT_ARGUMENTS if args.get(key) not in (None, False)]
    if asked:
        raise ConfigError(
            f"{name!r}: networks are built without weights, and the option {asked[0]!r} asks for them",
            hint="save the state dict of the network with its weights, and load it as a base",
        )
    return _torchvision(rest, args) if scheme == "torchvision" else _timm(rest, args)


def build_network(name: str, *, args: Mapping[str, Any] | None = None, seed: int | None = None) -> nn.Module:
    """A network by name with fresh weights, in eval mode; it remembers its name and options.

    Args:
        name: as `find_network`: ``"digit-cnn"``, ``"torchvision:resnet18"``, ``"mine.nets:Small"``.
        args: keyword options of the builder, as plain JSON values, since files repeat them: ``{"num_classes": 10}``.
        seed: of the start weights; the global generator is left as it was. Without it the global generator draws.

    Raises:
        UnknownNameError: no such network, module or callable.
        ConfigError: it cannot be built with these options, or what was built is no ``nn.Module``.
    """
    options = checked_args(args)
    network = find_network(name, options)
    if seed is None:
        model = _built(name, network, options)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _built(name, network, options)
    # plain attributes; nn.Module's own __setattr__ is for tensors and modules
    object.__setattr__(model, "loraio_network", name)
    object.__setattr__(model, "loraio_network_args", options)
    return model.eval()


def resize_heads(model: nn.Module, heads: Mapping[str, int]) -> None:
    """Give layers of a network another number of outputs, with fresh weights; the network remembers it.

    Args:
        model: from `build_network`; its own parameters are exchanged.
        heads: the layers' names, "fc", and their numbers of outputs.

    Raises:
        UnknownNameError: no such layer, or it cannot be a head.
    """
    found = {path: (*find_head(model, path), outputs) for path, outputs in heads.items()}
    for module, attribute, outputs in found.values():
        for name, values in fresh_head(module, outputs).items():
            module._parameters[name] = nn.Parameter(values)
        setattr(module, attribute, outputs)
    object.__setattr__(model, "loraio_heads", {**heads_of(model), **heads})


def fresh_head(module: nn.Module, outputs: int) -> dict[str, Tensor]:
    """Start values of a layer like this one with that many outputs, as torch draws them from its global generator.

    Args:
        module: a layer that `loraio.bases.targets.find_head` finds.
        outputs: at least 1.

    Returns:
        weight, and bias where the layer has one: dtype and device of the layer's own.
    """
    bias = module.bias is not None
    fresh: nn.Module
    if isinstance(module, nn.Linear):
        fresh = nn.Linear(module.in_features, outputs, bias=bias)
    else:
        layer: Any = module
        convolution = next(cls for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(module, cls))
        fresh = convolution(layer.in_channels, outputs, layer.kernel_size, bias=bias)
    weight: Any = module.weight
    return {name: values.detach().to(weight.device, weight.dtype) for name, values in fresh.named_parameters()}


def heads_of(model: nn.Module) -> dict[str, int]:
    """What `resize_heads` gave other numbers of outputs; empty for other models."""
    heads = getattr(model, "loraio_heads", None)
    return dict(heads) if isinstance(heads, dict) else {}


def network_of(model: nn.Module) -> str | None:
    """The name of the network that `build_network` or `load_base` made; None for other models."""
    name = getattr(model, "loraio_network", None)
    return name if isinstance(name, str) else None


def network_args_of(model: nn.Module) -> dict[str, Any]:
    """The keyword options that `build_network` or `load_base` built the model with; empty for other models."""
    args = getattr(model, "loraio_network_args", None)
    return dict(args) if isinstance(args, dict) else {}


def checked_args(args: Mapping[str, Any] | None) -> dict[str, Any]:
    """Keyword options as a file would give them back: a copy in plain JSON values.

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


def is_own_code(name: str) -> bool:
    """Whether the name means a callable that has to be imported: ``package.module:callable``."""
    scheme, colon, _ = name.partition(":")
    return bool(colon) and scheme not in LIBRARIES


def refuse_own_code(name: str, *, where: str) -> str:
    """The name, unless it makes a file run code: a callable is imported only when the user names it.

    Args:
        name: the network's name as a file states it.
        where: the file.

    Raises:
        ConfigError: it is ``package.module:callable``.
    """
    if is_own_code(name):
        raise ConfigError(
            f"the file says that its network is the code {name!r}, which a file alone does not get to run",
            where=where,
            hint=f"--model {name} (model= in Python), if you trust that code",
        )
    return name


def _built(name: str, network: Network, options: Mapping[str, Any]) -> nn.Module:
    try:
        model: Any = network.build(**options)
    except (Exception, SystemExit) as error:  # a foreign builder may raise anything
        raise ConfigError(
            f"{name!r} cannot be built{f' with {canonical_json(options)}' if options else ''}: {_words(error)}",
            where=_place(error),
        ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{name!r} gives {type(model).__name__}, not a torch.nn.Module")
    return model


def _torchvision(name: str, args: dict[str, Any]) -> Network:
    from torchvision import models

    lookup(dict.fromkeys(_torchvision_names()), name, what="torchvision network")
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
    size = _size((defaults | args).get("image_size"), _crop_size(facts.transforms), *facts.meta.get("min_size", ()))
    classes = args.get("num_classes", len(facts.meta["categories"]))
    return Network(build=build, input_shape=(3, *size) if size else None, classes=classes)


def _torchvision_names() -> list[str]:
    from torchvision import models

    modules = (models, models.segmentation, models.detection)
    return [name for module in modules for name in models.list_models(module=module)]


def _crop_size(transforms: Any) -> int | None:
    """The image size of a weights enum's preprocessing, which is a partial of a preset; nothing is loaded."""
    size = getattr(transforms, "keywords", {}).get("crop_size")
    return size if isinstance(size, int) else None


def _size(asked: Any, usual: int | None, *least: int) -> tuple[int, int] | None:
    """(height, width): the one asked for, else the usual one; never smaller than the least."""
    if isinstance(asked, int) and not isinstance(asked, bool):
        return asked, asked
    if usual is None:
        return None
    side = max(usual, *least) if least else usual
    return side, side


def _timm(name: str, args: Mapping[str, Any]) -> Network:
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise ConfigError(
            f"'timm:{name}' needs timm, which cannot be imported: {error}", hint="pip install timm"
        ) from (error)
    # of "resnet18.a1_in1k" the second half names weights; a colon would be a model hub or a folder
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


def _own_callable(name: str) -> Callable[..., nn.Module]:
    path, _, attribute = name.partition(":")
    module = _import(name, path)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [word for word in dir(found) if not word.startswith("_")]
            raise UnknownNameError(
                f"{path!r} has no {attribute!r}{nearest(part, names)}",
                where=f"{getattr(module, '__file__', None) or path!r}",
                hint=f"one of: {known(names)}",
            )
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(
            f"{name!r} is {type(found).__name__}, not a callable", where=getattr(module, "__file__", None)
        )
    built: Callable[..., nn.Module] = found
    return built


def _import(name: str, path: str) -> ModuleType:
    if not all(part.isidentifier() for part in path.split(".")):
        raise UnknownNameError(f"no network {name!r}{_nearest_network(name)}", hint=f"{known(NETWORKS)}, {NAME_FORMS}")
    try:
        return importlib.import_module(path)
    except (Exception, SystemExit) as error:  # a module may raise anything while it is imported
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{path}.".startswith(f"{missing}."):
            raise UnknownNameError(
                f"no network {name!r}: there is no module {path!r}{_nearest_network(name)}",
                hint="the folder of the module has to be on PYTHONPATH, or be the current one of the command line",
            ) from None
        raise ConfigError(f"{path!r} cannot be imported: {_words(error)}", where=_place(error)) from error


def _nearest_network(name: str) -> str:
    """The nearest of all names; torchvision's may be given without ``torchvision:``."""
    inside = _torchvision_names()
    if name in inside:
        return f"; did you mean 'torchvision:{name}'?"
    return nearest(name, [*NETWORKS, *(f"torchvision:{word}" for word in inside)]) or nearest(name, inside)


def _words(error: BaseException) -> str:
    """Class and first line of a foreign error."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _place(error: BaseException) -> str | None:
    """File and line that raised it."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else None

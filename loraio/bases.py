"""Base models by name, and base checkpoints: reading, building and writing them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import ParametrizationList

from loraio import container
from loraio.errors import BaseMismatchError, FormatError, MissingFileError, StateError, UnknownNameError
from loraio.identity import state_sha256
from loraio.registry import known, lookup, nearest

FORMAT_VERSION = 1
"""Version of the metadata that loraio writes into base checkpoints."""

PICKLE_SUFFIXES = (".pt", ".pth", ".bin")
"""Endings of files that are read with ``torch.load(weights_only=True)``."""


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
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.relu(conv(x))
        logits: Tensor = self.fc(x.flatten(1))
        return logits


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A network that can be built by name.

    Attributes:
        build: makes it with fresh weights, drawn from torch's global generator.
        input_shape: of one sample: (channels, height, width).
        classes: number of outputs.
    """

    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    classes: int


NETWORKS: dict[str, Network] = {
    "digit-cnn": Network(build=DigitCNN, input_shape=(1, 28, 28), classes=10),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseCheckpoint:
    """What a base checkpoint file holds.

    Attributes:
        path: the file.
        state: the state dict, on the CPU.
        network: the registered name that the file states; None for plain state dicts from elsewhere.
        document: the file's loraio metadata; empty for files from elsewhere.
    """

    path: Path
    state: Mapping[str, Tensor]
    network: str | None = None
    document: Mapping[str, Any] = field(default_factory=dict)


def build_network(name: str, *, seed: int | None = None) -> nn.Module:
    """A registered network with fresh weights, in eval mode.

    Args:
        name: a name in `NETWORKS`.
        seed: of the start weights; the global generator is left as it was. Without it the global generator draws.

    Raises:
        UnknownNameError: no such network.
    """
    network = lookup(NETWORKS, name, what="network")
    if seed is None:
        model = network.build()
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = network.build()
    model.loraio_network = name  # type: ignore[assignment]  # a plain attribute; nn.Module types them as tensors
    return model.eval()


def network_of(model: nn.Module) -> str | None:
    """The registered name of the network that `build_network` or `load_base` made; None for other models."""
    name = getattr(model, "loraio_network", None)
    return name if isinstance(name, str) else None


def read_base(path: str | os.PathLike[str]) -> BaseCheckpoint:
    """Read a base checkpoint: ours, or a plain state dict as safetensors or `.pt`.

    Files that end in .pt, .pth or .bin go through ``torch.load(weights_only=True)``; a dict that holds the state
    dict under ``state_dict`` is unwrapped.

    Raises:
        MissingFileError: no such file.
        FormatError: it is no checkpoint, or it is an adapter.
    """
    path = Path(path)
    if path.suffix.lower() in PICKLE_SUFFIXES:
        return BaseCheckpoint(path=path, state=_read_pickle(path))
    header = container.read_header(path)
    document = header.document() or {}
    if "targets" in document:
        raise FormatError(
            f"{str(path)!r} is an adapter, not a base model", hint="the base comes first, then the adapter"
        )
    if not header.tensors:
        raise FormatError(f"{str(path)!r} holds no tensors")
    version = document.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise FormatError(
            f"format version {version!r}, this loraio reads version {FORMAT_VERSION}",
            where=f"{str(path)!r}",
            hint="a newer loraio",
        )
    network = document.get("network")
    if network is not None and not isinstance(network, str):
        raise FormatError(f"the network is {network!r}, not a name", where=f"{str(path)!r}")
    receipts = document.get("merged", [])
    if not isinstance(receipts, list) or not all(isinstance(receipt, dict) for receipt in receipts):
        raise FormatError(f"what was merged is {receipts!r}, not a list of objects", where=f"{str(path)!r}")
    return BaseCheckpoint(path=path, state=container.read_tensors(header), network=network, document=document)


def load_base(path: str | os.PathLike[str], *, model: str | None = None) -> nn.Module:
    """Load a base checkpoint into its network, in eval mode, on the CPU.

    Args:
        path: our checkpoint, or a plain state dict as safetensors or `.pt`.
        model: the network's registered name; needed only where the file does not state it.

    Raises:
        MissingFileError, FormatError: as `read_base`.
        UnknownNameError: the file states no network and none was given, or there is none of that name.
        BaseMismatchError: names or shapes of the file are not those of the network; all differences are listed.
    """
    return model_from(read_base(path), model=model)


def model_from(checkpoint: BaseCheckpoint, *, model: str | None = None) -> nn.Module:
    """The network of a checkpoint that was read, with its weights; see `load_base`."""
    name = model or checkpoint.network
    if name is None:
        raise UnknownNameError(
            f"{str(checkpoint.path)!r} does not say which network it is for",
            hint=f"--model NAME (model= in Python), one of: {known(NETWORKS)}",
        )
    network = build_network(name, seed=0)
    load_state(network, checkpoint.state, where=f"{str(checkpoint.path)!r}")
    return network


def load_state(model: nn.Module, state: Mapping[str, Tensor], *, where: str | None = None) -> None:
    """Copy a state dict into a model, or change nothing; parameters take the dtype of the state dict.

    Raises:
        BaseMismatchError: with a line for each name that is missing, left over or of another shape.
    """
    problems = _differences(model.state_dict(), state)
    if problems:
        raise BaseMismatchError("the checkpoint does not fit the network", problems=problems, where=where)
    model.load_state_dict({name: tensor.detach().clone() for name, tensor in state.items()}, assign=True)


def save_base(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    training: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model as a base checkpoint that names its network.

    Args:
        model: from `build_network` or `load_base`; other models are written without a network name.
        path: the safetensors file to make.
        training: how it was trained, as plain JSON values.
        overwrite: replace an existing file.

    Raises:
        OutputExistsError, OutputError: the file is there already, or cannot be written.
        StateError: a weight is parametrized, by an attached adapter for example.
        BaseMismatchError: the model is no longer the network whose name it carries.
    """
    state = model.state_dict()
    parametrized = [name for name, module in model.named_modules() if isinstance(module, ParametrizationList)]
    if parametrized:
        raise StateError(f"{parametrized[0]!r}: a parametrized model is no base model", hint="live.detach() first")
    network = network_of(model)
    if network is not None:
        problems = _differences(build_network(network, seed=0).state_dict(), state)
        if problems:
            raise BaseMismatchError(f"the model is no longer a {network!r}", problems=problems)
    write_base(state, path, network=network, training=training or {}, overwrite=overwrite)


def write_base(
    state: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    network: str | None,
    overwrite: bool = False,
    inputs: tuple[str | os.PathLike[str], ...] = (),
    check: Callable[[Path], None] | None = None,
    **entries: Any,
) -> None:
    """Write a state dict as a base checkpoint; `save_base` for callers without a model.

    Args:
        state: names and tensors.
        path: the safetensors file to make.
        network: registered name, or None.
        overwrite, inputs, check: as `loraio.container.write`.
        entries: further keys of the metadata, as plain JSON values.
    """
    document = {"format_version": FORMAT_VERSION, "sha256": state_sha256(state), **entries}
    if network is not None:
        document["network"] = network
    container.write(state, path, document=document, overwrite=overwrite, inputs=inputs, check=check)


def _differences(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """A line for each tensor of ``state`` that a network with the state dict ``own`` cannot take."""
    lines = [f"{name!r} is missing{nearest(name, state.keys() - own.keys())}" for name in own if name not in state]
    lines += [f"{name!r} is not in the network{nearest(name, own)}" for name in state if name not in own]
    for name in (name for name in own if name in state):
        found, needed = state[name], own[name]
        if found.shape != needed.shape:
            lines.append(f"{name!r} is {tuple(found.shape)}, the network has {tuple(needed.shape)}")
        elif found.is_floating_point() != needed.is_floating_point():
            lines.append(f"{name!r} is {found.dtype}, the network has {needed.dtype}")
    return lines


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise MissingFileError(f"{str(path)!r} does not exist") from None
    except Exception as error:  # torch raises pickle, zip, runtime and OS errors here
        raise FormatError(
            f"not a state dict that can be read with weights_only=True: {str(error).splitlines()[0]}",
            where=f"{str(path)!r}",
            hint="torch.save(model.state_dict(), path) makes one",
        ) from error
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping) or not loaded:
        raise FormatError(f"holds {type(loaded).__name__}, not a state dict", where=f"{str(path)!r}")
    wrong = [str(name) for name, value in loaded.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if wrong:
        raise FormatError(f"not a state dict: what is not a tensor is {known(wrong, limit=5)}", where=f"{str(path)!r}")
    return {name: tensor.detach().contiguous() for name, tensor in loaded.items()}

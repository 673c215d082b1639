"""Where a model trains: moved to a device for a while, and given back on its own with its bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from loraio.errors import ConfigError


def device_of(name: str) -> torch.device:
    """The device of that name.

    Args:
        name: "cpu", "cuda", "cuda:N", or "auto" for the first GPU where there is one.

    Raises:
        ConfigError: there is no such GPU.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda", 0) if count else torch.device("cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= count:
        found = f"there are {count} of them" if count else "torch sees no GPU"
        raise ConfigError(f"no CUDA device {name!r}: {found}", hint="--device cpu, or --device auto")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


@contextmanager
def placed(model: nn.Module, name: str | None) -> Iterator[torch.device | None]:
    """The model on a device inside the block; afterwards its own tensors are in their places again.

    Nothing is copied back: what the block wrote into parameters or buffers of the moved model is gone.

    Args:
        model: whose parameters and buffers are moved.
        name: as `device_of`; None leaves the model where it is.

    Raises:
        ConfigError: there is no such device.
    """
    first = next(model.parameters(), None)
    device = None if name is None else device_of(name)
    if device is None or (first is not None and first.device == device):
        yield device
        return
    parameters, buffers = [], []
    for module in model.modules():
        parameters += [
            (module, key, value, value.data) for key, value in module._parameters.items() if value is not None
        ]
        buffers += [(module, key, value) for key, value in module._buffers.items() if value is not None]
    try:
        model.to(device)
        yield device
    finally:
        for module, key, parameter, data in parameters:
            parameter.data = data
            module._parameters[key] = parameter
        for module, key, buffer in buffers:
            module._buffers[key] = buffer

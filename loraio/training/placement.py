"""Move a model to a device while it trains, and choose the order of its images in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from loraio.errors import ConfigError
from loraio.training.batches import in_order
from loraio.training.evaluation import preserved_modes

SAME = 1e-3
"""Largest difference of outputs that are summed in another order, as a share of the largest output."""


def device_of(name: str) -> torch.device:
    """Return the device of that name.

    Args:
        name: "cpu", "cuda", "cuda:N", or "auto" for the first GPU if there is one.

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


def takes_channels_last(model: nn.Module, images: Tensor) -> bool:
    """Return True if the model can train on images with their channels last in memory: on a CPU only.

    Convolutions of oneDNN then need no copies, and kernels of one point are one matrix product for the whole batch. A
    trial decides, not a timing, so that every run of a model gets the same answer. The trial includes training mode: a
    network may demand an order, as with ``view``, in that mode only.

    Args:
        model: in the mode to train in; it is given back unchanged.
        images: a few, (n, channels, height, width).
    """
    first = next(model.parameters())
    if first.device.type != "cpu":
        return False
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    plain = images.to(first.dtype)
    last = in_order(plain, channels_last=True)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(last)
            with preserved_modes(model):
                model.eval()
                expected, found = model(plain), model(last)
    except Exception:  # any other fault of the network shows in the training itself
        return False
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
    return torch.allclose(found, expected, rtol=0, atol=SAME * float(expected.abs().max()))


@contextmanager
def placed(model: nn.Module, name: str | None) -> Iterator[None]:
    """Move the model to a device for the block, and put its own tensors back afterwards.

    Nothing is copied back: writes of the block to moved parameters or buffers are lost.

    Args:
        model: its parameters and buffers are moved.
        name: as for `device_of`; None does not move the model.

    Raises:
        ConfigError: there is no such device.
    """
    first = next(model.parameters(), None)
    device = None if name is None else device_of(name)
    if device is None or (first is not None and first.device == device):
        yield
        return
    parameters = [
        (module, key, value, value.data)
        for module in model.modules()
        for key, value in module._parameters.items()
        if value is not None
    ]
    buffers = [(module, key, value) for module in model.modules() for key, value in module._buffers.items()]
    try:
        model.to(device)
        yield
    finally:
        for module, key, parameter, data in parameters:
            parameter.data = data
            module._parameters[key] = parameter
        for module, key, buffer in buffers:
            module._buffers[key] = buffer

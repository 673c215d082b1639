"""Where a model trains: on a device for a while, given back on its own with its bits; and in which order of memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from loraio.errors import ConfigError
from loraio.training.batches import in_order
from loraio.training.evaluation import preserved_modes


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


SAME = 1e-3
"""Of the largest output, how far outputs may be apart that come from sums in another order."""


def takes_channels_last(model: nn.Module, images: Tensor) -> bool:
    """Whether a model trains with the channels of its images last in memory: on a CPU, if it works so.

    Convolutions of oneDNN then compute on what is there, without a copy in an order of their own, and kernels of one
    point are one matrix product for the whole batch. It is found out by trying, not by timing, so that every run of the
    same model comes to the same. What a network asks of memory, as with ``view``, it may ask in training only.

    Args:
        model: as it is trained, also its mode; it is left as it is.
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
    except Exception:  # whatever a network does that is no matter of order is said by the training itself
        return False
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
    return torch.allclose(found, expected, rtol=0, atol=SAME * float(expected.abs().max()))


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

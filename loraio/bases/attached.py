"""Tell if a model carries an adapter, without importing the code that attaches one."""

from __future__ import annotations

from torch import nn


class AttachedPart(nn.Module):
    """A module that an adapter puts on a model; `loraio.live` derives its own from it."""


def is_adapter_part(module: nn.Module) -> bool:
    """Return True if an adapter put this module on the model."""
    return isinstance(module, AttachedPart)


def carries_adapter(model: nn.Module) -> bool:
    """Return True if an adapter is attached to the model or to a part of it."""
    return any(isinstance(module, AttachedPart) for module in model.modules())

"""Tell whether a model carries an adapter, without importing what puts one on."""

from __future__ import annotations

from torch import nn

PART_MARK = "_loraio_part"
"""Name of a class attribute that only modules which an adapter puts on a model have."""


def is_adapter_part(module: nn.Module) -> bool:
    """Tell whether an adapter put this module on the model."""
    return hasattr(type(module), PART_MARK)


def carries_adapter(model: nn.Module) -> bool:
    """Tell whether an adapter is attached to the model or to a part of it."""
    return any(map(is_adapter_part, model.modules()))

"""Name the layers that another tool's own forward pass gets wrong or ignores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def misuse(module: nn.Module, *, dilation: bool = True) -> str | None:
    """Return the fault of a tool that copies only kernel, stride and padding of a convolution; None if it has none.

    Args:
        module: of the base.
        dilation: True if the tool ignores dilation too.
    """
    kernel: Sequence[int] = getattr(module, "kernel_size", ())
    steps: Sequence[int] = getattr(module, "dilation", ())
    if not kernel:
        return None
    if dilation and any(step > 1 and size > 1 for step, size in zip(steps, kernel, strict=True)):
        return f"ignores the layer's dilation {steps}"
    padding: Any = getattr(module, "padding", 0)
    padded = any(size > 1 for size in kernel) if isinstance(padding, str) else any(padding)
    mode = getattr(module, "padding_mode", "zeros")
    if mode != "zeros" and padded and padding != "valid":
        return f"ignores the layer's padding_mode {mode!r}"
    return None


def passed_over(module: nn.Module) -> str | None:
    """Return the fault of a tool that wraps forward passes on a layer of which attention takes the weight alone."""
    if type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return "passes over the out_proj of an attention layer"
    return None


def is_pipeline(network: nn.Module, parts: Iterable[str]) -> bool:
    """Return True if a network is a whole pipeline: each module with tensors has the name of a part of one.

    Args:
        network: the base.
        parts: names of parts that have adapters; a "vae" may be beside them.
    """
    names = {name for name, module in network.named_children() if module.state_dict()}
    return bool(names) and names <= {*parts, "vae"}

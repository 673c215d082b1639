"""Name the layers that another tool's own forward pass gets wrong, or passes over."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def misuse(module: nn.Module, *, dilation: bool = True) -> str | None:
    """What a tool's own forward pass gets wrong on this convolution, where it copies kernel, stride and padding only.

    Args:
        module: of the base.
        dilation: whether it leaves that out too.
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
    """What a tool that wraps layers' forward passes gets wrong on a layer of which attention takes the weight alone."""
    if type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return "passes over the out_proj of an attention layer"
    return None


def is_pipeline(network: nn.Module, parts: Iterable[str]) -> bool:
    """Whether a network is a whole pipeline: all its modules with tensors are parts of one, by their names.

    Args:
        network: the base.
        parts: names of parts that adapters are for; a "vae" may be beside them.
    """
    names = {name for name, module in network.named_children() if module.state_dict()}
    return bool(names) and names <= {*parts, "vae"}

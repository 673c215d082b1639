"""Give adapted layers a training step of their own, see `loraio.live.gradients`.

`FORWARDS` holds a forward method for each layer type that has such a step. It takes the plain way, through the
parametrized weight, whenever anything is out of the ordinary.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

from loraio.live.geometry import is_channels_last
from loraio.live.gradients import Convolution, FrozenNorm, Projection, without_autocast
from loraio.live.routes import Pair, Route, route_for

_FREED_BYTES = 2**25 - 2**17
"""Just below the 32 MiB up to which glibc raises its thresholds when a block is freed: mallopt(3)."""


def keep_freed_memory() -> None:
    """Let the process keep up to 64 MiB that it freed, so that steps do not ask the system for the same pages again.

    glibc gives back memory at the top of its heap beyond twice the largest block that was mapped by itself and freed so
    far. A small network's step frees less than that, and a quarter of the step can go into page faults. The block here
    is never written to, so that it takes no memory. Without glibc this has no effect.
    """
    torch.empty(_FREED_BYTES, dtype=torch.uint8)


def _pair_of(module: Any, x: Any) -> tuple[Pair, dict[Any, Route]] | None:
    """Return the weight and its factors, and the routes that are known; None for the plain way."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or type(x) not in _PLAIN:
        return None
    stacks = module._modules.get("parametrizations")  # not by attribute: torch looks those up in Python
    stack = None if stacks is None else stacks._modules.get("weight")
    if stack is None or len(stack._modules) != 1 or parametrize._cache_enabled or _is_transformed() or x.is_nested:
        return None
    part, weight = _part_of(module, stack), stack._parameters.get("original")
    # the layer can have got its class for an adapter of another kind, which was on before
    if not part.has_training_step:
        return None
    lora_A, lora_B = part._parameters["lora_A"], part._parameters["lora_B"]
    wanted = lora_A.requires_grad or lora_B.requires_grad
    ordinary = type(weight) in _PLAIN and type(lora_A) in _PLAIN and type(lora_B) in _PLAIN
    if not (part.enabled and wanted and ordinary) or weight.requires_grad or not x.numel():
        return None
    return Pair(weight, lora_A, lora_B, part.target.scale * part.strength), part.routes


_PLAIN = (Tensor, nn.Parameter)


def _part_of(module: Any, stack: Any) -> Any:
    """Return the part on the layer's weight: that of the snapshot which this pass uses, if it uses one."""
    place = vars(module).get("_loraio_place_weight")
    running = None if place is None else place.snapshots.running.get(get_ident())
    if running is None or place.module is not module:
        return stack._modules["0"]
    return running.snapshot.parts.get(place.name, stack._modules["0"])


def _is_transformed() -> bool:
    """Return True if torch.func, forward-mode differentiation or tracing is at work: no function here knows them."""
    functorch: bool = torch._C._are_functorch_transforms_active()
    return functorch or forward_ad._current_level >= 0 or torch._C._is_tracing()


def _in_one_dtype(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
    """Return input and bias in the dtype that the layer computes in, autocast or not; None for the plain way."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and torch.float64 not in (x.dtype, weight.dtype):
        dtype = torch.get_autocast_dtype(kind)
        return x.to(dtype), None if bias is None else bias.to(dtype)
    return (x, bias) if x.dtype == weight.dtype and (bias is None or bias.dtype == x.dtype) else None


def _convolution_forward(plain: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    def forward(module: Any, x: Tensor) -> Tensor:
        found, bias = _pair_of(module, x), module.bias
        ready = None if found is None or x.dim() != found[0].weight.dim() else _in_one_dtype(x, found[0].weight, bias)
        if found is None or ready is None:
            return plain(module, x)
        x, bias = ready
        result: Tensor = without_autocast(_convolved, x.device.type, module, x, *found, bias)
        return result

    return forward


def _convolved(module: Any, x: Tensor, pair: Pair, known: dict[Any, Route], bias: Tensor | None) -> Tensor:
    weight, lora_A, lora_B, scale = pair
    route = route_for(module, x, pair, known)
    x = route.padded(x)
    result: Tensor
    if not route.rows:
        result = Convolution.apply(x, weight, lora_A, lora_B, bias, scale, route)
    elif x.dim() == 4 and is_channels_last(x):
        result = Projection.apply(x, weight, lora_A, lora_B, bias, scale)
    else:
        rows = Projection.apply(x.flatten(1), weight, lora_A, lora_B, bias, scale)
        result = rows.view(len(x), -1, *x.shape[2:])
    return result


def _linear_forward(plain: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    def forward(module: Any, x: Tensor) -> Tensor:
        found, bias = _pair_of(module, x), module.bias
        ready = None if found is None else _in_one_dtype(x, found[0].weight, bias)
        if found is None or ready is None:
            return plain(module, x)
        x, bias = ready
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        weight, lora_A, lora_B, scale = found[0]
        result: Tensor = without_autocast(Projection.apply, x.device.type, rows, weight, lora_A, lora_B, bias, scale)
        return result if x.dim() == 2 else result.view(*x.shape[:-1], -1)

    return forward


def _norm_forward(plain: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    def forward(module: Any, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or type(x) not in _PLAIN or _is_transformed():
            return plain(module, x)
        learns = any(tensor is not None and tensor.requires_grad for tensor in (module.weight, module.bias))
        if learns or not x.requires_grad or module.training or module.running_var is None:
            return plain(module, x)
        result: Tensor = FrozenNorm.apply(x, module, plain)
        return result

    return forward


FORWARDS: dict[Any, Callable[[Any, Tensor], Tensor]] = {
    **{layer.forward: _convolution_forward(layer.forward) for layer in (nn.Conv1d, nn.Conv2d, nn.Conv3d)},
    nn.Linear.forward: _linear_forward(nn.Linear.forward),
    nn.BatchNorm2d.forward: _norm_forward(nn.BatchNorm2d.forward),  # of 1d and 3d too
}
"""The forward method of a layer with an adapter that is trained, by the layer's own."""

_CONVOLVE = (nn.Conv1d._conv_forward, nn.Conv2d._conv_forward, nn.Conv3d._conv_forward)


def forward_for(cls: type[nn.Module]) -> Callable[[Any, Tensor], Tensor] | None:
    """Return the forward method for a layer of this class; None for one that computes otherwise than torch's own."""
    own = getattr(cls, "_conv_forward", None)
    return FORWARDS.get(cls.forward) if own is None or own in _CONVOLVE else None

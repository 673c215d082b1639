"""The training step of an adapted layer: gradients of the factors without the gradient of the whole weight.

For ``y = conv(x, W + s * B @ A)`` with a frozen W autograd would compute the weight gradient, out * fan_in numbers, and
multiply it by A and by B. But only those products are asked for, and they come from tensors with as many channels as
the rank: from the hidden ones ``h = conv(x, A)`` comes ``dB = s * dy . h``, and from ``B^T dy`` comes dA, s times the
weight gradient of ``conv(x, A)`` (Hu et al. 2021, arXiv:2106.09685, section 4.1, where both are layers of their own).
Where the whole weight gradient is less work, as for depthwise convolutions, it is computed and multiplied:
`thin_is_cheaper` says where.

A pass over many positions folds the weight, once and for that pass only; one over few adds ``s * B @ h``, or what A
makes of ``B^T dy``, which it has at hand, to what W gives: `folding_is_cheaper`. The folded weight is never kept for
the backward pass, and h only where it is small. So a step keeps hardly more than full fine-tuning does.

Kernels of one point are matrix products, and their gradients too: of ``(channels, points)`` for each image, or of one
``(points, channels)`` where the channels come last.

Batch normalisation that is frozen multiplies each channel by a number; nothing but that number is kept for it.

`FORWARDS` holds a forward method for each layer type that has such a step. It goes the plain way, through the
parametrized weight, whenever anything is out of the ordinary.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.utils import parametrize

from loraio.live.geometry import Geometry, is_channels_last
from loraio.live.routes import PADDING_MODES, SMALL, Pair, Route, folding_is_cheaper, route_for, thin_is_cheaper

KEPT = 2**25 - 2**17
"""Bytes, just below the 32 MiB up to which glibc raises its thresholds by what is freed: mallopt(3)."""


def _without_autocast(function: Callable[..., Any], device: str, *arguments: Any) -> Any:
    if not torch.is_autocast_enabled(device):
        return function(*arguments)
    with torch.autocast(device, enabled=False):  # would round the base weight itself, before the fold
        return function(*arguments)


class _Convolution(torch.autograd.Function):
    """A convolution with an adapted weight. Its backward pass is made of differentiable operations only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        scale: float,
        route: Route,
    ) -> Tensor:
        ctx.scale, ctx.route = scale, route
        pair = Pair(weight, lora_A, lora_B, scale)
        hidden = None
        if not route.adds:
            y = route.geometry.convolve(x, pair.fold(x.dtype), bias)
        else:
            hidden = _hidden(pair, route, x)
            y = route.geometry.convolve(x, weight, bias)
            y.add_(_times(lora_B, hidden.flatten(2)).view(y.shape), alpha=scale)
        ctx.save_for_backward(x, weight, lora_A, lora_B, hidden)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _without_autocast(_Convolution.gradients, grad.device.type, ctx, grad)

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> Any:
        """One for each argument of `forward`."""
        x, weight, lora_A, lora_B, hidden = ctx.saved_tensors
        pair, route = Pair(weight, lora_A, lora_B, ctx.scale), ctx.route
        needs_x, _, needs_A, needs_B, needs_bias, *_ = ctx.needs_input_grad
        learns = needs_A or needs_B
        grad_x = grad_A = grad_B = across = full = None
        if route.thin and (needs_A or (needs_x and route.adds_back)):
            across = _across(pair, route.geometry, grad)
        if needs_x and learns and not route.thin and not route.product:
            grad_x, full = route.geometry.both_gradients(grad, x, pair.fold(x.dtype))
        elif needs_x:
            grad_x = _input_gradient(pair, route, grad, x, across)
        if learns and not route.thin:
            full = route.geometry.weight_gradient(grad, x, weight.to(x.dtype)) if full is None else full
            grad_A, grad_B = pair.from_full(full)
        elif learns:
            met = route.geometry.met(x) if route.product else None
            if needs_A and across is not None:
                grad_A = _down_gradient(pair, route, across, x, met)
            if needs_B:
                if hidden is None or torch.is_grad_enabled():  # what was kept is a constant for second derivatives
                    hidden = _hidden(pair, route, x, met)
                grad_B = _up_gradient(pair, route, grad, hidden)
        grad_bias = grad.transpose(0, 1).reshape(len(lora_B), -1).sum(1) if needs_bias else None
        return grad_x, None, grad_A, grad_B, grad_bias, None, None


def _down(pair: Pair, geometry: Geometry, dtype: torch.dtype) -> Tensor:
    """lora_A as the weight of a convolution, once for each group."""
    down = pair.lora_A.to(dtype).view(-1, *pair.weight.shape[1:])
    return down.repeat(geometry.groups, *(1,) * (down.dim() - 1)) if geometry.groups > 1 else down


def _times(matrix: Tensor, batch: Tensor) -> Tensor:
    """The product of a matrix with each of a batch: torch.matmul copies the batch where the matrix is learned."""
    return torch.bmm(matrix.expand(len(batch), -1, -1), batch)


def _hidden(pair: Pair, route: Route, x: Tensor, met: Tensor | None = None) -> Tensor:
    """What lora_A makes of the input: (batch, groups * rank, ...), as the output; ``met`` is `Geometry.met`."""
    if not route.product:
        return route.geometry.convolve(x, _down(pair, route.geometry, x.dtype))
    hidden = _times(pair.lora_A.to(x.dtype), route.geometry.met(x) if met is None else met)
    return hidden.view(len(x), -1, *route.sizes)


def _across(pair: Pair, geometry: Geometry, grad: Tensor) -> Tensor:
    """What lora_B makes of the output's gradient: (batch, groups * rank, ...), in the same order of memory."""
    up, groups = pair.lora_B.to(grad.dtype), geometry.groups
    if groups == 1 and is_channels_last(grad):
        across = F.linear(grad.permute(0, 2, 3, 1), up.t().contiguous())
        return across.permute(0, 3, 1, 2)
    if groups == 1:
        return _times(up.t(), grad.flatten(2)).view(len(grad), -1, *grad.shape[2:])
    rows = grad.reshape(len(grad), groups, len(up) // groups, -1)
    across = up.view(groups, -1, up.shape[1]).transpose(1, 2) @ rows
    return across.view(len(grad), -1, *grad.shape[2:])


def _input_gradient(pair: Pair, route: Route, grad: Tensor, x: Tensor, across: Tensor | None) -> Tensor:
    """That of the input; ``across`` is `_across`, which is there where thin products are added."""
    geometry = route.geometry
    if not route.adds_back or across is None:
        folded = pair.fold(x.dtype)
        if not route.product:
            return geometry.input_gradient(grad, x, folded)
        return geometry.unmet(_times(folded.flatten(1).t(), grad.flatten(2)), x, route.sizes)
    if not route.product:
        gradient = geometry.input_gradient(grad, x, pair.weight)
        return gradient.add(geometry.input_gradient(across, x, _down(pair, geometry, x.dtype)), alpha=pair.scale)
    down = pair.lora_A.t().expand(len(x), -1, -1)
    gradient = _times(pair.weight.flatten(1).t(), grad.flatten(2)).baddbmm(down, across.flatten(2), alpha=pair.scale)
    return geometry.unmet(gradient, x, route.sizes)


def _down_gradient(pair: Pair, route: Route, across: Tensor, x: Tensor, met: Tensor | None) -> Tensor:
    """That of lora_A by way of the rank; ``across`` is `_across`, ``met`` is `Geometry.met`."""
    if met is not None:
        gradient = torch.bmm(across.flatten(2), met.transpose(1, 2)).sum(0)
    else:
        groups = route.geometry.groups
        full = route.geometry.weight_gradient(across, x, _down(pair, route.geometry, x.dtype))
        gradient = full.reshape(groups, *pair.lora_A.shape).sum(0) if groups > 1 else full.flatten(1)
    return pair.scale * gradient.to(pair.lora_A.dtype)


def _up_gradient(pair: Pair, route: Route, grad: Tensor, hidden: Tensor) -> Tensor:
    """That of lora_B by way of the rank; ``hidden`` is `_hidden`."""
    (out, rank), groups = pair.lora_B.shape, route.geometry.groups
    # the thin factor first: many times as fast as the other way round
    if groups > 1:
        rows = grad.reshape(len(grad), groups, out // groups, -1).transpose(2, 3)
        gradient = (hidden.reshape(len(grad), groups, rank, -1) @ rows).sum(0)
    elif is_channels_last(grad) and is_channels_last(hidden):
        gradient = _rows(hidden).t() @ _rows(grad)
    else:
        gradient = torch.bmm(hidden.flatten(2), grad.flatten(2).transpose(1, 2)).sum(0)
    return (pair.scale * gradient.to(pair.lora_B.dtype)).transpose(-2, -1).reshape(out, rank)


def _rows(images: Tensor) -> Tensor:
    """One row of channels for each point: (points, channels)."""
    return images.permute(0, 2, 3, 1).reshape(-1, images.shape[1])


class _Projection(torch.autograd.Function):
    """A matrix product with an adapted weight; also differentiable twice. Thin matrices are (rank, rows): faster.

    The input is a matrix of rows, or images each point of which is a row of channels.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        scale: float,
    ) -> Tensor:
        ctx.scale = scale
        pair = Pair(weight, lora_A, lora_B, scale)
        (out, rank), fan_in = lora_B.shape, lora_A.shape[1]
        rows = x if x.dim() == 2 else _rows(x)
        ctx.thin = thin_is_cheaper(rank=rank, out=out, fan_in=fan_in, groups=1, positions=len(rows))
        ctx.addable = pair.in_one_dtype(x)
        # no view of another tensor is returned: activations may not write to one in place
        y = x.new_empty(len(rows), out) if x.dim() == 2 else _empty_images(x, out)
        hidden = None
        if not ctx.addable or folding_is_cheaper(positions=len(rows), width=fan_in):
            _project(rows, pair.fold(x.dtype).view(out, fan_in), bias, y)
        else:
            hidden = lora_A @ rows.t()
            _project(rows, weight.view(out, fan_in), bias, y).addmm_(hidden.t(), lora_B.t(), alpha=scale)
            hidden = hidden if SMALL * rank <= fan_in else None
        ctx.save_for_backward(x, weight, lora_A, lora_B, hidden)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _without_autocast(_Projection.gradients, grad.device.type, ctx, grad)

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> Any:
        """One for each argument of `forward`."""
        given, weight, lora_A, lora_B, hidden = ctx.saved_tensors
        pair = Pair(weight, lora_A, lora_B, ctx.scale)
        needs_x, _, needs_A, needs_B, needs_bias, *_ = ctx.needs_input_grad
        x = given
        if given.dim() > 2:
            x, grad = _rows(given), _rows(grad)
        down, up = lora_A.to(x.dtype), lora_B.to(x.dtype)
        adding = ctx.addable and not folding_is_cheaper(positions=len(x), width=len(up))
        grad_x = grad_A = grad_B = across = None
        if (needs_A and ctx.thin) or (needs_x and adding):
            across = up.t() @ grad.t()
        if needs_x and adding and across is not None:
            grad_x = (grad @ weight.flatten(1)).addmm(across.t(), down, alpha=ctx.scale)
        elif needs_x:
            grad_x = grad @ pair.fold(x.dtype).flatten(1)
        if not ctx.thin and (needs_A or needs_B):
            grad_A, grad_B = pair.from_full(grad.t() @ x)
        elif across is not None and needs_A:
            grad_A = torch.addmm(down, across, x, beta=0, alpha=ctx.scale).to(lora_A.dtype)
        if ctx.thin and needs_B:
            if hidden is None or torch.is_grad_enabled():  # what was kept is a constant for second derivatives
                hidden = down @ x.t()
            grad_B = torch.addmm(up.t(), hidden, grad, beta=0, alpha=ctx.scale).t().contiguous().to(lora_B.dtype)
        if grad_x is not None and given.dim() > 2:
            grad_x = _images(grad_x, given)
        return grad_x, None, grad_A, grad_B, grad.sum(0) if needs_bias else None, None


def _empty_images(like: Tensor, channels: int) -> Tensor:
    """Room for images with the batch, height and width of others, their channels last in memory."""
    shape = len(like), channels, *like.shape[2:]
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _project(rows: Tensor, weight: Tensor, bias: Tensor | None, room: Tensor) -> Tensor:
    """``rows @ weight.T + bias``, written to a matrix or to images with the channels last; gives the matrix."""
    matrix = room if room.dim() == 2 else room.permute(0, 2, 3, 1).view(rows.shape[0], -1)
    if bias is None:
        return torch.mm(rows, weight.t(), out=matrix)
    return torch.addmm(bias, rows, weight.t(), out=matrix)


def _images(rows: Tensor, like: Tensor) -> Tensor:
    """`_rows` undone: images with the batch, height and width of others, their channels last in memory."""
    return rows.view(len(like), *like.shape[2:], rows.shape[1]).permute(0, 3, 1, 2)


class _FrozenNorm(torch.autograd.Function):
    """Batch normalisation of which nothing learns: a factor for each channel, so that its input need not be kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any, plain: Callable[[Any, Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(module.running_var, module.weight)
        ctx.eps = module.eps
        return plain(module, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The same normalisation, without its mean and its bias."""
        variance, weight = ctx.saved_tensors
        mean = torch.zeros_like(variance)
        return torch.batch_norm(grad, weight, None, mean, variance, False, 0.0, ctx.eps, False), None, None


def keep_freed_memory() -> None:
    """Let the process keep up to 64 MiB that it freed, so that steps do not ask the system for the same pages again.

    glibc gives back what is free at the top of its heap beyond twice the largest block that was mapped by itself and
    freed so far. In a small network that is less than a step's tensors, and as much as a quarter of the step goes into
    page faults. The block here is never written to, so that it takes no memory; elsewhere nothing comes of it.
    """
    torch.empty(KEPT, dtype=torch.uint8)


def _pair_of(module: Any, x: Any) -> tuple[Pair, dict[Any, Route]] | None:
    """What the layer's weight is folded from, and the routes of its steps that are known already.

    None where this is no ordinary training step of an attached adapter.
    """
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
    """Return the part on the layer's weight: of the snapshot that this pass uses, where it uses one."""
    place = vars(module).get("_loraio_place_weight")
    running = None if place is None else place.snapshots.running.get(get_ident())
    if running is None or place.module is not module:
        return stack._modules["0"]
    return running.snapshot.parts.get(place.name, stack._modules["0"])


def _is_transformed() -> bool:
    """Whether torch.func, forward-mode differentiation or tracing is at work, which no function of ours knows."""
    functorch: bool = torch._C._are_functorch_transforms_active()
    return functorch or forward_ad._current_level >= 0 or torch._C._is_tracing()


def _in_one_dtype(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
    """Input and bias in the dtype that the layer computes in, autocast or not; None where torch has the say."""
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
        result: Tensor = _without_autocast(convolved, x.device.type, module, x, *found, bias)
        return result

    def convolved(module: Any, x: Tensor, pair: Pair, known: dict[Any, Route], bias: Tensor | None) -> Tensor:
        weight, lora_A, lora_B, scale = pair
        route = route_for(module, x, pair, known)
        if route.margins is not None:
            x = F.pad(x, route.margins, mode=PADDING_MODES.get(module.padding_mode, module.padding_mode))
        result: Tensor
        if not route.rows:
            result = _Convolution.apply(x, weight, lora_A, lora_B, bias, scale, route)
        elif x.dim() == 4 and is_channels_last(x):
            result = _Projection.apply(x, weight, lora_A, lora_B, bias, scale)
        else:
            rows = _Projection.apply(x.flatten(1), weight, lora_A, lora_B, bias, scale)
            result = rows.view(len(x), -1, *x.shape[2:])
        return result

    return forward


def _linear_forward(plain: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    def forward(module: Any, x: Tensor) -> Tensor:
        found, bias = _pair_of(module, x), module.bias
        ready = None if found is None else _in_one_dtype(x, found[0].weight, bias)
        if found is None or ready is None:
            return plain(module, x)
        x, bias = ready
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        weight, lora_A, lora_B, scale = found[0]
        result: Tensor = _without_autocast(_Projection.apply, x.device.type, rows, weight, lora_A, lora_B, bias, scale)
        return result if x.dim() == 2 else result.view(*x.shape[:-1], -1)

    return forward


def _norm_forward(plain: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    def forward(module: Any, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or type(x) not in _PLAIN or _is_transformed():
            return plain(module, x)
        learns = any(tensor is not None and tensor.requires_grad for tensor in (module.weight, module.bias))
        if learns or not x.requires_grad or module.training or module.running_var is None:
            return plain(module, x)
        result: Tensor = _FrozenNorm.apply(x, module, plain)
        return result

    return forward


FORWARDS: dict[Any, Callable[[Any, Tensor], Tensor]] = {
    nn.Conv1d.forward: _convolution_forward(nn.Conv1d.forward),
    nn.Conv2d.forward: _convolution_forward(nn.Conv2d.forward),
    nn.Conv3d.forward: _convolution_forward(nn.Conv3d.forward),
    nn.Linear.forward: _linear_forward(nn.Linear.forward),
    nn.BatchNorm2d.forward: _norm_forward(nn.BatchNorm2d.forward),  # of 1d and 3d too
}
"""The forward method of a layer with an adapter that is trained, by the layer's own."""

_CONVOLVE = (nn.Conv1d._conv_forward, nn.Conv2d._conv_forward, nn.Conv3d._conv_forward)


def forward_for(cls: type[nn.Module]) -> Callable[[Any, Tensor], Tensor] | None:
    """The forward method for a layer of this class; None for one that computes otherwise than torch's own."""
    own = getattr(cls, "_conv_forward", None)
    return FORWARDS.get(cls.forward) if own is None or own in _CONVOLVE else None

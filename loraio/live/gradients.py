"""Differentiate adapted layers without the gradient of the whole weight.

For ``y = conv(x, W + s * B @ A)`` with a frozen W, autograd would compute the gradient of the whole weight, out *
fan_in numbers, and multiply it by A and by B. Only those products are needed, and tensors with as many channels as the
rank give them: ``dB = s * dy . h`` with ``h = conv(x, A)``, and dA is s times the weight gradient of ``conv(x, A)``
for the output gradient ``B^T dy`` (Hu et al. 2021, arXiv:2106.09685, section 4.1, where both are layers of their own).
Where the whole gradient is less work, as for depthwise convolutions, it is computed: `thin_is_cheaper`.

A pass over many positions folds the weight, for that pass only. One over few adds ``s * B @ h`` to the output of W, and
in the backward pass the input gradient that A makes of ``B^T dy``: `folding_is_cheaper`. The folded weight is never
saved for the backward pass, and h only where it is small. So a step saves hardly more than full fine-tuning does.

Kernels of one point are matrix products, and so are their gradients: of ``(channels, points)`` for each image, or of
one ``(points, channels)`` where the channels come last. Every backward pass is made of differentiable operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from loraio.live.geometry import Geometry, is_channels_last
from loraio.live.routes import SMALL, Pair, Route, folding_is_cheaper, thin_is_cheaper

_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of the input, of lora_A and of lora_B; None where it is not needed."""


class _Needs(NamedTuple):
    """Which gradients are needed: of the input and of the factors."""

    x: bool
    A: bool
    B: bool


def without_autocast(function: Callable[..., Any], device: str, *arguments: Any) -> Any:
    """Call a function with autocast off: it would round the base weight itself, before the fold."""
    if not torch.is_autocast_enabled(device):
        return function(*arguments)
    with torch.autocast(device, enabled=False):
        return function(*arguments)


class Convolution(torch.autograd.Function):
    """A convolution with an adapted weight."""

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
        return without_autocast(Convolution.gradients, grad.device.type, ctx, grad)

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> Any:
        """Return one gradient for each argument of `forward`."""
        x, weight, lora_A, lora_B, hidden = ctx.saved_tensors
        pair = Pair(weight, lora_A, lora_B, ctx.scale)
        needs_x, _, needs_A, needs_B, needs_bias, *_ = ctx.needs_input_grad
        way = _convolution_by_rank if ctx.route.thin else _convolution_in_full
        grad_x, grad_A, grad_B = way(pair, ctx.route, grad, x, hidden, _Needs(needs_x, needs_A, needs_B))
        grad_bias = grad.transpose(0, 1).reshape(len(pair.lora_B), -1).sum(1) if needs_bias else None
        return grad_x, None, grad_A, grad_B, grad_bias, None, None


def _convolution_by_rank(
    pair: Pair, route: Route, grad: Tensor, x: Tensor, hidden: Tensor | None, needs: _Needs
) -> _Gradients:
    """Compute the factors' gradients from tensors with as many channels as the rank."""
    across = _across(pair, route.geometry, grad) if needs.A or (needs.x and route.adds_back) else None
    met = route.geometry.met(x) if route.product and (needs.A or needs.B) else None
    if needs.B and (hidden is None or torch.is_grad_enabled()):  # a saved one is a constant for second derivatives
        hidden = _hidden(pair, route, x, met)
    return (
        _input_gradient(pair, route, grad, x, across) if needs.x else None,
        _down_gradient(pair, route, across, x, met) if needs.A and across is not None else None,
        _up_gradient(pair, route, grad, hidden) if needs.B and hidden is not None else None,
    )


def _convolution_in_full(
    pair: Pair, route: Route, grad: Tensor, x: Tensor, hidden: Tensor | None, needs: _Needs
) -> _Gradients:
    """Compute the factors' gradients from the gradient of the whole weight."""
    learns, grad_x = needs.A or needs.B, None
    if needs.x and learns and not route.product:
        grad_x, full = route.geometry.both_gradients(grad, x, pair.fold(x.dtype))
        return grad_x, *pair.from_full(full)
    if needs.x:
        grad_x = _input_gradient(pair, route, grad, x, None)
    if not learns:
        return grad_x, None, None
    return grad_x, *pair.from_full(route.geometry.weight_gradient(grad, x, pair.weight.to(x.dtype)))


def _down(pair: Pair, geometry: Geometry, dtype: torch.dtype) -> Tensor:
    """Return lora_A as the weight of a convolution, once for each group."""
    down = pair.lora_A.to(dtype).view(-1, *pair.weight.shape[1:])
    return down.repeat(geometry.groups, *(1,) * (down.dim() - 1)) if geometry.groups > 1 else down


def _times(matrix: Tensor, batch: Tensor) -> Tensor:
    """Multiply a matrix with each of a batch; torch.matmul would copy the batch where the matrix is learned."""
    return torch.bmm(matrix.expand(len(batch), -1, -1), batch)


def _hidden(pair: Pair, route: Route, x: Tensor, met: Tensor | None = None) -> Tensor:
    """Return lora_A's output for the input: (batch, groups * rank, ...); ``met`` is `Geometry.met`."""
    if not route.product:
        return route.geometry.convolve(x, _down(pair, route.geometry, x.dtype))
    hidden = _times(pair.lora_A.to(x.dtype), route.geometry.met(x) if met is None else met)
    return hidden.view(len(x), -1, *route.sizes)


def _across(pair: Pair, geometry: Geometry, grad: Tensor) -> Tensor:
    """Return ``B^T dy``: (batch, groups * rank, ...), with the memory order of the output's gradient."""
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
    """Return the input's gradient; ``across`` is `_across`, which is there where thin products are added."""
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
    """Return lora_A's gradient; ``across`` is `_across`, ``met`` is `Geometry.met`."""
    if met is not None:
        gradient = torch.bmm(across.flatten(2), met.transpose(1, 2)).sum(0)
    else:
        groups = route.geometry.groups
        full = route.geometry.weight_gradient(across, x, _down(pair, route.geometry, x.dtype))
        gradient = full.reshape(groups, *pair.lora_A.shape).sum(0) if groups > 1 else full.flatten(1)
    return pair.scale * gradient.to(pair.lora_A.dtype)


def _up_gradient(pair: Pair, route: Route, grad: Tensor, hidden: Tensor) -> Tensor:
    """Return lora_B's gradient; ``hidden`` is `_hidden`."""
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


class Projection(torch.autograd.Function):
    """A matrix product with an adapted weight. Thin matrices are (rank, rows), which is faster.

    The input is a matrix of rows, or images each point of which is a row of channels.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, scale: float
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
        return without_autocast(Projection.gradients, grad.device.type, ctx, grad)

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> Any:
        """Return one gradient for each argument of `forward`."""
        given, weight, lora_A, lora_B, hidden = ctx.saved_tensors
        pair = Pair(weight, lora_A, lora_B, ctx.scale)
        needs_x, _, needs_A, needs_B, needs_bias, *_ = ctx.needs_input_grad
        x, grad = (given, grad) if given.dim() == 2 else (_rows(given), _rows(grad))
        adds = ctx.addable and not folding_is_cheaper(positions=len(x), width=len(pair.lora_B))
        across = None
        if (needs_A and ctx.thin) or (needs_x and adds):
            across = pair.lora_B.to(x.dtype).t() @ grad.t()
        grad_x = _row_gradient(pair, grad, across if adds else None) if needs_x else None
        grad_A = grad_B = None
        if ctx.thin:
            grad_A, grad_B = _projection_by_rank(pair, grad, x, hidden, across if needs_A else None, needs_B)
        elif needs_A or needs_B:
            grad_A, grad_B = pair.from_full(grad.t() @ x)
        if grad_x is not None and given.dim() > 2:
            grad_x = _images(grad_x, given)
        return grad_x, None, grad_A, grad_B, grad.sum(0) if needs_bias else None, None


def _row_gradient(pair: Pair, grad: Tensor, across: Tensor | None) -> Tensor:
    """Return the gradient of the rows; ``across`` is ``B^T dy``, where thin products are added."""
    if across is None:
        return grad @ pair.fold(grad.dtype).flatten(1)
    down = pair.lora_A.to(grad.dtype)
    return (grad @ pair.weight.flatten(1)).addmm(across.t(), down, alpha=pair.scale)


def _projection_by_rank(
    pair: Pair, grad: Tensor, x: Tensor, hidden: Tensor | None, across: Tensor | None, needs_B: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Compute the factors' gradients from matrices as thin as the rank."""
    grad_A = grad_B = None
    down, up = pair.lora_A.to(x.dtype), pair.lora_B.to(x.dtype)
    if across is not None:
        grad_A = torch.addmm(down, across, x, beta=0, alpha=pair.scale).to(pair.lora_A.dtype)
    if needs_B:
        if hidden is None or torch.is_grad_enabled():  # a saved one is a constant for second derivatives
            hidden = down @ x.t()
        grad_B = torch.addmm(up.t(), hidden, grad, beta=0, alpha=pair.scale).t().contiguous().to(pair.lora_B.dtype)
    return grad_A, grad_B


def _rows(images: Tensor) -> Tensor:
    """Return one row of channels for each point: (points, channels)."""
    return images.permute(0, 2, 3, 1).reshape(-1, images.shape[1])


def _images(rows: Tensor, like: Tensor) -> Tensor:
    """Undo `_rows`: images with the batch, height and width of others, their channels last in memory."""
    return rows.view(len(like), *like.shape[2:], rows.shape[1]).permute(0, 3, 1, 2)


def _empty_images(like: Tensor, channels: int) -> Tensor:
    """Return images without values, of the batch, height and width of others, their channels last in memory."""
    shape = len(like), channels, *like.shape[2:]
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _project(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Write ``rows @ weight.T + bias`` to a matrix, or to images with the channels last; return the matrix."""
    matrix = out if out.dim() == 2 else out.permute(0, 2, 3, 1).view(rows.shape[0], -1)
    if bias is None:
        return torch.mm(rows, weight.t(), out=matrix)
    return torch.addmm(bias, rows, weight.t(), out=matrix)


class FrozenNorm(torch.autograd.Function):
    """Batch normalisation in which nothing learns: a factor for each channel, so that its input need not be saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any, plain: Callable[[Any, Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(module.running_var, module.weight)
        ctx.eps = module.eps
        return plain(module, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Apply the same normalisation, without its mean and its bias."""
        variance, weight = ctx.saved_tensors
        mean = torch.zeros_like(variance)
        return torch.batch_norm(grad, weight, None, mean, variance, False, 0.0, ctx.eps, False), None, None

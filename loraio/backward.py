"""The training step of an adapted layer: gradients of the factors without the gradient of the whole weight.

For ``y = conv(x, W + s * B @ A)`` with a frozen W autograd would compute the weight gradient, out * fan_in numbers, and
multiply it by A and by B. But only those products are asked for, and they come from convolutions with as many channels
as the rank: ``dB = s * dy . conv(x, A)``, and ``dA`` is s times the weight gradient of ``conv(x, A)`` for the output
gradient ``B^T dy`` (Hu et al. 2021, arXiv:2106.09685, section 4.1, where the two are layers of their own). The forward
pass stays one convolution with the folded weight, which is not kept: the backward pass folds it once more where the
input needs a gradient. So neither pass keeps more than full fine-tuning does. Where the whole weight gradient is less
work, as for depthwise convolutions, it is computed and multiplied: `thin_is_cheaper` says where.

Batch normalisation that is frozen multiplies each channel by a number; nothing but that number is kept for it.

`FORWARDS` holds a forward method for each layer type that has such a step. It goes the plain way, through the
parametrized weight, whenever anything is out of the ordinary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.utils import parametrize

THIN = 2
"""How much longer a multiplication takes in a product as thin as a rank; measured for rank 8 on one CPU core."""


COLUMNS = 3
"""Width of kernel for which weight gradients of depthwise convolutions are fast on a CPU."""


class Pair(NamedTuple):
    """One weight and what is added to it: ``weight + scale * (B @ A)``."""

    weight: Tensor
    lora_A: Tensor  # noqa: N815
    lora_B: Tensor  # noqa: N815
    scale: float

    def fold(self, dtype: torch.dtype) -> Tensor:
        """The folded weight, rounded to the weight's dtype and then to the one that the layer computes in."""
        exact = torch.promote_types(self.weight.dtype, torch.float32)
        matrix = self.weight.to(exact).reshape(len(self.weight), -1)
        folded = matrix.addmm(self.lora_B.to(exact), self.lora_A.to(exact), alpha=self.scale)
        return folded.view(self.weight.shape).to(self.weight.dtype).to(dtype)

    def from_full(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of A and B from that of the folded weight."""
        matrix = gradient.reshape(len(gradient), -1).to(torch.promote_types(gradient.dtype, torch.float32))
        grad_A = self.scale * (self.lora_B.to(matrix.dtype).t() @ matrix)
        grad_B = self.scale * (matrix @ self.lora_A.to(matrix.dtype).t())
        return grad_A.to(self.lora_A.dtype), grad_B.to(self.lora_B.dtype)


def _pair(tensors: Sequence[Tensor], scale: float) -> Pair:
    weight, lora_A, lora_B = tensors
    return Pair(weight, lora_A, lora_B, scale)


class Geometry(NamedTuple):
    """How a convolution is moved over its input, as torch's own operators take it."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The convolution."""
        none = (0,) * len(self.stride)
        return torch.convolution(x, weight, bias, self.stride, self.padding, self.dilation, False, none, self.groups)

    def input_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The gradient of the input; of the input only shape and layout count.

        A kernel of one point needs no convolution on a CPU: a matrix product gives the gradients of the points that it
        meets, and those that its strides skip have none. oneDNN takes longer on one core (seen in v3.12).
        """
        plain = self.groups == 1 and not any(self.padding) and weight.numel() == weight.shape[0] * weight.shape[1]
        if not plain or x.device.type != "cpu" or not x.is_contiguous():
            return self._gradients(grad, x, weight, (True, False, False))[0]
        met = (weight.flatten(1).t() @ grad.flatten(2)).view(-1, x.shape[1], *grad.shape[2:])
        if met.shape == x.shape:
            return met
        gradient = torch.zeros_like(x)
        met_points = (slice(None), slice(None), *(slice(None, None, stride) for stride in self.stride))
        gradient[met_points] = met
        return gradient

    def weight_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The gradient of the weight; of the weight only shape and layout count.

        oneDNN is several times as fast at weight gradients of depthwise convolutions where the kernel is three wide and
        nothing is left to pad (seen in v3.12 with 5 x 5 kernels), so that wider kernels are parted.
        """
        depthwise = self.groups == x.shape[1] == len(weight) and x.dim() == 4 and self.dilation == (1, 1)
        if not depthwise or weight.shape[3] <= COLUMNS or x.device.type != "cpu":
            return self._gradients(grad, x, weight, (False, True, False))[1]
        inside = self._replace(padding=(0, 0))
        part = weight.new_empty(len(weight), 1, weight.shape[2], COLUMNS)
        width = self.stride[1] * (grad.shape[3] - 1) + COLUMNS
        rows, columns = self.padding
        parts = []
        for start in range(0, weight.shape[3], COLUMNS):  # the input that these columns meet, cropped where negative
            margins = (columns - start, width - x.shape[3] - columns + start, rows, rows)
            parts.append(inside._gradients(grad, F.pad(x, margins), part, (False, True, False))[1])
        return torch.cat(parts, 3)[..., : weight.shape[3]]

    def _gradients(
        self, grad: Tensor, x: Tensor, weight: Tensor, mask: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Those of input, weight and bias that the mask asks for."""
        sizes = self.stride, self.padding, self.dilation, False, (0,) * len(self.stride), self.groups
        gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
            grad, x, weight, None, *sizes, mask
        )
        return gradients


def thin_is_cheaper(*, rank: int, out: int, fan_in: int, groups: int, positions: int) -> bool:
    """Whether two gradients by way of the rank take less time than the whole weight gradient and its two products.

    Multiplications, by way of the rank: ``2 * rank * (groups * fan_in + out)`` for each position of the output, each
    counted `THIN` times. In full: ``out * fan_in`` for each position, and ``2 * rank * out * fan_in`` for the products.

    Args:
        rank: r.
        out: number of output channels.
        fan_in: inputs of one of them, in / groups * kernel.
        groups: of the convolution.
        positions: of the output, over the whole batch.

    >>> thin_is_cheaper(rank=8, out=64, fan_in=576, groups=1, positions=3136)
    True
    >>> thin_is_cheaper(rank=8, out=64, fan_in=9, groups=64, positions=3136)
    False
    """
    thin = 2 * rank * (groups * fan_in + out) * positions
    return THIN * thin < out * fan_in * (positions + 2 * rank)


def _without_autocast(function: Callable[..., Any], device: str, *arguments: Any) -> Any:
    if not torch.is_autocast_enabled(device):
        return function(*arguments)
    with torch.autocast(device, enabled=False):  # would round the base weight itself, before the fold
        return function(*arguments)


class _Convolution(torch.autograd.Function):
    """A convolution with a folded weight. Its backward pass is made of differentiable operations only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        scale: float,
        geometry: Geometry,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, lora_A, lora_B)
        ctx.scale, ctx.geometry = scale, geometry
        return geometry.convolve(x, Pair(weight, lora_A, lora_B, scale).fold(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _without_autocast(_Convolution.gradients, grad.device.type, ctx, grad)

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> Any:
        """One for each argument of `forward`."""
        x, *tensors = ctx.saved_tensors
        pair = _pair(tensors, ctx.scale)
        needs_x, _, needs_A, needs_B, needs_bias, *_ = ctx.needs_input_grad
        folded = pair.fold(x.dtype) if needs_x else None
        found = convolution_gradients(pair, ctx.geometry, grad, x, folded, needs_A=needs_A, needs_B=needs_B)
        grad_x, grad_A, grad_B = found
        grad_bias = grad.transpose(0, 1).reshape(len(pair.lora_B), -1).sum(1) if needs_bias else None
        return grad_x, None, grad_A, grad_B, grad_bias, None, None


def convolution_gradients(
    pair: Pair,
    geometry: Geometry,
    grad: Tensor,
    x: Tensor,
    folded: Tensor | None,
    *,
    needs_A: bool = True,
    needs_B: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the input and of both factors of a convolution.

    Args:
        pair: what its weight is folded from.
        geometry: how it moves over the input.
        grad: of its output.
        x: the input.
        folded: the folded weight; None where the input needs no gradient.
        needs_A: whether lora_A does.
        needs_B: whether lora_B does.
    """
    out, rank = pair.lora_B.shape
    fan_in, groups = pair.lora_A.shape[1], geometry.groups
    positions = grad.numel() // out
    thin = thin_is_cheaper(rank=rank, out=out, fan_in=fan_in, groups=groups, positions=positions)
    grad_x = grad_A = grad_B = None
    if folded is not None:
        grad_x = geometry.input_gradient(grad, x, folded)
    if thin and (needs_A or needs_B):
        grad_A, grad_B = _thin_gradients(pair, geometry, grad, x, needs_A=needs_A, needs_B=needs_B)
    elif needs_A or needs_B:
        grad_A, grad_B = pair.from_full(geometry.weight_gradient(grad, x, pair.weight.to(x.dtype)))
    return grad_x, grad_A, grad_B


def _thin_gradients(
    pair: Pair, geometry: Geometry, grad: Tensor, x: Tensor, *, needs_A: bool, needs_B: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of A and B by way of as many channels as the rank, for each group."""
    (out, rank), fan_in, groups = pair.lora_B.shape, pair.lora_A.shape[1], geometry.groups
    down = pair.lora_A.to(x.dtype).view(rank, *pair.weight.shape[1:])
    down = down.repeat(groups, *(1,) * (down.dim() - 1)) if groups > 1 else down
    rows = grad.reshape(len(grad), groups, out // groups, -1)
    grad_A = grad_B = None
    if needs_A:
        across = pair.lora_B.to(x.dtype).view(groups, -1, rank).transpose(1, 2) @ rows
        across = across.view(len(grad), groups * rank, *grad.shape[2:])
        grad_A = geometry.weight_gradient(across, x, down).reshape(groups, rank, fan_in).sum(0)
        grad_A = pair.scale * grad_A.to(pair.lora_A.dtype)
    if needs_B:
        hidden = geometry.convolve(x, down).reshape(len(grad), groups, rank, -1)
        # the thin factor first: many times as fast as the other way round
        grad_B = (hidden @ rows.transpose(2, 3)).sum(0).transpose(1, 2).reshape(out, rank)
        grad_B = pair.scale * grad_B.to(pair.lora_B.dtype)
    return grad_A, grad_B


class _Projection(torch.autograd.Function):
    """A matrix product with a folded weight, made as `folding_is_cheaper` says; also differentiable twice."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        scale: float,
        folding: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, lora_A, lora_B)
        ctx.scale, ctx.folding = scale, folding
        if folding:
            return F.linear(x, Pair(weight, lora_A, lora_B, scale).fold(x.dtype), bias)
        return F.linear(x, weight, bias).addmm_(x @ lora_A.t(), lora_B.t(), alpha=scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _without_autocast(_Projection.gradients, grad.device.type, ctx, grad)

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> Any:
        """One for each argument of `forward`."""
        x, *tensors = ctx.saved_tensors
        pair = _pair(tensors, ctx.scale)
        needs_x, _, needs_A, needs_B, needs_bias, *_ = ctx.needs_input_grad
        down, up = pair.lora_A.to(x.dtype), pair.lora_B.to(x.dtype)
        (out, rank), fan_in = up.shape, down.shape[1]
        thin = thin_is_cheaper(rank=rank, out=out, fan_in=fan_in, groups=1, positions=len(x))
        grad_x = grad_A = grad_B = None
        across = grad @ up if (needs_A and thin) or (needs_x and not ctx.folding) else None
        if needs_x:
            grad_x = grad @ (pair.fold(x.dtype) if ctx.folding else pair.weight)
            if across is not None and not ctx.folding:
                grad_x = grad_x.addmm(across, down, alpha=pair.scale)
        if not thin and (needs_A or needs_B):
            grad_A, grad_B = pair.from_full(grad.t() @ x)
        elif across is not None and needs_A:
            grad_A = pair.scale * (across.t() @ x).to(pair.lora_A.dtype)
        if thin and needs_B:
            grad_B = pair.scale * (grad.t() @ (x @ down.t())).to(pair.lora_B.dtype)
        return grad_x, None, grad_A, grad_B, grad.sum(0) if needs_bias else None, None, None


class _FrozenNorm(torch.autograd.Function):
    """Batch normalisation of which nothing learns: a factor for each channel, so that its input need not be kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any, plain: Callable[[Any, Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(module.running_var, module.weight)
        ctx.eps, ctx.dtype = module.eps, x.dtype
        return plain(module, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        variance, weight = ctx.saved_tensors
        factor = (variance + ctx.eps).rsqrt()
        factor = factor if weight is None else factor * weight
        return (grad * factor.view(-1, *(1,) * (grad.dim() - 2))).to(ctx.dtype), None, None


def folding_is_cheaper(*, rows: int, out: int, fan_in: int) -> bool:
    """Whether a matrix product folds its weight, in both passes, rather than adds two thin products in each.

    Multiplications, shared factors apart: ``out * fan_in`` for a fold, ``rows * (out + fan_in)`` for thin products.

    >>> folding_is_cheaper(rows=64, out=1000, fan_in=2048), folding_is_cheaper(rows=1576, out=768, fan_in=768)
    (False, True)
    """
    return out * fan_in < rows * (out + fan_in)


def _pair_of(module: Any, x: Any) -> Pair | None:
    """What the layer's weight is folded from; None where this is no ordinary training step of an attached adapter."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or type(x) not in _PLAIN:
        return None
    stack = module.parametrizations._modules.get("weight") if "parametrizations" in module._modules else None
    if stack is None or len(stack) != 1 or parametrize._cache_enabled or _is_transformed() or x.is_nested:
        return None
    part, weight = stack[0], stack.original
    if not part.steps_thinly:  # an adapter of another kind took the place of the one that the layer's class is made for
        return None
    pair = Pair(weight, part.lora_A, part.lora_B, part.target.scale * part.strength)
    wanted = pair.lora_A.requires_grad or pair.lora_B.requires_grad
    ordinary = all(type(tensor) in _PLAIN for tensor in pair[:3])
    return pair if part.enabled and wanted and ordinary and not weight.requires_grad and x.numel() else None


_PLAIN = (Tensor, nn.Parameter)


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


def _project(x: Tensor, pair: Pair, bias: Tensor | None) -> Tensor:
    """The product for a matrix of rows."""
    out, fan_in = pair.lora_B.shape[0], pair.lora_A.shape[1]
    alike = x.dtype == pair.weight.dtype == pair.lora_A.dtype == pair.lora_B.dtype
    thin = alike and x.dtype in (torch.float32, torch.float64)  # else a sum of roundings, not the rounded sum
    folding = not thin or folding_is_cheaper(rows=len(x), out=out, fan_in=fan_in)
    weight = pair.weight.view(out, fan_in)
    result: Tensor = _Projection.apply(x, weight, pair.lora_A, pair.lora_B, bias, pair.scale, folding)
    return result


def _padded(module: Any, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The input with what the convolution cannot pad by itself, and what it can."""
    none = (0,) * len(module.stride)
    margins = module._reversed_padding_repeated_twice
    if module.padding_mode != "zeros":
        return F.pad(x, margins, mode=module.padding_mode), none
    if module.padding == "valid":
        return x, none
    if module.padding == "same":
        if margins[::2] != margins[1::2]:
            return F.pad(x, margins), none
        return x, tuple(margins[::-2])
    return x, module.padding


def _convolution_forward(plain: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    def forward(module: Any, x: Tensor) -> Tensor:
        pair, bias = _pair_of(module, x), module.bias
        ready = None if pair is None or x.dim() != pair.weight.dim() else _in_one_dtype(x, pair.weight, bias)
        if pair is None or ready is None:
            return plain(module, x)
        x, bias = ready
        result: Tensor = _without_autocast(convolved, x.device.type, module, x, pair, bias)
        return result

    def convolved(module: Any, x: Tensor, pair: Pair, bias: Tensor | None) -> Tensor:
        x, padding = _padded(module, x)
        one_point = x.numel() == x.shape[0] * x.shape[1] and pair.weight.numel() == x.shape[1] * len(pair.weight)
        if one_point and not any(padding):  # of input and kernel, without groups
            return _project(x.flatten(1), pair, bias).view(len(x), -1, *x.shape[2:])
        geometry = Geometry(module.stride, padding, module.dilation, module.groups)
        result: Tensor = _Convolution.apply(x, *pair[:3], bias, pair.scale, geometry)
        return result

    return forward


def _linear_forward(plain: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    def forward(module: Any, x: Tensor) -> Tensor:
        pair, bias = _pair_of(module, x), module.bias
        ready = None if pair is None else _in_one_dtype(x, pair.weight, bias)
        if pair is None or ready is None:
            return plain(module, x)
        x, bias = ready
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        result: Tensor = _without_autocast(_project, x.device.type, rows, pair, bias)
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

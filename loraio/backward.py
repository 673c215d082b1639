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

import math
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


SMALL = 32
"""How many times as many numbers the input must have as the hidden channels that are kept with it."""

_EXACT = (torch.float32, torch.float64)
"""Dtypes in which a sum of products is not rounded to less than factors have."""


class Pair(NamedTuple):
    """One weight and what is added to it: ``weight + scale * (B @ A)``."""

    weight: Tensor
    lora_A: Tensor  # noqa: N815
    lora_B: Tensor  # noqa: N815
    scale: float

    def fold(self, dtype: torch.dtype) -> Tensor:
        """The folded weight, rounded to the weight's dtype and then to the one that the layer computes in."""
        weight, lora_A, lora_B = self.weight, self.lora_A, self.lora_B
        if weight.dtype == lora_A.dtype == lora_B.dtype == dtype and dtype in _EXACT:
            return weight.reshape(len(weight), -1).addmm(lora_B, lora_A, alpha=self.scale).view(weight.shape)
        exact = torch.promote_types(weight.dtype, torch.float32)
        matrix = weight.to(exact).reshape(len(weight), -1)
        folded = matrix.addmm(lora_B.to(exact), lora_A.to(exact), alpha=self.scale)
        return folded.view(weight.shape).to(weight.dtype).to(dtype)

    def in_one_dtype(self, x: Tensor) -> bool:
        """Whether all is in the input's dtype, and sums of products in it are no sums of roundings."""
        return x.dtype == self.weight.dtype == self.lora_A.dtype == self.lora_B.dtype and x.dtype in _EXACT

    def from_full(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of A and B from that of the folded weight."""
        matrix = gradient.reshape(len(gradient), -1).to(torch.promote_types(gradient.dtype, torch.float32))
        lora_A, lora_B = self.lora_A.to(matrix.dtype), self.lora_B.to(matrix.dtype)
        grad_A = torch.addmm(lora_A, lora_B.t(), matrix, beta=0, alpha=self.scale)
        grad_B = torch.addmm(lora_B, matrix, lora_A.t(), beta=0, alpha=self.scale)
        return grad_A.to(self.lora_A.dtype), grad_B.to(self.lora_B.dtype)


def _pair(tensors: Sequence[Tensor], scale: float) -> Pair:
    weight, lora_A, lora_B = tensors
    return Pair(weight, lora_A, lora_B, scale)


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of these images come last in memory, and would not in another order too."""
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


class Geometry(NamedTuple):
    """How a convolution is moved over its input, as torch's own operators take it."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def sizes(self, x: Tensor, weight: Tensor) -> tuple[int, ...]:
        """Of the output, without batch and channels.

        >>> Geometry((2, 2), (1, 1), (1, 1), 1).sizes(torch.empty(1, 3, 28, 28), torch.empty(4, 3, 3, 3))
        (14, 14)
        """
        axes = zip(x.shape[2:], weight.shape[2:], self.stride, self.padding, self.dilation, strict=True)
        return tuple((size + 2 * pad - gap * (wide - 1) - 1) // step + 1 for size, wide, step, pad, gap in axes)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The convolution."""
        none = (0,) * len(self.stride)
        return torch.convolution(x, weight, bias, self.stride, self.padding, self.dilation, False, none, self.groups)

    def met_by_a_point(self, x: Tensor, weight: Tensor) -> Tensor | None:
        """What a kernel of one point is multiplied with, as (batch, channels, points); of the weight only shape counts.

        None where something else is to be done: more than a point, groups, padding; memory in which the channels come
        last; other devices than a CPU, where oneDNN takes longer on one core than matrix products (seen in v3.12).
        """
        plain = self.groups == 1 and not any(self.padding) and weight.numel() == weight.shape[0] * weight.shape[1]
        if not plain or x.device.type != "cpu" or not x.is_contiguous():
            return None
        if max(self.stride) > 1:
            x = x[self._met_points()]
        return x.flatten(2)

    def unmet(self, gradient: Tensor, x: Tensor, spatial: Sequence[int]) -> Tensor:
        """The gradient of the input of a kernel of one point, from that of what it met: none where strides skip.

        Args:
            gradient: as `met_by_a_point`.
            x: the input, for its shape.
            spatial: sizes of the output.
        """
        gradient = gradient.unflatten(2, tuple(spatial))
        if gradient.shape == x.shape:
            return gradient
        whole = torch.zeros_like(x)
        whole[self._met_points()] = gradient
        return whole

    def _met_points(self) -> tuple[slice, ...]:
        return (slice(None), slice(None), *(slice(None, None, stride) for stride in self.stride))

    def input_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The gradient of the input; of the input only shape and layout count."""
        return self._gradients(grad, x, weight, (True, False, False))[0]

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


def folding_is_cheaper(*, positions: int, width: int) -> bool:
    """Whether a pass folds the weight first, rather than adds a product of two thin matrices to what it gives.

    A fold goes through ``out * fan_in`` numbers, whatever the positions; such a product, one factor of which is there
    anyhow, through ``out`` numbers for each position in the forward pass, and ``fan_in`` in the backward pass.

    Args:
        positions: of the output, over the whole batch.
        width: fan_in in the forward pass, out in the backward pass.

    >>> folding_is_cheaper(positions=196, width=2048), folding_is_cheaper(positions=12544, width=64)
    (False, True)
    """
    return positions > width


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
        geometry: Geometry,
    ) -> Tensor:
        ctx.scale, ctx.geometry = scale, geometry
        pair = Pair(weight, lora_A, lora_B, scale)
        ctx.thin, positions = _thin_convolution(pair, geometry, x)
        ctx.addable = ctx.thin and geometry.groups == 1 and pair.in_one_dtype(x)
        hidden = None
        is_small = SMALL * len(lora_A) * positions <= x.numel()
        if not ctx.addable or not is_small or folding_is_cheaper(positions=positions, width=lora_A.shape[1]):
            y = geometry.convolve(x, pair.fold(x.dtype), bias)
        else:
            hidden = _hidden(pair, geometry, x)
            y = geometry.convolve(x, weight, bias)
            y.add_(_times(lora_B, hidden.flatten(2)).view(y.shape), alpha=scale)
        ctx.save_for_backward(x, weight, lora_A, lora_B, hidden)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _without_autocast(_Convolution.gradients, grad.device.type, ctx, grad)

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> Any:
        """One for each argument of `forward`."""
        x, *tensors, hidden = ctx.saved_tensors
        pair, geometry = _pair(tensors, ctx.scale), ctx.geometry
        needs_x, _, needs_A, needs_B, needs_bias, *_ = ctx.needs_input_grad
        grad_x = grad_A = grad_B = across = None
        if needs_x:
            grad_x, across = _input_gradient(pair, geometry, grad, x, addable=ctx.addable)
        if not ctx.thin and (needs_A or needs_B):
            grad_A, grad_B = pair.from_full(geometry.weight_gradient(grad, x, pair.weight.to(x.dtype)))
        else:
            if needs_A:
                grad_A = _down_gradient(pair, geometry, grad, x, across)
            if needs_B:
                grad_B = _up_gradient(pair, geometry, grad, x, hidden)
        grad_bias = grad.transpose(0, 1).reshape(len(pair.lora_B), -1).sum(1) if needs_bias else None
        return grad_x, None, grad_A, grad_B, grad_bias, None, None


def _thin_convolution(pair: Pair, geometry: Geometry, x: Tensor) -> tuple[bool, int]:
    """Whether the factors' gradients come by way of the rank, and positions of the output over the whole batch."""
    (out, rank), fan_in = pair.lora_B.shape, pair.lora_A.shape[1]
    positions = len(x) * math.prod(geometry.sizes(x, pair.weight))
    thin = thin_is_cheaper(rank=rank, out=out, fan_in=fan_in, groups=geometry.groups, positions=positions)
    return thin, positions


def _down(pair: Pair, geometry: Geometry, dtype: torch.dtype) -> Tensor:
    """lora_A as the weight of a convolution, once for each group."""
    down = pair.lora_A.to(dtype).view(-1, *pair.weight.shape[1:])
    return down.repeat(geometry.groups, *(1,) * (down.dim() - 1)) if geometry.groups > 1 else down


def _times(matrix: Tensor, batch: Tensor) -> Tensor:
    """The product of a matrix with each of a batch: torch.matmul copies the batch where the matrix is learned."""
    return torch.bmm(matrix.expand(len(batch), -1, -1), batch)


def _hidden(pair: Pair, geometry: Geometry, x: Tensor) -> Tensor:
    """What lora_A makes of the input: (batch, groups * rank, ...), as the output."""
    met = geometry.met_by_a_point(x, pair.weight)
    if met is not None:
        return _times(pair.lora_A.to(x.dtype), met).view(len(x), -1, *geometry.sizes(x, pair.weight))
    return geometry.convolve(x, _down(pair, geometry, x.dtype))


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


def _input_gradient(
    pair: Pair, geometry: Geometry, grad: Tensor, x: Tensor, *, addable: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradient of the input, and what lora_B makes of the output's gradient, if that came along."""
    out, positions = len(pair.lora_B), grad.numel() // len(pair.lora_B)
    met = geometry.met_by_a_point(x, pair.weight)
    if addable and not folding_is_cheaper(positions=positions, width=out):
        across = _across(pair, geometry, grad)
        if met is None:
            grad_x = geometry.input_gradient(grad, x, pair.weight)
            thin = geometry.input_gradient(across, x, _down(pair, geometry, x.dtype))
            return grad_x.add(thin, alpha=pair.scale), across
        down = pair.lora_A.t().expand(len(x), -1, -1)
        gradient = _times(pair.weight.flatten(1).t(), grad.flatten(2)).baddbmm(
            down, across.flatten(2), alpha=pair.scale
        )
        return geometry.unmet(gradient, x, grad.shape[2:]), across
    folded = pair.fold(x.dtype)
    if met is None:
        return geometry.input_gradient(grad, x, folded), None
    folded, channels = folded.flatten(1), x.shape[1]
    if not addable or channels > positions:
        return geometry.unmet(_times(folded.t(), grad.flatten(2)), x, grad.shape[2:]), None
    both = _times(torch.cat([folded, pair.lora_B], 1).t(), grad.flatten(2))  # reads the gradient once for the two
    return geometry.unmet(both[:, :channels], x, grad.shape[2:]), both[:, channels:].unflatten(2, grad.shape[2:])


def _down_gradient(pair: Pair, geometry: Geometry, grad: Tensor, x: Tensor, across: Tensor | None) -> Tensor:
    """That of lora_A by way of the rank; ``across`` is `_across`, if it is there."""
    across = _across(pair, geometry, grad) if across is None else across
    met = geometry.met_by_a_point(x, pair.weight)
    if met is not None:
        gradient = (across.flatten(2) @ met.transpose(1, 2)).sum(0)
    else:
        full = geometry.weight_gradient(across, x, _down(pair, geometry, x.dtype))
        gradient = full.reshape(geometry.groups, *pair.lora_A.shape).sum(0) if geometry.groups > 1 else full.flatten(1)
    return pair.scale * gradient.to(pair.lora_A.dtype)


def _up_gradient(pair: Pair, geometry: Geometry, grad: Tensor, x: Tensor, hidden: Tensor | None) -> Tensor:
    """That of lora_B by way of the rank; ``hidden`` is `_hidden`, if it was kept: constant in second derivatives."""
    if hidden is None or torch.is_grad_enabled():
        hidden = _hidden(pair, geometry, x)
    (out, rank), groups = pair.lora_B.shape, geometry.groups
    # the thin factor first: many times as fast as the other way round
    if groups == 1 and is_channels_last(grad) and is_channels_last(hidden):
        across, rows = (tensor.permute(0, 2, 3, 1).flatten(0, 2) for tensor in (hidden, grad))
        gradient = across.t() @ rows
    else:
        rows = grad.reshape(len(grad), groups, out // groups, -1).transpose(2, 3)
        gradient = (hidden.reshape(len(grad), groups, rank, -1) @ rows).sum(0)
    return pair.scale * gradient.transpose(-2, -1).reshape(out, rank).to(pair.lora_B.dtype)


class _Projection(torch.autograd.Function):
    """A matrix product with an adapted weight; also differentiable twice. Thin matrices are (rank, rows): faster."""

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
        ctx.thin = thin_is_cheaper(rank=rank, out=out, fan_in=fan_in, groups=1, positions=len(x))
        ctx.addable = pair.in_one_dtype(x)
        hidden = None
        if not ctx.addable or folding_is_cheaper(positions=len(x), width=fan_in):
            y = F.linear(x, pair.fold(x.dtype), bias)
        else:
            hidden = lora_A @ x.t()
            y = F.linear(x, weight, bias).addmm_(hidden.t(), lora_B.t(), alpha=scale)
            hidden = hidden if SMALL * rank <= fan_in else None
        ctx.save_for_backward(x, weight, lora_A, lora_B, hidden)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _without_autocast(_Projection.gradients, grad.device.type, ctx, grad)

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> Any:
        """One for each argument of `forward`."""
        x, *tensors, hidden = ctx.saved_tensors
        pair = _pair(tensors, ctx.scale)
        needs_x, _, needs_A, needs_B, needs_bias, *_ = ctx.needs_input_grad
        down, up = pair.lora_A.to(x.dtype), pair.lora_B.to(x.dtype)
        adding = ctx.addable and not folding_is_cheaper(positions=len(x), width=len(up))
        grad_x = grad_A = grad_B = across = None
        if (needs_A and ctx.thin) or (needs_x and adding):
            across = up.t() @ grad.t()
        if needs_x and adding and across is not None:
            grad_x = (grad @ pair.weight).addmm(across.t(), down, alpha=pair.scale)
        elif needs_x:
            grad_x = grad @ pair.fold(x.dtype)
        if not ctx.thin and (needs_A or needs_B):
            grad_A, grad_B = pair.from_full(grad.t() @ x)
        elif across is not None and needs_A:
            grad_A = torch.addmm(down, across, x, beta=0, alpha=pair.scale).to(pair.lora_A.dtype)
        if ctx.thin and needs_B:
            if hidden is None or torch.is_grad_enabled():  # what was kept is a constant for second derivatives
                hidden = down @ x.t()
            grad_B = torch.addmm(up.t(), hidden, grad, beta=0, alpha=pair.scale).t().contiguous().to(pair.lora_B.dtype)
        return grad_x, None, grad_A, grad_B, grad.sum(0) if needs_bias else None, None


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
    weight = pair.weight.view(len(pair.lora_B), -1)
    result: Tensor = _Projection.apply(x, weight, pair.lora_A, pair.lora_B, bias, pair.scale)
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
        if pair.weight.numel() == x.shape[1] * len(pair.weight) and not any(padding):  # one point, without groups
            if x.numel() == x.shape[0] * x.shape[1]:
                return _project(x.flatten(1), pair, bias).view(len(x), -1, *x.shape[2:])
            if is_channels_last(x) and x.device.type == "cpu" and max(module.stride) == 1:
                rows = x.permute(0, 2, 3, 1)
                return _project(rows.flatten(0, 2), pair, bias).view(*rows.shape[:3], -1).permute(0, 3, 1, 2)
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

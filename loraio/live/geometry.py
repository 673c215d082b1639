"""Convolve, and compute the gradients of a convolution."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

COLUMNS = 3
"""Width of kernel for which weight gradients of depthwise convolutions are fast on a CPU."""


def is_channels_last(x: Tensor) -> bool:
    """Return True if the channels of these images come last in memory, and in no other order of dimensions."""
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


class Geometry(NamedTuple):
    """The arguments of a convolution, as torch's own operators take them."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def sizes(self, x: Tensor, weight: Tensor) -> tuple[int, ...]:
        """Return the sizes of the output, without batch and channels.

        >>> Geometry((2, 2), (1, 1), (1, 1), 1).sizes(torch.empty(1, 3, 28, 28), torch.empty(4, 3, 3, 3))
        (14, 14)
        """
        axes = zip(x.shape[2:], weight.shape[2:], self.stride, self.padding, self.dilation, strict=True)
        return tuple((size + 2 * pad - gap * (wide - 1) - 1) // step + 1 for size, wide, step, pad, gap in axes)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute the convolution."""
        none = (0,) * len(self.stride)
        return torch.convolution(x, weight, bias, self.stride, self.padding, self.dilation, False, none, self.groups)

    def is_product(self, x: Tensor, weight: Tensor) -> bool:
        """Return True if the convolution is computed as matrix products; of the weight only the shape counts.

        So are kernels of one point without groups and padding, on a CPU, where oneDNN takes longer on one core than
        matrix products (seen in v3.12); but not where the channels come last in memory.
        """
        plain = self.groups == 1 and not any(self.padding) and weight.numel() == weight.shape[0] * weight.shape[1]
        return plain and x.device.type == "cpu" and x.is_contiguous()

    def met(self, x: Tensor) -> Tensor:
        """Return a one-point kernel's input without the points that strides skip: (batch, channels, points)."""
        return (x[self._met_points()] if max(self.stride) > 1 else x).flatten(2)

    def unmet(self, gradient: Tensor, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """Undo `met` for a gradient, with zeros at the points that strides skip; of ``x`` only the shape counts."""
        gradient = gradient.view(*gradient.shape[:2], *sizes)
        if max(self.stride) == 1:
            return gradient
        whole = torch.zeros_like(x)
        whole[self._met_points()] = gradient
        return whole

    def _met_points(self) -> tuple[slice, ...]:
        return (slice(None), slice(None), *(slice(None, None, stride) for stride in self.stride))

    def input_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient of the input; of the input only shape and layout count."""
        return self._gradients(grad, x, weight, (True, False, False))[0]

    def weight_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient of the weight; of the weight only shape and layout count.

        oneDNN is several times as fast at weight gradients of depthwise convolutions where the kernel is three wide and
        nothing is left to pad (seen in v3.12 with 5 x 5 kernels), so wider kernels are split.
        """
        if not self.is_split(x, weight):
            return self._gradients(grad, x, weight, (False, True, False))[1]
        inside = self._replace(padding=(0, 0))
        three = weight.new_empty(len(weight), 1, weight.shape[2], COLUMNS)
        width = self.stride[1] * (grad.shape[3] - 1) + COLUMNS
        rows, columns = self.padding
        found = []
        for start in range(0, weight.shape[3], COLUMNS):  # the input that these columns meet, cropped where negative
            margins = (columns - start, width - x.shape[3] - columns + start, rows, rows)
            found.append(inside._gradients(grad, F.pad(x, margins), three, (False, True, False))[1])
        return torch.cat(found, 3)[..., : weight.shape[3]]

    def is_split(self, x: Tensor, weight: Tensor) -> bool:
        """Return True if the gradient of the weight is computed for some columns of the kernel at a time."""
        depthwise = self.groups == x.shape[1] == len(weight) and x.dim() == 4 and self.dilation == (1, 1)
        return depthwise and weight.shape[3] > COLUMNS and x.device.type == "cpu"

    def both_gradients(self, grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of input and weight: together in less time where both want the same memory order."""
        if self.is_split(x, weight):
            return self.input_gradient(grad, x, weight), self.weight_gradient(grad, x, weight)
        return self._gradients(grad, x, weight, (True, True, False))[:2]

    def _gradients(
        self, grad: Tensor, x: Tensor, weight: Tensor, mask: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        sizes = self.stride, self.padding, self.dilation, False, (0,) * len(self.stride), self.groups
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(grad, x, weight, None, *sizes, mask)
        return found

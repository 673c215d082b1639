"""A layer on samples with an adapter each: one call for each adapter, or one product of matrices for all.

A convolution on a CPU takes its time however little it has to do. Where there is little to unfold, the samples of all
adapters are multiplied in one call. Elsewhere the weights are brought into oneDNN's order once, not at each call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from loraio.serving.residents import FoldedWeights

SPARED_BYTES = 1 << 17
"""Up to this size for each adapter, 128 KiB, one product for all samples is cheaper than a convolution for each
adapter. Counted are the unfolded inputs and a weight for each sample."""

_HAS_REORDERING = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name) for name in ("_convolution_pointwise", "_reorder_convolution_weight")
)
"""True if this torch has the operators that torch.compile uses for convolutions on a CPU."""


class Use(NamedTuple):
    """One adapter's weight for a layer."""

    name: str
    weight: Tensor
    folded: FoldedWeights


def run_split(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    uses: Sequence[Use],
    sizes: Sequence[int],
    reorder: bool,
) -> Tensor:
    """Run a layer on each adapter's samples with that adapter's weight.

    ``args`` and ``kwargs`` are those of a call of ``F.linear`` or a convolution with the base weight. The samples of
    one adapter are next to each other, ``sizes`` says how many. ``reorder`` lets convolutions use weights in oneDNN's
    order, which makes their outputs channels_last.
    """
    x, weight, *rest = args
    settings = _settings(*rest, **kwargs) if reorder and func == torch.conv2d else None
    if settings is None or not (x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"):
        outs = [func(samples, use.weight, *rest, **kwargs) for samples, use in zip(x.split(sizes), uses, strict=True)]
    else:
        bias, *numbers = settings
        if len(uses) > 1:
            windows = _windows(x, weight, *settings[1:], most=SPARED_BYTES * len(uses))
            if windows is not None:
                return _multiplied(windows, uses, sizes, bias)
        x = x.contiguous(memory_format=torch.channels_last)
        shape = (8, *x.shape[1:])  # a hint; any number of samples will do
        key = (shape, str(numbers))
        convolution = torch.ops.mkldnn._convolution_pointwise.default
        outs = [
            convolution(samples, _reordered(use, key, numbers), bias, *numbers, "none", [], "")
            for samples, use in zip(x.split(sizes), uses, strict=True)
        ]
    return torch.cat(outs) if len(outs) > 1 else outs[0]


def _windows(
    x: Tensor,
    weight: Tensor,
    padding: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    most: int,
) -> Tensor | None:
    """Return the windows that a convolution multiplies, as a view (n, in, kh, kw, height, width).

    None with groups, and where a copy of it and a weight for each sample would have more bytes than ``most``.
    """
    kernel = weight.shape[2:]
    outs = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, p, s, d in zip(x.shape[2:], kernel, padding, stride, dilation, strict=True)
    ]
    window = weight[0].nbytes
    if groups != 1 or min(outs) < 1 or len(x) * (outs[0] * outs[1] * window + weight.nbytes) > most:
        return None
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    within = [step * d for step, d in zip(x.stride()[2:], dilation, strict=True)]
    between = [step * s for step, s in zip(x.stride()[2:], stride, strict=True)]
    return x.as_strided((*x.shape[:2], *kernel, *outs), (*x.stride()[:2], *within, *between))


def _multiplied(windows: Tensor, uses: Sequence[Use], sizes: Sequence[int], bias: Tensor | None) -> Tensor:
    """Compute a convolution as one matrix product for each sample, all in one call; channels_last."""
    samples, height, width = len(windows), *windows.shape[4:]
    columns = windows.reshape(samples, -1, height * width).transpose(1, 2)
    flat = [use.weight.flatten(1) for use in uses]
    weights = torch.stack([own for own, size in zip(flat, sizes, strict=True) for _ in range(size)]).transpose(1, 2)
    rows = torch.bmm(columns, weights) if bias is None else torch.baddbmm(bias, columns, weights)
    return rows.view(samples, height, width, -1).permute(0, 3, 1, 2)


def _reordered(use: Use, key: tuple[Any, ...], numbers: Sequence[Any]) -> Tensor:
    """Return the weight in the order that oneDNN would otherwise bring it into at each call."""
    known = use.folded.reordered
    found = known.get((use.name, key))
    if found is None:
        plain = use.weight.detach().contiguous(memory_format=torch.channels_last)
        found = known[use.name, key] = torch.ops.mkldnn._reorder_convolution_weight.default(plain, *numbers, key[0])
    return found


def _settings(
    bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> tuple[Tensor | None, list[int], list[int], list[int], int] | None:
    """Return bias, padding, stride, dilation and groups as oneDNN's operator takes them; None if it cannot be used."""
    if isinstance(padding, str) or not (_HAS_REORDERING and torch.backends.mkldnn.enabled):
        return None
    return bias, _pair(padding), _pair(stride), _pair(dilation), groups


def _pair(value: Any) -> list[int]:
    numbers = [value] if isinstance(value, int) else list(value)
    return [numbers[0], numbers[-1]]

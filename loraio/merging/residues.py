"""Keep what restores a base weight from the folded weight, bit for bit: its residue.

The old weight is predicted from the new one and the factors. The residue is the difference between prediction and old
weight, counted in steps from float to float. It is mostly zero: two roundings to nearest undo each other unless the
folded weight lies in a coarser part of the floats. Any difference can be coded, so a bad prediction costs only size.
But the prediction must be the same on every machine. It is made of single IEEE operations in a fixed order, because
libraries of matrix products order their sums differently on different processors.
"""

from __future__ import annotations

import bz2
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraio.adapter import Adapter
from loraio.adapter.kinds import KINDS
from loraio.adapter.layers import LAYER_TYPES
from loraio.adapter.rounding import round_once
from loraio.errors import FormatError
from loraio.files.tensors import tensor_bytes

Words = NDArray[Any]

LENGTH = 4
"""Each block begins with its length, in so many bytes, little-endian."""

LEVEL = 1
"""Of bzip2: blocks of 100 kB. Larger ones save 0.001 bits a weight and take 1.4 of the time."""


def residue_of(part: Adapter, base: Tensor, folded: Tensor, strength: float) -> bytes:
    """Return a block from which `restored` makes the base weight.

    Args:
        part: an adapter of one target, from `loraio.adapter.parts_of`; ``base`` is the slice that it is for.
        folded: that slice with the adapter folded in, or anything else of its shape and dtype.
    """
    ((name, target),) = part.targets.items()
    layer, kind = LAYER_TYPES[target.layer], KINDS[target.kind]
    factors = part.factors_of(name)
    wide = layer.to_matrix(base.double(), target.groups)
    side = kind.side(wide, {short: factor.double() for short, factor in factors.items()}, scale=target.scale)
    return encode(base, predicted(part, folded, strength, side), side)


def restored(part: Adapter, folded: Tensor, strength: float, block: bytes, *, where: str) -> Tensor:
    """Return the base weight, given its residue; raise FormatError if that is of another shape or dtype."""
    ((_, target),) = part.targets.items()
    numbers = KINDS[target.kind].side_numbers(target.matrix_shape[0])
    start = LENGTH + 8 * numbers
    if block_length(block[:LENGTH], where=where) != len(block) or len(block) < start:
        raise _damaged(where)
    side = torch.from_numpy(np.frombuffer(block[LENGTH:start], dtype="<f8").astype(np.float64)) if numbers else None
    return decode(block[start:], predicted(part, folded, strength, side), where=where)


def predicted(part: Adapter, folded: Tensor, strength: float, side: Tensor | None) -> Tensor:
    """Predict the base weight from the folded one; shape and dtype of ``folded``, the same bits on every machine.

    Where the prediction is not finite, it is the folded weight.
    """
    ((name, target),) = part.targets.items()
    layer, kind = LAYER_TYPES[target.layer], KINDS[target.kind]
    wide = layer.to_matrix(folded.double(), target.groups)
    factors = {short: factor.double() for short, factor in part.factors_of(name).items()}
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        old = kind.unfold(wide, factors, scale=target.scale, strength=strength, side=side)
        old = round_once(layer.from_matrix(old, folded.shape, target.groups).contiguous(), folded.dtype)
    return torch.where(old.isfinite(), old, folded)


# Coding: a block is its length in four bytes, the side numbers, and the compressed differences.


def encode(base: Tensor, guess: Tensor, side: Tensor | None = None) -> bytes:
    """Return a block with the differences of two tensors of one float dtype and shape, and with side numbers.

    The differences are whole numbers, mostly zero. Their lowest bytes come first, then the next bytes, and so on: each
    of these planes compresses well by itself.
    """
    steps = steps_between(base, guess)
    planes = np.ascontiguousarray(steps.view(np.uint8).reshape(len(steps), steps.itemsize).T)
    numbers = b"" if side is None else bytes(tensor_bytes(side).numpy().data)
    rest = numbers + bz2.compress(planes.tobytes(), LEVEL)
    return (LENGTH + len(rest)).to_bytes(LENGTH, "little") + rest


def decode(coded: bytes, guess: Tensor, *, where: str) -> Tensor:
    """Return the tensor that `encode` was given; raise FormatError if ``coded`` is of another size than ``guess``."""
    count, width = guess.numel(), guess.dtype.itemsize
    coder = bz2.BZ2Decompressor()
    try:
        planes = coder.decompress(coded, count * width + 1)  # a few bytes may stand for very many
    except (OSError, EOFError) as error:
        raise _damaged(where) from error
    if not coder.eof or coder.unused_data or len(planes) != count * width:
        raise _damaged(where)
    digits = np.frombuffer(planes, dtype=np.uint8).reshape(width, count)
    steps = np.ascontiguousarray(digits.T).view(_unsigned(width)).reshape(count)
    raw = torch.from_numpy(_stepped(tensor_bytes(guess), steps))
    return raw.view(torch.uint8).view(guess.dtype).view(guess.shape)


def block_length(head: bytes, *, where: str) -> int:
    """Return the length of a block, given its first `LENGTH` bytes; raise FormatError if it is shorter than those."""
    length = int.from_bytes(head, "little")
    if len(head) < LENGTH or length < LENGTH:
        raise _damaged(where)
    return length


def _damaged(where: str) -> FormatError:
    return FormatError("the residue is damaged: it does not belong to a weight of this shape", where=where)


def _unsigned(width: int) -> Any:
    return np.dtype(f"<u{width}")


def _ordered(raw: Tensor, width: int) -> Words:
    """Map the bits of floats to whole numbers in the order of the floats."""
    bits: Words = raw.numpy().view(_unsigned(width))
    sign = bits.dtype.type(1 << (8 * width - 1))
    made: Words = np.where(bits & sign, ~bits, bits | sign)
    return made


def steps_between(base: Tensor, guess: Tensor) -> Words:
    """Count the floats from ``guess`` up to ``base``, flat, modulo their number, with the sign in the lowest bit."""
    width = base.dtype.itemsize
    apart = _ordered(tensor_bytes(base), width) - _ordered(tensor_bytes(guess), width)
    negative = apart >> (8 * width - 1)
    return (apart << 1) ^ (0 - negative)


def _stepped(guess: Tensor, steps: Words) -> Words:
    """Invert `steps_between`."""
    width = steps.itemsize
    apart = (steps >> 1) ^ (0 - (steps & 1))
    ordered = _ordered(guess, width) + apart
    sign = ordered.dtype.type(1 << (8 * width - 1))
    made: Words = np.where(ordered & sign, ordered ^ sign, ~ordered)
    return made

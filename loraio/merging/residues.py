"""Residues: what has to be kept of a weight so that it can be had back, bit for bit, from the weight folded.

The old weight is predicted from the new one and the factors. Of the prediction only the difference to the old weight is
kept, in steps from float to float: mostly none, because two roundings to nearest undo each other unless the folded
weight lies in a coarser part of the floats. Any difference can be told, so nothing rests on the prediction but the
size. But it must be the same wherever the residue is read, and so it is made of single IEEE operations in a fixed
order, which no processor and no library of matrix products does in its own way.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
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

LENGTHS = 4
"""Each block begins with this many lengths in bytes, of four bytes each, of its parts."""

PLAIN = 128
"""Differences below this are one byte each; of larger ones the byte says how many bits the number has, which follow."""

FAR = 255
"""A byte in the gaps that says: so many more, and then goes on."""

LEVEL = 9
"""Of the deflate coder, as far as it matters with Huffman codes alone."""


def residue_of(part: Adapter, base: Tensor, folded: Tensor, strength: float) -> bytes:
    """A block from which `restored` makes the base weight.

    Args:
        part: an adapter of one target, as `loraio.adapter.parts_of` gives them.
        base: the base weight, or the slice of it that ``part`` is for.
        folded: that weight with the adapter folded in, or anything else of its shape and dtype.
        strength: that of the fold.
    """
    ((name, target),) = part.targets.items()
    layer, kind = LAYER_TYPES[target.layer], KINDS[target.kind]
    factors = part.factors_of(name)
    wide = layer.to_matrix(base.double(), target.groups)
    side = kind.side(wide, {short: factor.double() for short, factor in factors.items()}, scale=target.scale)
    return encode(base, predicted(part, folded, strength, side), side)


def restored(part: Adapter, folded: Tensor, strength: float, block: bytes, *, where: str) -> Tensor:
    """The base weight, given its residue; arguments as `residue_of`.

    Raises:
        FormatError: the block is none of a weight of this shape and dtype.
    """
    ((_, target),) = part.targets.items()
    numbers = KINDS[target.kind].side_numbers(target.matrix_shape[0])
    side, rest = _taken_apart(block, numbers, where)
    return decode(rest, predicted(part, folded, strength, side), where=where)


def predicted(part: Adapter, folded: Tensor, strength: float, side: Tensor | None) -> Tensor:
    """The base weight as it seems from the folded one; shape and dtype of ``folded``, the same bits everywhere.

    Where that is not a finite number it is the folded weight itself.
    """
    ((name, target),) = part.targets.items()
    layer, kind = LAYER_TYPES[target.layer], KINDS[target.kind]
    wide = layer.to_matrix(folded.double(), target.groups)
    factors = {short: factor.double() for short, factor in part.factors_of(name).items()}
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        old = kind.unfold(wide, factors, scale=target.scale, strength=strength, side=side)
        old = round_once(layer.from_matrix(old, folded.shape, target.groups).contiguous(), folded.dtype)
    return torch.where(old.isfinite(), old, folded)


# The coder


def encode(base: Tensor, guess: Tensor, side: Tensor | None = None) -> bytes:
    """The differences of two tensors of a float dtype and shape, and numbers that go with them.

    What differs at all is mostly rare and small. Of each number that differs two bytes are coded: how many stood before
    it that do not, and the difference itself, with its sign in the lowest bit. Both go through Huffman codes (RFC
    1951); the lower bits of large differences are as good as random, and stand as they are.
    """
    steps = steps_between(base, guess)
    at = np.flatnonzero(steps)
    values = steps[at]
    bits = _bit_lengths(values)
    large = values >= PLAIN
    symbols = np.where(large, PLAIN + bits, values).astype(np.uint8)
    parts = [
        b"" if side is None else bytes(tensor_bytes(side).numpy().data),
        _deflated(_gaps(at)),
        _deflated(symbols),
        _low_bits(values[large], bits[large]),
    ]
    lengths = np.array([len(part) for part in parts], dtype="<u4").tobytes()
    return b"".join([lengths, *parts])


def decode(parts: tuple[bytes, bytes, bytes], guess: Tensor, *, where: str) -> Tensor:
    """The tensor of which `encode` told the differences to ``guess``.

    Raises:
        FormatError: the parts do not belong together, or to a tensor of this size.
    """
    gaps, symbols, low = parts
    count = guess.numel()
    distances = _inflated(gaps, 2 * count, where)
    ends = np.flatnonzero(distances != FAR)
    found = _inflated(symbols, count, where)
    if len(ends) != len(found) or (len(distances) and distances[-1] == FAR):
        raise _damaged(where)
    runs = np.diff(ends, prepend=-1) - 1
    at = np.cumsum(runs * FAR + distances[ends].astype(np.int64) + 1) - 1
    width = guess.dtype.itemsize
    large = found > PLAIN
    bits = found[large].astype(np.int64) - PLAIN
    if (len(at) and at[-1] >= count) or not found.all() or (bits > 8 * width).any() or (found == PLAIN).any():
        raise _damaged(where)
    values = found.astype(_unsigned(width))
    values[large] = _from_low_bits(low, bits, _unsigned(width), where)
    steps = np.zeros(count, dtype=_unsigned(width))
    steps[at] = values
    raw = torch.from_numpy(_stepped(tensor_bytes(guess), steps))
    return raw.view(torch.uint8).view(guess.dtype).view(guess.shape)


def _damaged(where: str) -> FormatError:
    return FormatError("the residue is damaged: it does not belong to a weight of this shape", where=where)


def _taken_apart(block: bytes, numbers: int, where: str) -> tuple[Tensor | None, tuple[bytes, bytes, bytes]]:
    """The numbers that go with a block, and its coded parts."""
    head = 4 * LENGTHS
    lengths = np.frombuffer(block[:head], dtype="<u4").tolist() if len(block) >= head else []
    if len(lengths) != LENGTHS or head + sum(lengths) != len(block) or lengths[0] != 8 * numbers:
        raise _damaged(where)
    parts, position = [], head
    for length in lengths:
        parts.append(block[position : position + length])
        position += length
    side = torch.from_numpy(np.frombuffer(parts[0], dtype="<f8").astype(np.float64)) if numbers else None
    return side, (parts[1], parts[2], parts[3])


def block_length(head: bytes, *, where: str) -> int:
    """How long a block is, head and all, given its first bytes."""
    if len(head) < 4 * LENGTHS:
        raise _damaged(where)
    return 4 * LENGTHS + int(np.frombuffer(head[: 4 * LENGTHS], dtype="<u4").sum(dtype=np.int64))


def _unsigned(width: int) -> Any:
    return np.dtype(f"<u{width}")


def _ordered(raw: Tensor, width: int) -> Words:
    """The bits of floats as whole numbers that are ordered as the floats are."""
    bits: Words = raw.numpy().view(_unsigned(width))
    sign = bits.dtype.type(1 << (8 * width - 1))
    made: Words = np.where(bits & sign, ~bits, bits | sign)
    return made


def steps_between(base: Tensor, guess: Tensor) -> Words:
    """How many floats ``base`` is above ``guess``, flat, modulo their number, with the sign in the lowest bit."""
    width = base.dtype.itemsize
    apart = _ordered(tensor_bytes(base), width) - _ordered(tensor_bytes(guess), width)
    negative = apart >> (8 * width - 1)
    return (apart << 1) ^ (0 - negative)


def _stepped(guess: Tensor, steps: Words) -> Words:
    """The inverse of `steps_between`."""
    width = steps.itemsize
    apart = (steps >> 1) ^ (0 - (steps & 1))
    ordered = _ordered(guess, width) + apart
    sign = ordered.dtype.type(1 << (8 * width - 1))
    made: Words = np.where(ordered & sign, ordered ^ sign, ~ordered)
    return made


def _gaps(at: Words) -> Words:
    """How many stand between places, in bytes: `FAR` for as many each, and then the rest."""
    between = np.diff(at, prepend=-1) - 1
    ends = np.cumsum(between // FAR + 1)
    made: Words = np.full(ends[-1] if len(ends) else 0, FAR, dtype=np.uint8)
    made[ends - 1] = between % FAR
    return made


def _bit_lengths(values: Words) -> Words:
    """How many binary digits whole numbers have."""
    found = np.zeros(len(values), dtype=np.int64)
    rest = values.copy()
    for shift in (32, 16, 8, 4, 2, 1):
        if shift < 8 * values.itemsize:
            high = rest >> shift
            has = high > 0
            found[has] += shift
            rest = np.where(has, high, rest)
    total: Words = found + (rest > 0)
    return total


def _planes(bits: Words) -> Iterator[tuple[int, Words]]:
    """Which numbers have a digit to tell at each place: all but the highest, which is one."""
    for place in range(int(bits.max(initial=1)) - 1):
        yield place, np.flatnonzero(bits > place + 1)


def _low_bits(values: Words, bits: Words) -> bytes:
    digits = [(values[which] >> place).astype(np.uint8) & 1 for place, which in _planes(bits)]
    return np.packbits(np.concatenate([np.empty(0, np.uint8), *digits])).tobytes()


def _from_low_bits(low: bytes, bits: Words, dtype: Any, where: str) -> Words:
    if len(low) != -(-int((bits - 1).sum()) // 8):
        raise _damaged(where)
    digits, position = np.unpackbits(np.frombuffer(low, dtype=np.uint8)), 0
    values: Words = np.ones(len(bits), dtype=dtype) << (bits - 1).astype(dtype)
    for place, which in _planes(bits):
        values[which] |= digits[position : position + len(which)].astype(dtype) << dtype.type(place)
        position += len(which)
    return values


def _deflated(data: Words) -> bytes:
    coder = zlib.compressobj(LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(data.tobytes()) + coder.flush() if len(data) else b""


def _inflated(data: bytes, most: int, where: str) -> Words:
    if not data:
        return np.empty(0, dtype=np.uint8)
    coder = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        found = coder.decompress(data, most + 1)
    except zlib.error as error:
        raise _damaged(where) from error
    if not coder.eof or coder.unused_data or len(found) > most:
        raise _damaged(where)
    return np.frombuffer(found, dtype=np.uint8)

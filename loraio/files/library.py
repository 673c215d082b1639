"""Read and write tensors with the safetensors library, behind this package's own checks.

The library is given bytes, not names of files, with a header that `loraio.files.tensorfile` has checked: the bytes
that were checked are the bytes that are used. It is also given no file to write: it would replace a temporary file by
one of its own, without our lock and mode.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, BinaryIO

from loraio.errors import FormatError
from loraio.files.tensors import TORCH_DTYPES

if TYPE_CHECKING:
    from torch import Tensor

    from loraio.files.tensorfile import TensorInfo

PIECE = 1 << 18
"""Bytes that the library is given at a time, or one tensor: it copies them, which is fast within the cache."""

_ANOTHER_RELEASE = "install safetensors 0.8, with which this release of loraio was tested"


def read(file: BinaryIO, tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, Tensor]]:
    """Read tensors from where the file stands, each with memory of its own.

    Args:
        file: at the first byte of the first tensor.
        tensors: checked, in the order of their bytes, without holes.

    Raises:
        EOFError: the file ends too soon; with the name of the first tensor that is not whole.
    """
    from safetensors.torch import load

    for piece in _pieces(tensors):
        first, info = next(iter(piece.items()))
        begin = info.begin
        if info.end - begin > PIECE:  # straight to its place: the library's copies of 100 MB take as long as reading
            yield first, _read_large(file, first, info)
            continue
        header = {
            name: {"dtype": info.dtype, "shape": info.shape, "data_offsets": [info.begin - begin, info.end - begin]}
            for name, info in piece.items()
        }
        text = json.dumps(header).encode()
        size = list(piece.values())[-1].end - begin
        data = file.read(size)
        if len(data) < size:
            raise EOFError(next(name for name, info in piece.items() if info.end - begin > len(data)))
        found = load(b"".join([len(text).to_bytes(8, "little"), text, data]))
        yield from ((name, found[name]) for name in piece)


def _read_large(file: BinaryIO, name: str, info: TensorInfo) -> Tensor:
    import torch

    tensor = torch.empty(info.shape, dtype=getattr(torch, TORCH_DTYPES[info.dtype]))
    room = tensor.reshape(-1).view(torch.uint8).numpy().data
    if file.readinto(room) < len(room):  # type: ignore[attr-defined]  # the type lacks it, every file has it
        raise EOFError(name)
    return tensor


def _pieces(tensors: Mapping[str, TensorInfo]) -> Iterator[dict[str, TensorInfo]]:
    piece: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        if piece and info.end - next(iter(piece.values())).begin > PIECE:
            yield piece
            piece = {}
        piece[name] = info
    if piece:
        yield piece


def serialized(tensors: Mapping[str, Tensor], placed: Mapping[str, TensorInfo]) -> Iterator[memoryview]:
    """Yield the data part of a safetensors file, as the library writes it.

    Args:
        tensors: any device; brought to the CPU and made contiguous.
        placed: their places, in the order of their bytes.

    Raises:
        FormatError: the library lays tensors out in another order.
    """
    from safetensors.torch import save

    for piece in _pieces(placed):
        data = memoryview(save(_apart({name: tensors[name] for name in piece})))
        begin = 8 + int.from_bytes(data[:8], "little")
        if list(json.loads(bytes(data[8:begin]))) != list(piece):
            raise FormatError("this release of safetensors lays tensors out in another order", hint=_ANOTHER_RELEASE)
        yield data[begin:]


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return plain tensors with memory of their own: the library refuses memory that tensors share."""
    storages: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != plain.nbytes:
            plain = plain.clone()
        storages.add(plain.untyped_storage().data_ptr())
        found[name] = plain
    return found

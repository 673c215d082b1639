"""Translate dtypes between torch and safetensors, and return bytes and digests of tensors.

Importing it imports no torch.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from loraio.errors import FormatError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits in one element, by the dtype code of safetensors headers."""


TORCH_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn", "F16": "float16",
    "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64",
}  # fmt: skip
"""The torch dtype of each code that a tensor of a network can have, as the attribute name in ``torch``."""


_CODES = {name: code for code, name in TORCH_DTYPES.items()}


def dtype_code(dtype: torch.dtype) -> str:
    """Return the safetensors code of a torch dtype: ``F32`` for ``torch.float32``.

    Raises:
        FormatError: safetensors has no code for it.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in _CODES:
        raise FormatError(f"tensors of dtype {name} cannot be stored in a safetensors file")
    return _CODES[name]


def tensor_bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor in C order, as a flat uint8 tensor on the CPU, as files and digests have them."""
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Return True if two tensors have the same dtype, shape and bytes: NaN is itself, and 0.0 is not -0.0."""
    return a.dtype == b.dtype and a.shape == b.shape and tensor_bytes(a).equal(tensor_bytes(b))


def tensor_sha256(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes, little-endian, in C order, as 64 hexadecimal digits.

    >>> import torch
    >>> tensor_sha256(torch.zeros(2))[:16]
    'af5570f5a1810b7a'
    """
    import torch

    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"
    if plain and tensor.dtype in (torch.float32, torch.int64) and tensor.is_contiguous():  # in a third of the time
        return hashlib.sha256(tensor.detach().numpy().reshape(-1).data).hexdigest()
    return hashlib.sha256(tensor_bytes(tensor).numpy().data).hexdigest()

"""Round float64 sums once, to nearest, ties to even."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def round_once(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 values to another float dtype once, to nearest, ties to even.

    torch converts float64 to float16 and bfloat16 by way of float32, which rounds twice and is wrong by an ulp when
    the first rounding lands on a tie of the second. A step off the tie, to the side of the exact value, cures that.

    Args:
        exact: float64, any shape.
        dtype: float64, float32, float16 or bfloat16.

    Returns:
        the shape and device of ``exact``, in ``dtype``.

    >>> x = torch.tensor([1 + 2**-11 + 2**-40], dtype=torch.float64)  # a hair above a tie of float16
    >>> x.half().item() == 1.0, round_once(x, torch.float16).item() == 1 + 2**-10
    (True, True)

    Boldo and Melquiond 2008, Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd,
    IEEE Transactions on Computers 57(4).
    """
    return ready_to_round(exact, dtype).to(dtype)


def ready_to_round(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Adjust float64 values so that torch's own conversion rounds once; for 16-bit dtypes to a float32 tensor.

    Args:
        exact, dtype: as `round_once` takes them.
    """
    if dtype in (torch.float64, torch.float32):
        return exact
    near = exact.to(torch.float32, memory_format=torch.contiguous_format)
    if not is_plain_memory(exact):
        return _to_odd(exact, near)
    # A second rounding errs only where the first gave a tie of the narrow dtype. A tie has one bit more than the dtype,
    # so that its float32 pattern ends in zeros: one number in 4,096 does for float16, in 32,768 for bfloat16.
    ends = near.view(torch.int32).bitwise_and(2 ** (12 if dtype == torch.float16 else 15) - 1)
    ties = np.flatnonzero(ends.numpy() == 0)
    if len(ties):
        values = near.view(-1).numpy()
        with np.errstate(invalid="ignore"):  # infinities, which stay
            error = exact.reshape(-1).numpy()[ties] - values[ties]
        for side, off in ((np.inf, ties[error > 0]), (-np.inf, ties[error < 0])):
            values[off] = np.nextafter(values[off], np.float32(side))
    return near


def _to_odd(exact: Tensor, near: Tensor) -> Tensor:
    """Float64 values rounded to float32 by rounding to odd, given their nearest float32 values."""
    error = exact - near.double()
    bits = near.view(torch.int32)
    even = (bits & 1) == 0
    # The other float32 neighbour is odd where this one is even. A step of one in the bit pattern moves away from
    # zero, so it is the right step where the error points away from zero too. Infinities and NaN stay.
    away = torch.where((error > 0) == (near > 0), 1, -1).to(torch.int32)
    from_zero = near == 0  # too small for float32: the neighbour is the smallest number of the error's sign
    stepped = torch.where(from_zero, torch.where(error < 0, -(2**31) + 1, 1).to(torch.int32), bits + away)
    odd = torch.where(even & (error != 0) & torch.isfinite(near), stepped, bits)
    return odd.view(torch.float32)


def is_plain_memory(*tensors: Tensor) -> bool:
    """Return True if tensors are memory of the CPU, and not stand-ins in a trace or a transform of a program."""
    return (
        all(tensor.device.type == "cpu" and type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in tensors)
        and not torch.compiler.is_compiling()
        and not torch._C._get_tracing_state()
        and torch._C._len_torch_dispatch_stack() == 0
        and not any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors))
    )


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the spacing of a float dtype at given values: one unit in the last place.

    Args:
        values: float64, any shape.
        dtype: the float dtype whose spacing is asked for.

    Returns:
        float64, the shape of ``values``; below the normal range, zero included, the spacing of the subnormal numbers;
        NaN for NaN and infinities.

    >>> ulp(torch.tensor([1.0, 3.0], dtype=torch.float64), torch.float32).tolist() == [2**-23, 2**-22]
    True
    """
    info = torch.finfo(dtype)
    mantissa, _ = torch.frexp(values)  # 0.5 <= |mantissa| < 1, but 0 for 0
    power = torch.where(values == 0, 0.0, values / (2 * mantissa))  # of two, exactly
    return (power * info.eps).clamp(min=info.tiny * info.eps)

"""Sketches of weights: a few numbers that tell how far another weight is, without the weight itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

PROJECTIONS = 8
"""Random projections in a `sketch`."""


def sketch(weight: Tensor) -> tuple[float, ...]:
    """Return the length of a weight and `PROJECTIONS` random projections of it, in six significant digits.

    The distance of two weights of the same shape follows from their sketches. The projections are sums with signs that
    are the bits of NumPy's PCG64, seeded with the projection's number, lowest bit first: a stream that is the same in
    all versions and on all machines.

    Args:
        weight: any shape, float dtype and device.

    Returns:
        Euclidean length, then the sums; empty for a weight that holds NaN or infinity.

    >>> import torch
    >>> len(sketch(torch.ones(4, 3))), sketch(torch.ones(4, 3))[0]
    (9, 3.4641)

    Johnson and Lindenstrauss 1984, with signs: Achlioptas 2003, Database-friendly random projections.
    """
    values = weight.detach().cpu().double().flatten().numpy()
    if not np.isfinite(values).all():
        return ()
    sums = [float(np.linalg.norm(values)), *(float(values @ _signs(k, len(values))) for k in range(PROJECTIONS))]
    return tuple(float(f"{value:.6g}") for value in sums)


def distance(a: Sequence[float], b: Sequence[float]) -> float:
    """Estimate from two sketches, to about a third, the distance of two weights relative to the length of the first."""
    apart = math.sqrt(sum((x - y) ** 2 for x, y in zip(a[1:], b[1:], strict=True)) / PROJECTIONS)
    return apart / a[0] if a[0] else math.inf if apart else 0.0


def _signs(number: int, count: int) -> NDArray[np.float64]:
    words = np.random.PCG64(number).random_raw(-(-count // 64)).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")[:count]
    return np.asarray(bits * 2.0 - 1.0, dtype=np.float64)

"""Pure functions on factor matrices and on the rounding of their products. Tensors in, new tensors out."""

from __future__ import annotations

import torch
from torch import Tensor

from loraio.errors import ConfigError, ShapeError


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the two factors of the best approximation of a matrix at a given rank.

    The singular values are shared out evenly, sqrt(S) to each side, so that neither factor dwarfs the other.

    Args:
        matrix: (out, in), float32 or float64.
        rank: 1 to min(out, in).

    Returns:
        B (out, rank) and A (rank, in) with ``B @ A`` nearest to ``matrix`` in the Frobenius norm, dtype and device
        of ``matrix``.

    Raises:
        ShapeError: not a matrix.
        ConfigError: the rank is out of range.

    >>> B, A = truncated_svd(torch.ones(10, 10), 2)
    >>> tuple(B.shape), tuple(A.shape), torch.allclose(B @ A, torch.ones(10, 10), atol=1e-5)
    ((10, 2), (2, 10), True)

    Eckart and Young 1936, The approximation of one matrix by another of lower rank.
    """
    if matrix.ndim != 2:
        raise ShapeError(f"a matrix has two dimensions, not the shape {tuple(matrix.shape)}")
    if not 1 <= rank <= min(matrix.shape):
        raise ConfigError(f"rank {rank} is outside 1 to {min(matrix.shape)} for a {tuple(matrix.shape)} matrix")
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    root = S[:rank].sqrt()
    return U[:, :rank] * root, root[:, None] * Vh[:rank]


def effective_rank(matrix: Tensor, *, tolerance: float | None = None) -> int:
    """Count the singular values of a matrix that stand out from rounding error.

    Args:
        matrix: (out, in), any float dtype.
        tolerance: relative to the largest singular value; by default max(out, in) * eps of the dtype.

    Raises:
        ShapeError: not a matrix.

    >>> effective_rank(torch.ones(10, 2) @ torch.ones(2, 10))
    1
    """
    if matrix.ndim != 2:
        raise ShapeError(f"a matrix has two dimensions, not the shape {tuple(matrix.shape)}")
    if tolerance is None:
        tolerance = max(matrix.shape) * torch.finfo(matrix.dtype).eps
    return int(torch.linalg.matrix_rank(matrix.double(), rtol=tolerance))  # torch has no SVD of half precision

"""Solve A X = B for symmetric positive definite A with matrix products only: what every runtime runs fast.

An LU or Cholesky kernel exists neither in ONNX nor in TensorRT, and a batched LU of 1600 x 1600 costs 19 ms on a large
GPU. Block Gaussian elimination leaves only the inverses of the diagonal blocks, and those come from scaled
Newton-Schulz iterations (Schulz 1933; Pan and Schreiber 1991 for the scaling).
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch


def solve_spd(
    matrix: torch.Tensor, right: torch.Tensor, smallest: float, largest_diagonal: float, block: int = 350
) -> torch.Tensor:
    """X [B, N, R] with matrix X = right, matrix [B, N, N] symmetric positive definite, right [B or 1, N, R]; float32.

    smallest: a lower bound of the eigenvalues; every Schur complement has it too.
    largest_diagonal: an upper bound of the diagonal, which bounds the eigenvalues of a block of side b by b times that.
    One step of iterative refinement (with the same factors) follows the elimination.
    block: the largest side of a block; on an H200 a product of 320 takes 10.5 us, one of 400 already 15.6.
    """
    size = matrix.shape[1]
    count = math.ceil(size / block)
    edges = [round(size * i / count) for i in range(count + 1)]
    factors = _eliminate(matrix, edges, smallest, largest_diagonal)
    x = _substitute(factors, edges, right)
    return x + _substitute(factors, edges, right - matrix @ x)


def inverse_spd(matrix: torch.Tensor, smallest: float, largest: float) -> torch.Tensor:
    """Inverse of symmetric positive definite [B, N, N] whose eigenvalues lie in [smallest, largest], up to 1e-4.

    X <- X (2 I - A X), scaled so that the spectrum of A X stays centred on 1: the condition number falls by four in an
    iteration at first, then the error squares. The number of iterations follows from the bounds alone.

    A X is carried along, A X <- A X (2 I - A X): one product of both at once, where two would have to wait for each
    other (an H200 takes 15 us for it, 2 x 11 for those). What rounding adds up that way, the last two iterations, which
    compute A X itself, remove.
    """
    size = matrix.shape[1]
    twice = 2.0 * torch.eye(size, dtype=matrix.dtype)
    # X_0 = c I needs no product, and neither does X_1 = c' (2 c I - c^2 A).
    scale = 2.0 / (smallest + largest)
    low, high = scale * smallest, scale * largest
    low, high = low * (2.0 - low), 1.0
    factor = 2.0 / (low + high)
    x = (scale * factor) * twice - (scale * scale * factor) * matrix
    low, high = factor * low, factor * high
    both = torch.cat((x, matrix @ x), 1)
    while True:
        both = both @ (twice - both[:, size:])
        low, high = low * (2.0 - low), 1.0
        if low > 0.9:
            break
        factor = 2.0 / (low + high)
        both = factor * both
        low, high = factor * low, factor * high
    x = both[:, :size]
    for _ in range(2):
        x = x @ (twice - matrix @ x)
    return x


Factors = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def _eliminate(matrix: torch.Tensor, edges: list[int], smallest: float, largest_diagonal: float) -> Factors:
    """For each diagonal block: its inverse P, what is right of it (U), and P U. What is below it is the same as U."""
    factors: Factors = []
    rest = matrix
    for start, end in pairwise(edges):
        width = end - start
        top = rest[:, :width]
        block = top[:, :, :width]
        inverse = inverse_spd(block, smallest, width * largest_diagonal)
        if end == edges[-1]:
            factors.append((inverse, inverse, inverse))
            break
        upper = top[:, :, width:]
        solved = inverse @ upper
        # The inverse errs by about rounding over its own smallest eigenvalue. Where the blocks share a large one (an
        # image without structure), that would cost the Schur complement its positive eigenvalues: correct it once.
        solved = solved + inverse @ (upper - block @ solved)
        factors.append((inverse, upper, solved))
        # Columns first: of top and bottom ONNX Runtime would make one Split, which takes longer than two slices.
        rest = rest[:, :, width:][:, width:] - upper.transpose(1, 2) @ solved
    return factors


def _substitute(factors: Factors, edges: list[int], right: torch.Tensor) -> torch.Tensor:
    """Forward and back substitution of right [B, N, R]."""
    parts: list[torch.Tensor] = []
    rest = right
    for (_, _, solved), start, end in zip(factors, edges, edges[1:], strict=False):
        width = end - start
        parts.append(rest[:, :width])
        if end != edges[-1]:
            rest = rest[:, width:] - solved.transpose(1, 2) @ parts[-1]
    inverse = factors[-1][0]
    x = inverse @ parts[-1]
    for (inverse, upper, _), part in zip(reversed(factors[:-1]), reversed(parts[:-1]), strict=True):
        x = torch.cat((inverse @ (part - upper @ x), x), 1)
    return x

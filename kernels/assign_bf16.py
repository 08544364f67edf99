"""Nearest centroid with the matrix products in bfloat16, at about twice the rate of float32 where the processor has it.

Shapes: N rows, K centroids, B rows of a block, D dimensions.

The lists are those of float32: as in kernels/assign.py a fast product proposes, and float64 decides what its rounding
cannot. Here every score gets a proven lower and an upper bound, and the centroids whose upper bound reaches the largest
lower bound of a row are its candidates. Two things keep them few (about 1.5 a row for
benchmarks/vectors.py's clustered vectors of 384 dimensions and 4,096 centroids):

- Centroids count from their mean, and so do rows for "l2": values, and with them the roundings, get smaller, while the
  scores of a row change by a constant. (For "ip" a row stays: its length does not matter to its list.)
- The bound of what rounding the factors does is by Cauchy-Schwarz from the roundings' own norms, which are known.

Blocks that would have more candidates than are worth it (coinciding centroids, rows far from every centroid) are left
to the float32 mode, and so is everything on a processor without bfloat16 or where numba is absent.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch

from kernels.assign import (
    BLOCK_ROWS,
    COLUMN_TILE,
    UNIT_ROUNDOFF_32,
    UNIT_ROUNDOFF_64,
    Float32Array,
    Float64Array,
    FloatArray,
    assign_nearest,
    compiled_assign,
    prepare_centroids,
    row_norms,
    score_error,
)
from kernels.assign_two_level import PRODUCT_ROUNDING, has_bfloat16
from kernels.blocks import check_finite, check_matrix, check_same_dims
from kernels.threads import run_blocks

Int32Array = npt.NDArray[np.int32]

# Centroids widened to float64 at a time.
WIDEN_ROWS = 4096
# Candidates a row of a block beyond which float32 decides it faster.
MAX_CANDIDATES = 32


class _Centroids:
    """Centroids about their mean, twice that for "l2", in bfloat16, and what bounds their scores."""

    def __init__(self, centroids_KD: FloatArray, metric: str) -> None:
        self.metric = metric
        self.exact_KD: Float32Array = np.ascontiguousarray(centroids_KD, np.float32)
        self.mean_D: Float32Array = self.exact_KD.mean(axis=0, dtype=np.float64).astype(np.float32)
        scale = 2.0 if metric == "l2" else 1.0
        self.typed_KD = torch.empty(self.exact_KD.shape, dtype=torch.bfloat16)
        squares_K = np.empty(len(self.exact_KD))
        self.max_typed = self.max_rounding = 0.0
        for start in range(0, len(squares_K), WIDEN_ROWS):
            stop = start + WIDEN_ROWS
            centred_KD = self.exact_KD[start:stop].astype(np.float64) - self.mean_D
            typed_KD = self.typed_KD[start:stop].copy_(torch.from_numpy(scale * centred_KD))
            wide_KD = typed_KD.double().numpy()
            squares_K[start:stop] = np.einsum("kd,kd->k", centred_KD, centred_KD)
            self.max_typed = max(self.max_typed, float(np.linalg.norm(wide_KD, axis=1).max()))
            roundings_K = np.linalg.norm(wide_KD - scale * centred_KD, axis=1)
            self.max_rounding = max(self.max_rounding, float(roundings_K.max()))
        with np.errstate(over="ignore"):
            self.bias_K = (-squares_K if metric == "l2" else np.zeros(len(squares_K))).astype(np.float32)
        self.max_centred = float(np.sqrt(squares_K.max()))
        self.max_norm = float(row_norms(self.exact_KD).max())

    def bounds(self, block: torch.Tensor) -> tuple[torch.Tensor, Float32Array]:
        """(the rows in bfloat16 [B, D], bound of their scores' error but for the product's own rounding float32 [B])."""
        if self.metric == "l2":
            block = block - torch.from_numpy(self.mean_D)
        typed = block.to(torch.bfloat16)
        num_dims = block.shape[1]
        norms_B, rounding_B = row_norms(block.numpy()), row_norms((block - typed).numpy())
        error_B = 1.01 * (rounding_B * self.max_typed + norms_B * self.max_rounding)
        # Sums and bias in float32, as if each were twice as long (rows are centred in float32); and bfloat16 numbers
        # below the smallest normal one, which the processor takes for zero.
        error_B += 4.0 * score_error(1.01 * norms_B, 1.01 * self.max_centred, num_dims, self.metric, UNIT_ROUNDOFF_32)
        error_B += num_dims * 2.0**-125 * (norms_B + self.max_typed)
        # Float32 refuses a row with scores beyond it, which may be no such thing about the mean: it decides these rows.
        error_B[(2.0 * norms_B + self.max_norm) * self.max_norm > 2.0**126] = np.inf
        return typed, (1.0001 * error_B).astype(np.float32)


def assign_nearest_bf16(x_ND: FloatArray, centroids_KD: FloatArray, *, metric: str) -> Int32Array:
    """Nearest centroid of every row: int32 [N], the same as those of kernels.assign.assign_nearest in float32.

    x_ND (may be memory-mapped), centroids_KD: float32 or float16 on the host. Raises ValueError as that.
    """
    check_matrix("x_ND", x_ND)
    prepare_centroids(centroids_KD, metric)  # for what it refuses
    check_same_dims("x_ND", x_ND, "centroids_KD", centroids_KD.shape[1])
    exact = compiled_assign()
    if exact is None or not has_bfloat16():
        return assign_nearest(x_ND, centroids_KD, metric=metric, precision="float32")
    from kernels import assign_bf16_compiled as near_best

    centroids = _Centroids(centroids_KD, metric)
    list_no_N = np.empty(len(x_ND), np.int32)

    def assign_block(start: int) -> int:
        """-1, or the block's start if it is left to float32."""
        block_BD = np.array(x_ND[start : start + BLOCK_ROWS], dtype=np.float32, order="C")
        with np.errstate(over="ignore", invalid="ignore"):  # bounds that are not finite are looked for
            candidates = _candidates(torch.from_numpy(block_BD), centroids, near_best)
        if candidates is None:
            return start
        pairs = (block_BD, centroids.exact_KD, metric == "l2")
        nearest_B = list_no_N[start : start + len(block_BD)]
        alone = exact.decide_candidates(*candidates, *pairs, _float64_errors(block_BD, centroids), nearest_B)
        assert alone < 0, f"row {alone} of a block has no candidate"
        return -1

    starts = range(0, len(x_ND), BLOCK_ROWS)
    left = [start for start in run_blocks(assign_block, starts) if start >= 0]
    if len(left) == len(starts):
        return assign_nearest(x_ND, centroids_KD, metric=metric, precision="float32")
    for start in left:
        rows = slice(start, start + BLOCK_ROWS)
        check_finite("row", x_ND[rows], start)
        try:
            list_no_N[rows] = assign_nearest(x_ND[rows], centroids_KD, metric=metric, precision="float32")
        except ValueError:
            # Names the row by its number in x_ND.
            assign_nearest(x_ND[: rows.stop], centroids_KD, metric=metric, precision="float32")
            raise
    return list_no_N


def _candidates(
    block: torch.Tensor, centroids: _Centroids, near_best: ModuleType
) -> tuple[Int32Array, Float32Array, Float32Array, Float32Array] | None:
    """(row, centroid) of the pairs that may be a row's best, int32 [2, C], and what tells which of them may not.

    That is float32 [C], the scores' upper bounds, and [B] each, the rows' lower bounds and how far below these an upper
    bound may be. None where float32 is to decide.
    """
    typed, error_B = centroids.bounds(block)
    num_rows, num_centroids = len(block), len(centroids.typed_KD)
    scratch = torch.empty(min(num_centroids, COLUMN_TILE) * num_rows, dtype=torch.bfloat16)
    candidates = np.empty((2, MAX_CANDIDATES * num_rows + 64), np.int32)
    uppers = np.empty(candidates.shape[1], np.float32)
    upper_GB = np.empty((-(-COLUMN_TILE // near_best.GROUP_COLUMNS), num_rows), np.float32)
    bound_B = np.full(num_rows, -np.inf, np.float32)
    margin_B = 2.0 * error_B
    found = 0
    for first in range(0, num_centroids, COLUMN_TILE):
        tile_KD = centroids.typed_KD[first : first + COLUMN_TILE]
        products_KB = scratch[: len(tile_KD) * num_rows].view(len(tile_KD), num_rows)
        torch.mm(tile_KD, typed.t(), out=products_KB)
        bits_KB = products_KB.view(torch.int16).numpy().view(np.uint16)
        bias_K = centroids.bias_K[first : first + COLUMN_TILE]
        near_best.raise_best_bounds(bits_KB, bias_K, PRODUCT_ROUNDING, bound_B, upper_GB)
        least_B = bound_B - margin_B
        arguments = (bits_KB, bias_K, PRODUCT_ROUNDING, upper_GB, first, least_B, candidates, uppers)
        more = near_best.find_near_best(*arguments, found)
        if more < 0:  # full: some were near the best of the tiles so far only
            found = near_best.keep_near_best(candidates, uppers, least_B, found)
            more = near_best.find_near_best(*arguments, found)
        if more < 0:
            return None
        found = more
    if not np.isfinite(bound_B).all() or not np.isfinite(margin_B).all():
        return None
    return candidates[:, :found], uppers[:found], bound_B, margin_B


def _float64_errors(block_BD: Float32Array, centroids: _Centroids) -> Float64Array:
    norms_B = row_norms(block_BD)
    return score_error(norms_B, centroids.max_norm, block_BD.shape[1], centroids.metric, UNIT_ROUNDOFF_64)

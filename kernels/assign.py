"""Nearest centroid of every row (filling the lists) and nearest centroids of a query (probing them).

Shapes: N rows, Q queries, K centroids, B rows of a block, D dimensions.

A row's list is the best one in float64 arithmetic, ties to the lowest id. The float32 matrix product only proposes it:
where the runner-up is closer than float32 rounding can tell, float64 decides. So a row's list depends neither on the
other rows of the call, nor on their number, the block size, the number of threads or the kind of processor. (A matrix
product alone does not promise that: MKL 2024.2 with AVX2 gives the rows at a block's edge other last bits.)
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kernels.blocks import check_finite, check_matrix, check_metric, check_same_dims, check_scores, on_device
from kernels.threads import run_blocks
from kernels.topk import topk

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
FloatArray = npt.NDArray[Any]

# Rows and columns of a tile of scores: 1024 x 512 float32 stay in the inner caches for the comparison that follows.
BLOCK_ROWS = 1024
COLUMN_TILE = 512
PRECISIONS = ("auto", "float32", "bf16", "tf32")
# Below so many centroids times dimensions "auto" stays with float32: preparing bfloat16 costs more than it saves.
MIN_BF16_SIZE = 1 << 16
# Float64 scores held at a time: 64 MiB.
NUM_FLOAT64_SCORES = 1 << 23
UNIT_ROUNDOFF_32 = 2.0**-24
UNIT_ROUNDOFF_64 = 2.0**-53


def assign_nearest(
    x_ND: FloatArray, centroids_KD: FloatArray, *, metric: str, precision: str = "auto", block_rows: int = BLOCK_ROWS
) -> npt.NDArray[np.int32]:
    """Nearest centroid of every row: int32 [N]; largest inner product ("ip") or smallest squared distance ("l2").

    x_ND, centroids_KD: float32 or float16 on the host (x_ND may be memory-mapped), widened block by block; or CuPy
    arrays, and then the result is one. Never holds N x K scores.
    Ties, which include scores that are equal up to float64 rounding, go to the lowest id. The same for a row in whatever
    call it comes (see the module).
    precision on the host: "float32", or "bf16" products at about twice the rate where the processor has them; the lists
    are the same, for float64 decides what either cannot. "auto" takes the faster. ("tf32" is "bf16" on the host.) On a
    device "auto" is "float32", and the others are approximate (kernels/cuda/assign.py).
    Raises ValueError that names the first row with a NaN, an infinity or a score beyond float32.
    """
    if on_device(x_ND):
        from kernels.cuda.assign import assign_nearest as assign_on_device

        on_device_as = "float32" if precision == "auto" else precision
        return assign_on_device(x_ND, centroids_KD, metric=metric, precision=on_device_as)
    check_matrix("x_ND", x_ND)
    if block_rows < 1:
        raise ValueError(f"block_rows must be at least 1, got {block_rows}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision in ("bf16", "tf32") or (precision == "auto" and centroids_KD.size >= MIN_BF16_SIZE):
        from kernels.assign_bf16 import assign_nearest_bf16

        return assign_nearest_bf16(x_ND, centroids_KD, metric=metric)
    scaled_KD, bias_K = prepare_centroids(centroids_KD, metric)
    check_same_dims("x_ND", x_ND, "centroids_KD", centroids_KD.shape[1])
    max_norm = float(row_norms(centroids_KD.astype(np.float32)).max())
    list_no_N = np.empty(len(x_ND), np.int32)

    def assign_block(start: int) -> npt.NDArray[np.int64]:
        """Rows that float32 cannot decide."""
        block_BD = torch.from_numpy(x_ND[start : start + block_rows].astype(np.float32))
        best_B, second_B, column_B = _best_two(block_BD, scaled_KD, bias_K)
        check_scores(best_B, x_ND, start)
        list_no_N[start : start + len(block_BD)] = column_B
        error_B = score_error(row_norms(block_BD.numpy()), max_norm, block_BD.shape[1], metric, UNIT_ROUNDOFF_32)
        return start + np.flatnonzero(~(best_B.astype(np.float64) - second_B > 2.0 * error_B))

    undecided = run_blocks(assign_block, range(0, len(x_ND), block_rows))
    rows = np.concatenate(undecided) if undecided else np.empty(0, np.int64)
    if len(rows):
        list_no_N[rows] = _nearest_in_float64(x_ND, rows, centroids_KD, metric)
    return list_no_N


def assign_topk(
    q_QD: FloatArray, centroids_KD: FloatArray, k: int, *, metric: str
) -> tuple[Float32Array, npt.NDArray[np.int32]]:
    """The k nearest centroids of every query, best first: scores float32 [Q, k] and ids int32 [Q, k].

    Scores are inner products ("ip") or negative squared distances ("l2"), computed in float64 and rounded: larger is
    better. Ties go to the lowest id. A query's result does not depend on the other queries. k must be in 1..K.
    Raises ValueError as assign_nearest.
    """
    check_matrix("q_QD", q_QD)
    check_metric(metric)
    _check_centroids(centroids_KD)
    num_centroids, num_dims = centroids_KD.shape
    check_same_dims("q_QD", q_QD, "centroids_KD", num_dims)
    if not 1 <= k <= num_centroids:
        raise ValueError(f"k must be in 1..K ({num_centroids}), got {k}")
    scores_QK = np.empty((len(q_QD), k), np.float32)
    list_no_QK = np.empty((len(q_QD), k), np.int32)
    centroids64_KD, norms_K = _widened(centroids_KD)
    block_rows = max(1, NUM_FLOAT64_SCORES // num_centroids)
    for start in range(0, len(q_QD), block_rows):
        stop = min(start + block_rows, len(q_QD))
        block_BD, block_norms_B = _widened(q_QD[start:stop])
        all_BK = _scores_in_float64(block_BD, centroids64_KD, norms_K, metric)
        with np.errstate(over="ignore", invalid="ignore"):
            if metric == "l2":
                # Rounding can leave a coinciding pair at a tiny positive value; a distance has none.
                all_BK = np.minimum(all_BK - block_norms_B[:, None], 0.0)
            rounded_BK = all_BK.astype(np.float32)
        check_scores(rounded_BK, q_QD, start)
        scores_QK[start:stop], list_no_QK[start:stop] = topk(rounded_BK, k)
    return scores_QK, list_no_QK


def prepare_centroids(centroids_KD: FloatArray, metric: str) -> tuple[torch.Tensor, Float32Array]:
    """(scaled float32 [K, D], bias float32 [K]) such that the score of a row is scaled · row + bias, larger is better.

    "ip": the centroids and zeros. "l2": 2c and -||c||^2, so that the score is ||x||^2 minus the squared distance.
    """
    check_metric(metric)
    _check_centroids(centroids_KD)
    scaled = torch.empty(centroids_KD.shape, dtype=torch.float32)
    scaled.numpy()[:] = centroids_KD
    if metric == "ip":
        return scaled, np.zeros(len(centroids_KD), np.float32)
    scaled *= 2.0
    with np.errstate(over="ignore"):
        bias_K = -np.einsum("kd,kd->k", centroids_KD, centroids_KD, dtype=np.float64).astype(np.float32)
    finite_K = np.isfinite(bias_K) & np.isfinite(scaled.numpy()).all(axis=1)
    if not finite_K.all():
        raise ValueError(f"squared norms must be within float32: that of centroid {int(np.argmin(finite_K))} is not")
    return scaled, bias_K


def row_norms(block_BD: Float32Array) -> Float64Array:
    """Norms of the rows, float64 [B]; squares of small values would vanish in float32."""
    compiled = compiled_assign()
    if compiled is not None:
        norms_B: Float64Array = np.empty(len(block_BD))
        compiled.row_norms(block_BD, norms_B)
        return norms_B
    wide_BD = block_BD.astype(np.float64)
    return np.sqrt(np.einsum("bd,bd->b", wide_BD, wide_BD))


def _best_two(
    block_BD: torch.Tensor, scaled_KD: torch.Tensor, bias_K: Float32Array
) -> tuple[Float32Array, Float32Array, npt.NDArray[np.int32]]:
    """Best score, second best score (float32) and column of the best (int32) of every row; -inf or infinite if bad."""
    compiled = compiled_assign()
    best_B = np.full(len(block_BD), -np.inf, np.float32)
    second_B = best_B.copy()
    column_B = np.zeros(len(block_BD), np.int32)
    # One buffer for all tiles: fresh memory for every tile would cost more in page faults than the comparison.
    scratch = torch.empty(min(len(scaled_KD), COLUMN_TILE) * len(block_BD), dtype=torch.float32)
    for first in range(0, len(scaled_KD), COLUMN_TILE):
        tile_KD = scaled_KD[first : first + COLUMN_TILE]
        # Rows of the block go along the rows of memory: neighbours in a register belong to different rows.
        scores_KB = scratch[: len(tile_KD) * len(block_BD)].view(len(tile_KD), len(block_BD))
        torch.mm(tile_KD, block_BD.t(), out=scores_KB)
        bias = bias_K[first : first + COLUMN_TILE]
        if compiled is not None:
            compiled.update_best_two(scores_KB.numpy(), bias, first, best_B, second_B, column_B)
        else:
            _update_best_two(scores_KB.numpy(), bias, first, best_B, second_B, column_B)
    return best_B, second_B, column_B


def _update_best_two(
    scores_KB: Float32Array,
    bias_K: Float32Array,
    first: int,
    best_B: Float32Array,
    second_B: Float32Array,
    column_B: npt.NDArray[np.int32],
) -> None:
    """As kernels.assign_compiled.update_best_two, where numba is absent; overwrites the scores."""
    scores_KB += bias_K[:, None]
    np.copyto(scores_KB, -np.inf, where=np.isnan(scores_KB))
    rows = np.arange(scores_KB.shape[1])
    column = scores_KB.argmax(axis=0)
    score_B = scores_KB[column, rows]
    scores_KB[column, rows] = -np.inf
    np.maximum(second_B, np.maximum(scores_KB.max(axis=0), np.minimum(best_B, score_B)), out=second_B)
    better_B = score_B > best_B
    best_B[better_B] = score_B[better_B]
    column_B[better_B] = column[better_B] + first


def compiled_assign() -> ModuleType | None:
    """kernels.assign_compiled, or None where numba is not installed."""
    try:
        from kernels import assign_compiled
    except ImportError:
        return None
    return assign_compiled


def score_error(
    norms_B: Float64Array, max_norm: float, num_dims: int, metric: str, unit_roundoff: float
) -> Float64Array:
    """Bound of the rounding error of each row's scores, whatever the order of summation.

    n terms give at most n * u times the sum of their magnitudes (Higham, Accuracy and Stability of Numerical
    Algorithms, section 3.1), which Cauchy-Schwarz bounds by the norms; 4 more for the norm term and the roundings of
    the bound itself. In float32 also the smallest normal number for each term that underflows; in float64 no product of
    two float32 values does.
    """
    magnitude_B = norms_B * max_norm if metric == "ip" else (2.0 * norms_B + max_norm) * max_norm
    underflow = 0.0 if unit_roundoff == UNIT_ROUNDOFF_64 else 2.0**-126
    return (num_dims + 4) * (1.01 * unit_roundoff * magnitude_B + underflow)


def _nearest_in_float64(
    x_ND: FloatArray, rows: npt.NDArray[np.int64], centroids_KD: FloatArray, metric: str
) -> npt.NDArray[np.int64]:
    """Nearest centroid, int64, of the given rows; the lowest id of those that float64 cannot tell apart."""
    centroids64_KD, norms_K = _widened(centroids_KD)
    max_norm = float(np.sqrt(norms_K.max()))
    nearest = np.empty(len(rows), np.int64)
    block_rows = max(1, NUM_FLOAT64_SCORES // max(centroids_KD.shape))
    for start in range(0, len(rows), block_rows):
        block_BD, block_norms_B = _widened(x_ND[rows[start : start + block_rows]])
        scores_BK = _scores_in_float64(block_BD, centroids64_KD, norms_K, metric)
        error_B = score_error(np.sqrt(block_norms_B), max_norm, block_BD.shape[1], metric, UNIT_ROUNDOFF_64)
        least_B = scores_BK.max(axis=1) - 2.0 * error_B
        nearest[start : start + block_rows] = (scores_BK >= least_B[:, None]).argmax(axis=1)
    return nearest


def _scores_in_float64(
    block_BD: Float64Array, centroids_KD: Float64Array, norms_K: Float64Array, metric: str
) -> Float64Array:
    products_BK: Float64Array = torch.mm(torch.from_numpy(block_BD), torch.from_numpy(centroids_KD).t()).numpy()
    return products_BK if metric == "ip" else 2.0 * products_BK - norms_K


def _widened(x_ND: FloatArray) -> tuple[Float64Array, Float64Array]:
    """The rows in float64 and their squared norms."""
    wide_ND = x_ND.astype(np.float64)
    return wide_ND, np.einsum("nd,nd->n", wide_ND, wide_ND)


def _check_centroids(centroids_KD: FloatArray) -> None:
    check_matrix("centroids_KD", centroids_KD)
    if len(centroids_KD) == 0:
        raise ValueError("centroids_KD must have at least one row, got 0")
    check_finite("centroid", centroids_KD)

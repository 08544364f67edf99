"""Nearest centroid of every row (filling the lists) and nearest centroids of a query (probing them).

Shapes: N rows, Q queries, K centroids, B rows of a block, D dimensions, E = D for ip and D + 1 for l2.

A row's list is the best one in float64 arithmetic, ties to the lowest id. The float32 matrix product only proposes it:
where the runner-up is closer than float32 rounding can tell, float64 decides. So a row's list depends neither on the
other rows of the call, nor on their number, the block size, the number of threads or the kind of processor. (A matrix
product alone does not promise that: MKL 2024.2 with AVX2 gives the rows at a block's edge other last bits.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kernels.blocks import check_finite, check_matrix, check_metric, check_same_dims, check_scores, padded_blocks
from kernels.topk import topk

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
FloatArray = npt.NDArray[Any]

# Columns scored at a time: 4096 x 2048 float32 scores stay in the outer cache for the argmax that follows.
COLUMN_TILE = 2048
# Float64 scores held at a time: 64 MiB.
NUM_FLOAT64_SCORES = 1 << 23
UNIT_ROUNDOFF_32 = 2.0**-24
UNIT_ROUNDOFF_64 = 2.0**-53


def assign_nearest(
    x_ND: FloatArray, centroids_KD: FloatArray, *, metric: str, block_rows: int = 4096
) -> npt.NDArray[np.int32]:
    """Nearest centroid of every row: int32 [N]; largest inner product ("ip") or smallest squared distance ("l2").

    x_ND, centroids_KD: float32 or float16 on the host; float16 is widened block by block. Never holds N x K scores.
    Ties, which include scores that are equal up to float64 rounding, go to the lowest id. The same for a row in
    whatever call it comes (see the module).
    Raises ValueError that names the first row with a NaN, an infinity or a score beyond float32.
    """
    check_matrix("x_ND", x_ND)
    if block_rows < 1:
        raise ValueError(f"block_rows must be at least 1, got {block_rows}")
    prepared_KE = prepare_centroids(centroids_KD, metric)
    num_dims = centroids_KD.shape[1]
    check_same_dims("x_ND", x_ND, "centroids_KD", num_dims)
    max_norm = float(torch.linalg.vector_norm(torch.from_numpy(centroids_KD.astype(np.float32)), dim=1).max())
    list_no_N = np.empty(len(x_ND), np.int32)
    undecided: list[npt.NDArray[np.int64]] = []
    # One buffer for all scores: fresh memory for every tile would cost more in page faults than the argmax.
    scratch = torch.empty(block_rows * min(len(prepared_KE), COLUMN_TILE), dtype=torch.float32)
    for start, stop, padded_BE in padded_blocks(x_ND, block_rows, ones_column=metric == "l2"):
        block_BE = padded_BE[: stop - start]
        best_B, second_B, list_no_B = _best_columns(block_BE, prepared_KE, scratch)
        check_scores(best_B, x_ND, start)
        list_no_N[start:stop] = list_no_B
        norms_B = torch.linalg.vector_norm(block_BE[:, :num_dims], dim=1).numpy().astype(np.float64)
        error_B = _score_error(norms_B, max_norm, num_dims, metric, UNIT_ROUNDOFF_32)
        undecided.append(start + np.flatnonzero(best_B.astype(np.float64) - second_B <= 2.0 * error_B))
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


def prepare_centroids(centroids_KD: FloatArray, metric: str) -> torch.Tensor:
    """Centroids as a float32 tensor [K, E] whose product with a padded block gives scores, larger is better.

    "ip": the centroids. "l2": 2c with -||c||^2 as a last column, which meets the block's column of ones, so that
    the score is ||x||^2 minus the squared distance without a second pass over the scores.
    """
    check_metric(metric)
    _check_centroids(centroids_KD)
    num_centroids, num_dims = centroids_KD.shape
    prepared = torch.empty((num_centroids, num_dims + (metric == "l2")), dtype=torch.float32)
    view = prepared.numpy()
    view[:, :num_dims] = centroids_KD
    if metric == "l2":
        view[:, :num_dims] *= 2.0
        with np.errstate(over="ignore"):
            view[:, num_dims] = -np.einsum("kd,kd->k", centroids_KD, centroids_KD, dtype=np.float64)
        if not np.isfinite(view).all():
            row = int(np.argmin(np.isfinite(view).all(axis=1)))
            raise ValueError(f"squared norms must be within float32: that of centroid {row} is not")
    return prepared


def _best_columns(
    block_BE: torch.Tensor, prepared_KE: torch.Tensor, scratch: torch.Tensor
) -> tuple[Float32Array, Float32Array, npt.NDArray[np.int64]]:
    """Best score, second best score (float32) and lowest column of the best (int64) of every row; a NaN score wins.

    `scratch`: float32 tensor of at least B * min(K, COLUMN_TILE) elements, overwritten.
    """
    rows = np.arange(len(block_BE))
    best_B = np.full(len(block_BE), -np.inf, np.float32)
    second_B = best_B.copy()
    best_column_B = np.zeros(len(block_BE), np.int64)
    for first in range(0, len(prepared_KE), COLUMN_TILE):
        tile_KE = prepared_KE[first : first + COLUMN_TILE]
        scores_BK = scratch[: len(block_BE) * len(tile_KE)].view(len(block_BE), len(tile_KE))
        torch.mm(block_BE, tile_KE.t(), out=scores_BK)
        tile_BK: Float32Array = scores_BK.numpy()
        column_B = tile_BK.argmax(axis=1)
        score_B = tile_BK[rows, column_B]
        tile_BK[rows, column_B] = -np.inf
        runner_up_B = np.maximum(scores_BK.amax(dim=1).numpy(), np.minimum(best_B, score_B))
        np.maximum(second_B, runner_up_B, out=second_B)
        # "not <=" lets a NaN through to the check.
        better_B = ~(score_B <= best_B) & ~np.isnan(best_B)
        best_B[better_B] = score_B[better_B]
        best_column_B[better_B] = column_B[better_B] + first
    return best_B, second_B, best_column_B


def _score_error(
    norms_B: Float64Array, max_norm: float, num_dims: int, metric: str, unit_roundoff: float
) -> Float64Array:
    """Bound of the rounding error of each row's scores, whatever the order of summation.

    n terms give at most n * u times the sum of their magnitudes (Higham, Accuracy and Stability of Numerical
    Algorithms, section 3.1), which Cauchy-Schwarz bounds by the norms; 4 more for the norm term and the roundings of
    the bound itself, and the smallest normal number for each term that underflows.
    """
    magnitude_B = norms_B * max_norm if metric == "ip" else (2.0 * norms_B + max_norm) * max_norm
    return (num_dims + 4) * (1.01 * unit_roundoff * magnitude_B + 2.0**-126)


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
        error_B = _score_error(np.sqrt(block_norms_B), max_norm, block_BD.shape[1], metric, UNIT_ROUNDOFF_64)
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

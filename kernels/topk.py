"""The k best of scores, merged lists and whole collections; exact search; scores of given pairs. Larger is better.

Shapes: Q queries, N scores or rows, k results, C candidates of a query, P queries and B rows of
a tile, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kernels.blocks import check_finite, check_matrix, check_metric, check_same_dims, on_device, padded_blocks

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]

# Fixed shapes of the matrix product of exact_search: a pair's score does not depend on how rows come in blocks.
# Multiples of 48 for each of 1 or 2 threads: MKL 2024.2 gives the rows and columns beyond its inner tiles (6 x 16 with
# AVX2, 48 x 8 with AVX-512) other last bits.
SEARCH_QUERIES = 96
SEARCH_ROWS = 4608


def topk(scores_QN: Float32Array, k: int) -> tuple[Float32Array, Int64Array]:
    """The k largest scores of every query, best first: scores float32 [Q, k] and their indices int64 [Q, k].

    Ties go to the lowest index. Where k > N the rest is -inf with index -1. Scores must not be NaN. Deterministic.
    A CuPy array gives CuPy arrays, with the same bits.
    """
    if on_device(scores_QN):
        from kernels.cuda.topk import topk as topk_on_device

        return topk_on_device(scores_QN, k)
    if scores_QN.ndim != 2 or scores_QN.dtype != np.float32:
        raise ValueError(f"scores_QN must be a float32 matrix, got {scores_QN.dtype} {scores_QN.shape}")
    _check_k(k)
    if np.isnan(scores_QN).any():
        raise ValueError(f"scores must be numbers: query {int(np.argwhere(np.isnan(scores_QN))[0, 0])} has a NaN")
    num_queries, num_scores = scores_QN.shape
    kept = min(k, num_scores)
    top_scores = np.full((num_queries, k), -np.inf, np.float32)
    top_index = np.full((num_queries, k), -1, np.int64)
    if kept == 0 or num_queries == 0:
        return top_scores, top_index
    # One int64 key orders by score, then by lowest index: the float's bits, made monotonic, above the negated index.
    bits = (scores_QN + np.float32(0.0)).view(np.int32).astype(np.int64)  # adding 0 turns -0.0 into 0.0
    bits = np.where(bits < 0, -0x80000000 - bits, bits)
    keys = (bits << 32) | (0xFFFFFFFF - np.arange(num_scores, dtype=np.int64))
    if kept < num_scores:
        keys = np.partition(keys, num_scores - kept, axis=1)[:, num_scores - kept :]
    keys = np.sort(keys, axis=1)[:, ::-1]
    top_index[:, :kept] = 0xFFFFFFFF - (keys & 0xFFFFFFFF)
    top_scores[:, :kept] = np.take_along_axis(scores_QN, top_index[:, :kept], axis=1)
    return top_scores, top_index


def merge_topk(lists: Sequence[tuple[Float32Array, Int64Array]], k: int) -> tuple[Float32Array, Int64Array]:
    """The k best of several result lists, best first: scores float32 [Q, k] and ids int64 [Q, k].

    Each list is (scores [Q, any], ids [Q, any]); larger is better and id -1 means no result. Ties go to the lowest
    id, so the order of the lists does not matter. An id that two lists hold appears twice. Missing: -inf and -1.
    """
    _check_k(k)
    if not lists:
        raise ValueError("merge_topk needs at least one list, got none")
    scores = np.concatenate([np.asarray(scores, np.float32) for scores, _ in lists], axis=1)
    ids = np.concatenate([np.asarray(ids, np.int64) for _, ids in lists], axis=1)
    if scores.shape != ids.shape:
        raise ValueError(f"scores and ids must have one shape, got {scores.shape} and {ids.shape}")
    if np.isnan(scores).any():
        raise ValueError(f"scores must be numbers: query {int(np.argwhere(np.isnan(scores))[0, 0])} has a NaN")
    if scores.shape[1] < k:
        missing = (len(scores), k - scores.shape[1])
        scores = np.concatenate([scores, np.full(missing, -np.inf, np.float32)], axis=1)
        ids = np.concatenate([ids, np.full(missing, -1, np.int64)], axis=1)
    absent = ids < 0
    if absent.any():
        scores = np.where(absent, np.float32(-np.inf), scores)
        order = np.lexsort((np.where(absent, np.iinfo(np.int64).max, ids), -scores), axis=1)[:, :k]
    else:
        order = np.lexsort((ids, -scores), axis=1)[:, :k]
    row = np.arange(len(scores))[:, None]
    return scores[row, order], ids[row, order]


def exact_search(
    queries_QD: npt.NDArray[Any], blocks: Iterable[tuple[int, npt.NDArray[Any]]], k: int, *, metric: str
) -> tuple[Float32Array, Int64Array]:
    """The k best rows of a stream for every query: scores float32 [Q, k] and row numbers int64 [Q, k], best first.

    blocks: (first_row, x_ND) with float16 or float32 rows; row numbers are first_row + position. Scores are inner
    products or negative squared distances, computed in float32. Ties go to the lowest row. Fewer rows than k: -inf
    and -1. Memory is bounded by a block; the result does not depend on how the rows are cut into blocks.
    Raises ValueError that names a query or a row that is not finite.
    """
    _check_k(k)
    check_metric(metric)
    check_matrix("queries_QD", queries_QD)
    queries_QD = queries_QD.astype(np.float32)
    check_finite("query", queries_QD)
    best = (np.full((len(queries_QD), k), -np.inf, np.float32), np.full((len(queries_QD), k), -1, np.int64))
    query_blocks = [(start, stop, block.clone()) for start, stop, block in padded_blocks(queries_QD, SEARCH_QUERIES)]
    for first_row, x_ND in blocks:
        check_matrix(f"the block at row {first_row}", x_ND)
        check_same_dims(f"the block at row {first_row}", x_ND, "queries_QD", queries_QD.shape[1])
        for tile_start, tile_stop, tile_BD in padded_blocks(x_ND, SEARCH_ROWS):
            num_rows = tile_stop - tile_start
            check_finite("row", tile_BD.numpy()[:num_rows], first_row + tile_start)
            for start, stop, block_PD in query_blocks:
                scores_PB = _tile_scores(block_PD, tile_BD, metric)[: stop - start, :num_rows]
                _keep_best(best[0][start:stop], best[1][start:stop], scores_PB, first_row + tile_start)
    return best


def _tile_scores(queries_PD: torch.Tensor, tile_BD: torch.Tensor, metric: str) -> Float32Array:
    """Scores float32 [P, B] of a padded block of queries with a padded tile of rows."""
    products: Float32Array = torch.mm(queries_PD, tile_BD.t()).numpy()
    if metric == "ip":
        return products
    queries, tile = queries_PD.numpy(), tile_BD.numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        products *= np.float32(2.0)
        products -= np.einsum("pd,pd->p", queries, queries)[:, None]
        products -= np.einsum("bd,bd->b", tile, tile)
        # Rounding can leave a coinciding pair at a tiny positive value; a distance has none.
        return np.minimum(products, np.float32(0.0), out=products)


def _keep_best(best_scores: Float32Array, best_rows: Int64Array, scores_PB: Float32Array, first_row: int) -> None:
    """Merges a tile's scores into the best so far, in place."""
    k = best_scores.shape[1]
    finite_B = np.isfinite(scores_PB).all(axis=0)
    if not finite_B.all():
        raise ValueError(f"scores must be within float32: row {first_row + int(np.argmin(finite_B))} is too large")
    # After the first tiles few rows still reach a query's kth score; only their columns are sorted.
    columns = np.flatnonzero((scores_PB >= best_scores[:, -1:]).any(axis=0))
    if len(columns) == 0:
        return
    found_scores, index = topk(scores_PB[:, columns], min(k, len(columns)))
    found_rows = first_row + columns[index]
    best_scores[:], best_rows[:] = merge_topk([(best_scores, best_rows), (found_scores, found_rows)], k)


def rescore(queries_QD: npt.NDArray[Any], candidates_QCD: npt.NDArray[Any], *, metric: str) -> Float32Array:
    """Scores float32 [Q, C] of every query with its own candidates: inner products or negative squared distances.

    Inputs are float16 or float32; the arithmetic is float32. A pair's score is independent of the other pairs.
    """
    check_metric(metric)
    num_queries, num_dims = queries_QD.shape
    if candidates_QCD.ndim != 3 or (candidates_QCD.shape[0], candidates_QCD.shape[2]) != (num_queries, num_dims):
        raise ValueError(f"candidates_QCD must be [{num_queries}, C, {num_dims}], got {candidates_QCD.shape}")
    scores_QC = np.empty(candidates_QCD.shape[:2], np.float32)
    for query, (query_D, candidates_CD) in enumerate(zip(queries_QD, candidates_QCD, strict=True)):
        query32_D = query_D.astype(np.float32)
        candidates32_CD = candidates_CD.astype(np.float32)
        # Elementwise, then a sum along each row: a matrix product may add in another order for another C.
        if metric == "ip":
            scores_QC[query] = (candidates32_CD * query32_D).sum(axis=1)
        else:
            scores_QC[query] = -np.square(candidates32_CD - query32_D).sum(axis=1)
    return scores_QC


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")

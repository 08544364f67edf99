"""Scores of given pairs of a query and a row that lies among many: gathered, widened and multiplied in one pass.

Shapes: Q queries, N rows, P pairs, C candidates of a query, k best of them, D dimensions.
"""

from __future__ import annotations

import platform
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels.blocks import check_metric

# Dimensions are added up in so many lanes, dimension d in lane d % LANES, and then the lanes from the first to the last.
# The order is a part of the result: it does not depend on the processor or on the other pairs.
LANES = 16
PAIRS_AT_ONCE = 16_384  # of the array code: 384 dimensions of them are 25 MB


def score_pairs(
    queries_QD: npt.NDArray[np.float32],
    query_P: npt.NDArray[np.int64],
    rows_ND: npt.NDArray[Any],
    row_P: npt.NDArray[np.int64],
    *,
    metric: str,
) -> npt.NDArray[np.float32]:
    """Scores float32 [P]: inner products or negative squared distances of queries_QD[query_P] and rows_ND[row_P].

    rows_ND: float16, C order, finite; it may be memory-mapped, and only rows that are asked for are read. Arithmetic in
    float32; a pair's score has the same bits wherever it is computed. On the thread that calls, without the interpreter.
    """
    _check(queries_QD, rows_ND, metric)
    for name, places, size in (("query_P", query_P, len(queries_QD)), ("row_P", row_P, len(rows_ND))):
        if len(places) and (places.min() < 0 or places.max() >= size):
            raise ValueError(f"{name} must be in 0..{size - 1}, got {places.min()}..{places.max()}")
    out_P = np.empty(len(row_P), np.float32)
    compiled = _compiled()
    if compiled is not None:
        queries, query = np.ascontiguousarray(queries_QD, np.float32), np.ascontiguousarray(query_P, np.int64)
        row = np.ascontiguousarray(row_P, np.int64)
        compiled.score_pairs(queries, query, rows_ND.view(np.uint16), row, metric == "ip", out_P)
        return out_P
    for begin in range(0, len(row_P), PAIRS_AT_ONCE):
        end = begin + PAIRS_AT_ONCE
        out_P[begin:end] = _scores(queries_QD[query_P[begin:end]], rows_ND[row_P[begin:end]], metric)
    return out_P


def best_rows(
    queries_QD: npt.NDArray[np.float32],
    rows_ND: npt.NDArray[Any],
    row_QC: npt.NDArray[np.int64],
    k: int,
    *,
    metric: str,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """The k best of each query's candidates: scores float32 [Q, k], of `score_pairs`, and rows int64 [Q, k], best first.

    row_QC: rows of rows_ND, those of a query all different; -1: none. Ties go to the lowest row. Fewer candidates than k: -inf
    and -1. On the thread that calls, without the interpreter.
    """
    _check(queries_QD, rows_ND, metric)
    if row_QC.shape[:1] != queries_QD.shape[:1]:
        raise ValueError(f"row_QC must be [{len(queries_QD)}, C], got {list(row_QC.shape)}")
    if row_QC.size and (row_QC.min() < -1 or row_QC.max() >= len(rows_ND)):
        raise ValueError(f"row_QC must be in -1..{len(rows_ND) - 1}, got {row_QC.min()}..{row_QC.max()}")
    scores_Qk = np.full((len(queries_QD), k), -np.inf, np.float32)
    best_Qk = np.full((len(queries_QD), k), -1, np.int64)
    compiled = _compiled()
    if compiled is not None:
        queries, rows = np.ascontiguousarray(queries_QD, np.float32), np.ascontiguousarray(row_QC, np.int64)
        compiled.best_rows(queries, rows_ND.view(np.uint16), rows, metric == "ip", scores_Qk, best_Qk)
        return scores_Qk, best_Qk
    query_P, column_P = np.nonzero(row_QC >= 0)
    scores_QC = np.full(row_QC.shape, -np.inf, np.float32)
    scores_QC[query_P, column_P] = score_pairs(queries_QD, query_P, rows_ND, row_QC[query_P, column_P], metric=metric)
    found = best_of(scores_QC, row_QC, k)
    scores_Qk[:, : found[0].shape[1]], best_Qk[:, : found[1].shape[1]] = found
    return scores_Qk, best_Qk


def best_of(
    scores_QC: npt.NDArray[np.float32], row_QC: npt.NDArray[np.int64], k: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """The k best of scored candidates, best first, in min(k, C) columns. Ties go to the lowest row; where it is -1, the score is -inf."""
    order = np.lexsort((row_QC, -scores_QC), axis=-1)[:, :k]
    row = np.arange(len(order))[:, None]
    return scores_QC[row, order], row_QC[row, order]


def _check(queries_QD: npt.NDArray[np.float32], rows_ND: npt.NDArray[Any], metric: str) -> None:
    check_metric(metric)
    if rows_ND.dtype != np.float16 or rows_ND.shape[1:] != queries_QD.shape[1:]:
        raise ValueError(
            f"rows_ND must be float16 [N, {queries_QD.shape[1]}], got {rows_ND.dtype} {list(rows_ND.shape)}"
        )


@cache
def _compiled() -> ModuleType | None:
    """kernels.rescore_compiled, or None where numba is not installed or the processor cannot widen halves."""
    try:
        from llvmlite.binding import get_host_cpu_features

        if platform.machine() in ("x86_64", "AMD64") and not get_host_cpu_features().get("f16c", False):
            return None  # nearly none is left, and LLVM would call a function there that is not at hand
        from kernels import rescore_compiled
    except ImportError:
        return None
    return rescore_compiled


def _scores(queries_PD: npt.NDArray[np.float32], rows_PD: npt.NDArray[Any], metric: str) -> npt.NDArray[np.float32]:
    rows = rows_PD.astype(np.float32)
    terms_PD = rows * queries_PD if metric == "ip" else np.square(rows - queries_PD)
    lanes_P = np.zeros((len(terms_PD), LANES), np.float32)
    for first in range(0, terms_PD.shape[1], LANES):
        part = terms_PD[:, first : first + LANES]
        lanes_P[:, : part.shape[1]] += part
    total_P = np.zeros(len(terms_PD), np.float32)
    for lane in range(LANES):
        total_P += lanes_P[:, lane]
    return total_P if metric == "ip" else -total_P

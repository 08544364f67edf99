"""Scores of given pairs: against float64, the same bits with and without numba, wherever a pair stands."""

from __future__ import annotations

import numpy as np
import pytest

from kernels import rescore
from kernels.rescore import best_rows, score_pairs


def _pairs(d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    rows = (rng.standard_normal((500, d)) * 10.0 ** rng.integers(-6, 2, (500, 1))).astype(np.float16)  # subnormal, too
    queries = rng.standard_normal((7, d)).astype(np.float32)
    return queries, rng.integers(0, 7, 300), rows, rng.integers(0, 500, 300)


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("d", [1, 15, 16, 33, 384])
def test_scores_are_those_of_float64_within_rounding(metric: str, d: int) -> None:
    queries, query, rows, row = _pairs(d)
    got = score_pairs(queries, query, rows, row, metric=metric)
    q, x = queries[query].astype(np.float64), rows[row].astype(np.float64)
    expected = (q * x).sum(1) if metric == "ip" else -np.square(q - x).sum(1)
    size = (np.abs(q * x)).sum(1) if metric == "ip" else np.square(np.abs(q) + np.abs(x)).sum(1)
    assert (np.abs(got - expected) <= 2.0**-23 * (d / 16 + 20) * size + 1e-30).all()


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("d", [5, 16, 100, 384])
def test_array_code_has_the_bits_of_the_compiled_loop(metric: str, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, query, rows, row = _pairs(d, seed=1)
    compiled = score_pairs(queries, query, rows, row, metric=metric)
    monkeypatch.setattr(rescore, "_compiled", lambda: None)
    monkeypatch.setattr(rescore, "PAIRS_AT_ONCE", 70)
    assert np.array_equal(score_pairs(queries, query, rows, row, metric=metric), compiled)


def test_a_pair_has_the_same_bits_alone() -> None:
    queries, query, rows, row = _pairs(384, seed=2)
    together = score_pairs(queries, query, rows, row, metric="ip")
    for p in (0, 17, 299):
        alone = score_pairs(queries[query[p] : query[p] + 1], np.zeros(1, np.int64), rows, row[p : p + 1], metric="ip")
        assert alone[0] == together[p]


def test_read_only_rows_are_taken_and_places_beyond_them_are_refused() -> None:
    queries, query, rows, row = _pairs(16)
    rows.flags.writeable = False
    assert len(score_pairs(queries, query[:0], rows, row[:0], metric="ip")) == 0
    with pytest.raises(ValueError, match=r"row_P must be in 0..499, got 500..500"):
        score_pairs(queries, query[:1], rows, np.array([500]), metric="ip")
    with pytest.raises(ValueError, match=r"query_P must be in 0..6, got -1..-1"):
        score_pairs(queries, np.array([-1]), rows, row[:1], metric="ip")
    with pytest.raises(ValueError, match=r"rows_ND must be float16 \[N, 16\], got float32 \[500, 16\]"):
        score_pairs(queries, query, rows.astype(np.float32), row, metric="ip")


def _candidates(rng: np.random.Generator, num_rows: int) -> np.ndarray:
    row_QC = np.stack([rng.permutation(num_rows)[:90] for _ in range(7)])
    row_QC[rng.random(row_QC.shape) < 0.2] = -1
    row_QC[3, 4:] = -1  # fewer than k
    row_QC[4] = -1
    return row_QC


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("k", [0, 1, 10, 90, 200])
@pytest.mark.parametrize("where", ["compiled", "arrays"])
def test_best_rows_are_the_best_pairs_in_order_with_ties_by_the_lowest_row(
    metric: str, k: int, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "arrays":
        monkeypatch.setattr(rescore, "_compiled", lambda: None)
    rng = np.random.default_rng(3)
    rows = rng.integers(-1, 2, (500, 5)).astype(np.float16)  # many equal scores
    queries, row_QC = rng.integers(-1, 2, (7, 5)).astype(np.float32), _candidates(rng, 500)
    scores_Qk, best_Qk = best_rows(queries, rows, row_QC, k, metric=metric)
    for q in range(7):
        there = row_QC[q][row_QC[q] >= 0]
        scores = score_pairs(queries, np.full(len(there), q), rows, there, metric=metric)
        order = sorted(range(len(there)), key=lambda c: (-scores[c], there[c]))[:k]
        assert best_Qk[q, : len(order)].tolist() == there[order].tolist()
        assert scores_Qk[q, : len(order)].tolist() == scores[order].tolist()
        assert (best_Qk[q, len(order) :] == -1).all() and np.isneginf(scores_Qk[q, len(order) :]).all()
    assert best_Qk.shape == scores_Qk.shape == (7, k)


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("d", [1, 16, 40, 384])
def test_best_rows_have_the_same_bits_with_and_without_numba(
    metric: str, d: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, _, rows, _ = _pairs(d, seed=4)
    row_QC = _candidates(np.random.default_rng(5), 500)
    compiled = best_rows(queries, rows, row_QC, 10, metric=metric)
    monkeypatch.setattr(rescore, "_compiled", lambda: None)
    arrays = best_rows(queries, rows, row_QC, 10, metric=metric)
    assert np.array_equal(compiled[0], arrays[0]) and np.array_equal(compiled[1], arrays[1])


def test_candidates_beyond_the_rows_are_refused() -> None:
    queries, _, rows, _ = _pairs(16)
    with pytest.raises(ValueError, match=r"row_QC must be in -1..499, got 500..500"):
        best_rows(queries[:1], rows, np.array([[500]]), 1, metric="ip")
    with pytest.raises(ValueError, match=r"row_QC must be \[7, C\], got \[1, 1\]"):
        best_rows(queries, rows, np.array([[0]]), 1, metric="ip")

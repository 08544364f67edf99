from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from kernels.opq import opq_train
from kernels.pq import pq_decode, pq_encode, pq_train

Float32Array = npt.NDArray[np.float32]


def correlated_rows(num_rows: int, num_dims: int, seed: int = 0) -> Float32Array:
    """Rows whose variance falls from the first principal axis to the last, axes in general position."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(np.random.default_rng(99).standard_normal((num_dims, num_dims)))[0]
    x = rng.standard_normal((num_rows, num_dims)) * 0.7 ** np.arange(num_dims) @ axes + 0.3
    return x.astype(np.float32)


def error(x: Float32Array, test: Float32Array, M: int, nbits: int) -> float:
    codebooks = pq_train(x, M, nbits, seed=0)
    return float(np.square(test - pq_decode(pq_encode(test, codebooks), codebooks)).sum(axis=1).mean())


@pytest.mark.parametrize(("num_dims", "M", "nbits"), [(24, 4, 8), (21, 7, 4), (6, 6, 4), (8, 1, 4)])
def test_the_rotation_is_orthogonal_and_makes_correlated_rows_cheaper(num_dims: int, M: int, nbits: int) -> None:
    x, test = correlated_rows(4000, num_dims), correlated_rows(2000, num_dims, seed=1)
    rotation = opq_train(x, M, nbits, seed=0)
    assert rotation.shape == (num_dims, num_dims)
    assert rotation.dtype == np.float32
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(num_dims), atol=2e-6)
    ratio = error(x @ rotation.T, test @ rotation.T, M, nbits) / error(x, test, M, nbits)
    # With sub-vectors of one dimension the error follows the sum of the variances, with one sub-vector of all dimensions
    # their product, and no rotation changes these.
    assert ratio < (0.8 if 1 < M < num_dims else 1.05)


def test_moving_the_rotation_lowers_the_error_where_variance_says_nothing() -> None:
    # Corners of a cube in every pair of dimensions, rotated: all variances are equal.
    rng = np.random.default_rng(0)
    corners = rng.choice([-1.0, 1.0], (5000, 8)) + 0.05 * rng.standard_normal((5000, 8))
    x = (corners @ np.linalg.qr(rng.standard_normal((8, 8)))[0]).astype(np.float32)
    start, rotation = (opq_train(x, 4, 4, seed=0, iterations=iterations) for iterations in (0, 30))
    assert error(x @ rotation.T, x @ rotation.T, 4, 4) < 0.8 * error(x @ start.T, x @ start.T, 4, 4)


def test_the_same_bits_with_any_number_of_threads() -> None:
    x = correlated_rows(9000, 24)
    threads = torch.get_num_threads()
    try:
        found = set()
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            found.add(opq_train(x, 4, 4, seed=3, iterations=3).tobytes())
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_the_rotation_is_what_faiss_rotates_by(metric: str) -> None:
    faiss = pytest.importorskip("faiss")
    num_dims, M, nlist = 24, 4, 8
    x, queries = correlated_rows(3000, num_dims), correlated_rows(20, num_dims, seed=1)
    rotation = opq_train(x, M, 8, seed=0, iterations=3)
    rotated, rotated_queries = x @ rotation.T, queries @ rotation.T
    centroids = rotated[:nlist]
    kind = faiss.METRIC_INNER_PRODUCT if metric == "ip" else faiss.METRIC_L2
    codebooks = pq_train(rotated, M, 8, seed=0, iterations=4)

    def filled(rows: Float32Array, transform: Any | None) -> tuple[Any, ...]:
        quantizer = faiss.IndexFlat(num_dims, kind)
        quantizer.add(centroids)
        inner = faiss.IndexIVFPQ(quantizer, num_dims, nlist, M, 8, kind)
        inner.own_fields = False
        faiss.copy_array_to_vector(codebooks.ravel(), inner.pq.centroids)
        inner.is_trained = True
        inner.precompute_table()
        inner.nprobe = 4
        index = inner if transform is None else faiss.IndexPreTransform(transform, inner)
        index.add(rows)
        return index, inner, quantizer  # faiss does not keep the parts alive

    matrix = faiss.OPQMatrix(num_dims, M)
    faiss.copy_array_to_vector(rotation.ravel(), matrix.A)
    matrix.is_trained = True
    matrix.set_is_orthonormal()
    assert matrix.is_orthonormal
    np.testing.assert_allclose(matrix.apply(x), rotated, atol=1e-5)
    theirs, ours = filled(x, matrix), filled(rotated, None)
    (their_scores, their_ids), (our_scores, our_ids) = (
        theirs[0].search(queries, 10),
        ours[0].search(rotated_queries, 10),
    )
    np.testing.assert_allclose(their_scores, our_scores, rtol=1e-4, atol=1e-4)
    assert (their_ids == our_ids).mean() > 0.98


@pytest.mark.parametrize("num_rows", [1, 2, 16, 17, 40])
def test_few_rows_give_an_orthogonal_rotation(num_rows: int) -> None:
    rotation = opq_train(correlated_rows(num_rows, 6).astype(np.float16), 3, 4, seed=0, iterations=2)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(6), atol=2e-6)


def test_rows_on_a_line_or_in_a_point_give_an_orthogonal_rotation() -> None:
    line = np.outer(np.arange(50), [1, 2, 3, 4]).astype(np.float32)
    for x in (line, np.zeros((50, 4), np.float32)):
        rotation = opq_train(x, 2, 4, seed=0, iterations=2)
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(4), atol=2e-6)


def test_wrong_arguments_are_named() -> None:
    x = correlated_rows(50, 12)
    with pytest.raises(ValueError, match=r"M must divide D \(12\), got 5"):
        opq_train(x, 5, 8, seed=0)
    with pytest.raises(ValueError, match="nbits must be one of 4, 8, got 6"):
        opq_train(x, 4, 6, seed=0)
    with pytest.raises(ValueError, match="at least one row, got 0"):
        opq_train(x[:0], 4, 8, seed=0)
    with pytest.raises(ValueError, match="iterations must be at least 0, got -1"):
        opq_train(x, 4, 8, seed=0, iterations=-1)
    x[7, 3] = np.nan
    with pytest.raises(ValueError, match="row 7 holds"):
        opq_train(x, 4, 8, seed=0)

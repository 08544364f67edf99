from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kernels.pq import pq_decode, pq_encode, pq_train


def rows(num_rows: int, num_dims: int, seed: int = 0) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((num_rows, num_dims)) @ rng.standard_normal((num_dims, num_dims))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def distances(x: npt.NDArray[Any], codebooks: npt.NDArray[Any], codes: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    return np.asarray(np.square(x.astype(np.float64) - pq_decode(codes, codebooks)).sum(axis=1))


@pytest.mark.parametrize("num_rows", [1, 3, 255, 256, 257])
def test_training_works_with_fewer_rows_than_codewords(num_rows: int) -> None:
    x = rows(num_rows, 12)
    codebooks = pq_train(x, 4, 8, seed=0, iterations=2)
    assert codebooks.shape == (4, 256, 3)
    assert np.isfinite(codebooks).all()
    if num_rows <= 256:
        np.testing.assert_allclose(pq_decode(pq_encode(x, codebooks), codebooks), x, atol=1e-2)


@pytest.mark.parametrize("kind", ["constant", "three rows", "one row aside"])
def test_training_copes_with_fewer_different_rows_than_codewords(kind: str) -> None:
    x = np.tile(rows(1 if kind == "constant" else 3, 8), (400, 1))
    if kind == "one row aside":
        x[77] *= 5
    codebooks = pq_train(x, 2, 8, seed=0)
    assert np.isfinite(codebooks).all()
    np.testing.assert_allclose(pq_decode(pq_encode(x, codebooks), codebooks), x, atol=1e-2)


def test_a_training_of_more_rows_than_are_used_is_as_good_as_one_of_those() -> None:
    x = rows(9000, 6)
    codebooks, of_some = pq_train(x, 2, 4, seed=5), pq_train(x[:4096], 2, 4, seed=6)
    assert codebooks.tobytes() == pq_train(x.copy(), 2, 4, seed=5).tobytes()
    errors = [distances(x, words, pq_encode(x, words)).mean() for words in (codebooks, of_some)]
    assert errors[0] <= 1.05 * errors[1]


def test_training_repeats_to_the_bit_and_its_error_is_that_of_faiss() -> None:
    faiss = pytest.importorskip("faiss")
    x = rows(4000, 16)
    codebooks = pq_train(x, 4, 8, seed=5, iterations=8)
    assert codebooks.tobytes() == pq_train(x, 4, 8, seed=5, iterations=8).tobytes()
    assert codebooks.tobytes() != pq_train(x, 4, 8, seed=6, iterations=8).tobytes()
    pq = faiss.ProductQuantizer(16, 4, 8)
    pq.train(x)
    theirs = np.square(x - pq.decode(pq.compute_codes(x))).sum(axis=1).mean()
    assert distances(x, codebooks, pq_encode(x, codebooks)).mean() <= 1.05 * theirs

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.assign import assign_nearest
from kernels.kmeans import kmeans
from kernels.pq import code_size, pq_decode, pq_encode, pq_train

VARIANTS = [(32, 8, 8), (32, 4, 8), (30, 5, 8), (32, 8, 4), (35, 7, 4), (6, 6, 4)]


def rows(num_rows: int, num_dims: int, seed: int = 0) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((num_rows, num_dims)) @ rng.standard_normal((num_dims, num_dims))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def distances(x: npt.NDArray[Any], codebooks: npt.NDArray[Any], codes: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    return np.asarray(np.square(x.astype(np.float64) - pq_decode(codes, codebooks)).sum(axis=1))


@pytest.mark.parametrize(("num_dims", "M", "nbits"), VARIANTS)
def test_codes_are_those_of_faiss(num_dims: int, M: int, nbits: int) -> None:
    faiss = pytest.importorskip("faiss")
    x = rows(3000, num_dims)
    codebooks = pq_train(x[:1500], M, nbits, seed=0, iterations=3)
    pq = faiss.ProductQuantizer(num_dims, M, nbits)
    faiss.copy_array_to_vector(codebooks.ravel(), pq.centroids)
    ours, theirs = pq_encode(x, codebooks), pq.compute_codes(x)
    assert ours.shape == theirs.shape == (3000, code_size(M, nbits))
    # A code may differ where two codewords are equally far up to float32 rounding, and nowhere else.
    np.testing.assert_allclose(distances(x, codebooks, ours), distances(x, codebooks, theirs), rtol=1e-5, atol=1e-6)
    assert (ours != theirs).mean() < 1e-3
    np.testing.assert_array_equal(pq_decode(theirs, codebooks), pq.decode(theirs))


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize(("num_dims", "M", "nbits"), [(32, 8, 8), (35, 7, 4)])
def test_our_lists_and_codes_search_in_faiss_like_an_index_that_faiss_filled(
    metric: str, num_dims: int, M: int, nbits: int
) -> None:
    faiss = pytest.importorskip("faiss")
    x, nlist = rows(4000, num_dims), 20
    centroids = kmeans(x, nlist, metric=metric, seed=0, iterations=4)
    list_no = assign_nearest(x, centroids, metric=metric)
    residuals = x - centroids[list_no]
    codebooks = pq_train(residuals[:2000], M, nbits, seed=0, iterations=4)
    codes = pq_encode(residuals, codebooks)

    def empty_index() -> Any:
        quantizer = faiss.IndexFlatIP(num_dims) if metric == "ip" else faiss.IndexFlatL2(num_dims)
        quantizer.add(centroids)
        kind = faiss.METRIC_INNER_PRODUCT if metric == "ip" else faiss.METRIC_L2
        index = faiss.IndexIVFPQ(quantizer, num_dims, nlist, M, nbits, kind)
        index.own_fields = False
        index.by_residual = True
        faiss.copy_array_to_vector(codebooks.ravel(), index.pq.centroids)
        index.is_trained = True
        index.precompute_table()
        index.nprobe = 6
        return index, quantizer

    (theirs, _theirs_quantizer), (ours, _ours_quantizer) = empty_index(), empty_index()
    theirs.add(x)
    for list_id in range(nlist):
        ids = np.flatnonzero(list_no == list_id).astype(np.int64)
        entries = codes[ids]  # swig_ptr does not keep its array alive, so it needs a name
        ours.invlists.add_entries(list_id, len(ids), faiss.swig_ptr(ids), faiss.swig_ptr(entries))
    ours.ntotal = len(x)
    encoded = theirs.sa_encode(x)  # one byte of list number for nlist <= 256, then the code
    assert (encoded != np.column_stack([list_no.astype(np.uint8), codes])).mean() < 1e-3
    queries = rows(50, num_dims, seed=9)
    (our_scores, our_ids), (their_scores, their_ids) = ours.search(queries, 10), theirs.search(queries, 10)
    np.testing.assert_allclose(our_scores, their_scores, rtol=1e-4, atol=1e-5)
    assert (our_ids == their_ids).mean() > 0.99


@pytest.mark.parametrize(("num_dims", "M", "nbits"), VARIANTS)
def test_a_rows_code_does_not_depend_on_the_other_rows(num_dims: int, M: int, nbits: int) -> None:
    x = rows(4500, num_dims)
    codebooks = pq_train(x[:300], M, nbits, seed=0, iterations=2)
    whole = pq_encode(x, codebooks)
    np.testing.assert_array_equal(pq_encode(x[4000:4100], codebooks), whole[4000:4100])
    np.testing.assert_array_equal(pq_encode(x[4499:], codebooks), whole[4499:])
    np.testing.assert_array_equal(pq_encode(x[4499:].copy().astype(np.float32), codebooks), whole[4499:])


@given(num_rows=st.integers(0, 40), M=st.integers(1, 7), sub_dims=st.integers(1, 5), nbits=st.sampled_from([4, 8]))
@settings(max_examples=30, deadline=None)
def test_codewords_are_encoded_as_themselves(num_rows: int, M: int, sub_dims: int, nbits: int) -> None:
    rng = np.random.default_rng(num_rows)
    codebooks = rng.standard_normal((M, 1 << nbits, sub_dims), dtype=np.float32)
    index = rng.integers(0, 1 << nbits, (num_rows, M))
    x = np.concatenate([codebooks[m][index[:, m]] for m in range(M)], axis=1)
    codes = pq_encode(x, codebooks)
    assert codes.dtype == np.uint8
    assert codes.shape == (num_rows, (M * nbits + 7) // 8)
    np.testing.assert_allclose(pq_decode(codes, codebooks), x, atol=1e-3)


def test_four_bit_codes_put_the_first_in_the_low_bits() -> None:
    codebooks = np.arange(16, dtype=np.float32).reshape(1, 16, 1).repeat(3, axis=0)
    codes = pq_encode(np.array([[1, 2, 3]], np.float32), codebooks)
    np.testing.assert_array_equal(codes, [[0x21, 0x03]])
    np.testing.assert_array_equal(pq_decode(codes, codebooks), [[1, 2, 3]])


def test_equally_near_codewords_go_to_the_lowest() -> None:
    codebooks = np.tile(np.array([[[1.0], [-1.0]]], np.float32), (1, 8, 1))
    np.testing.assert_array_equal(pq_encode(np.array([[1.0], [-1.0]], np.float32), codebooks), [[0], [1]])


@pytest.mark.parametrize("num_rows", [1, 3, 255, 256, 257])
def test_training_works_with_fewer_rows_than_codewords(num_rows: int) -> None:
    x = rows(num_rows, 12)
    codebooks = pq_train(x, 4, 8, seed=0, iterations=2)
    assert codebooks.shape == (4, 256, 3)
    assert np.isfinite(codebooks).all()
    if num_rows <= 256:
        np.testing.assert_allclose(pq_decode(pq_encode(x, codebooks), codebooks), x, atol=1e-2)


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


def test_wrong_arguments_are_named() -> None:
    x = rows(50, 12)
    codebooks = pq_train(x, 4, 4, seed=0, iterations=1)
    with pytest.raises(ValueError, match=r"M must divide D \(12\), got 5"):
        pq_train(x, 5, 8, seed=0)
    with pytest.raises(ValueError, match="nbits must be one of 4, 8, got 6"):
        pq_train(x, 4, 6, seed=0)
    with pytest.raises(ValueError, match="at least one row, got 0"):
        pq_train(x[:0], 4, 8, seed=0)
    with pytest.raises(ValueError, match=r"D of the codebooks \(12\), got 11"):
        pq_encode(x[:, :11], codebooks)
    with pytest.raises(ValueError, match=r"codes must be uint8 \[N, 2\]"):
        pq_decode(np.zeros((3, 4), np.uint8), codebooks)
    x[7, 11] = np.inf
    with pytest.raises(ValueError, match="row 7 holds"):
        pq_encode(x, codebooks)

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import pq_codewords
from kernels.assign import assign_nearest
from kernels.kmeans import kmeans
from kernels.pq import code_size, pq_decode, pq_encode, pq_encode_residuals, pq_train

VARIANTS = [(32, 8, 8), (32, 4, 8), (30, 5, 8), (32, 8, 4), (35, 7, 4), (6, 6, 4)]
# Dimensions of a sub-vector: each scan of kernels.pq_compiled with and without padding.
SUB_DIMS = [1, 2, 3, 4, 5, 8, 12, 16, 33]


def rows(num_rows: int, num_dims: int, seed: int = 0) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((num_rows, num_dims)) @ rng.standard_normal((num_dims, num_dims))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def distances(x: npt.NDArray[Any], codebooks: npt.NDArray[Any], codes: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    return np.asarray(np.square(x.astype(np.float64) - pq_decode(codes, codebooks)).sum(axis=1))


def nearest_in_float64(x: npt.NDArray[Any], codebooks: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Nearest codeword [N, M] by definition; random values leave no pair within rounding of float64 but equal ones."""
    M, _, sub_dims = codebooks.shape
    parts = x.astype(np.float64).reshape(len(x), M, 1, sub_dims) - codebooks.astype(np.float64)
    return np.asarray(np.square(parts).sum(axis=3).argmin(axis=2))


def unpacked(codes: npt.NDArray[np.uint8], M: int, nbits: int) -> npt.NDArray[np.uint8]:
    """Indices [N, M] of the codewords."""
    return (
        codes if nbits == 8 else np.stack([codes & 15, codes >> 4], axis=2).reshape(len(codes), (M + 1) // 2 * 2)[:, :M]
    )


@pytest.fixture
def both_ways(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls a function with numba and without, and gives both results."""
    pytest.importorskip("numba")

    def call(function: Any) -> tuple[Any, Any]:
        compiled = function()
        with monkeypatch.context() as patch:
            patch.setattr(pq_codewords, "compiled_pq", lambda: None)
            return compiled, function()

    return call


@pytest.mark.parametrize("nbits", [4, 8])
@pytest.mark.parametrize("sub_dims", SUB_DIMS)
def test_codes_of_any_shape_are_the_nearest_with_numba_and_without(sub_dims: int, nbits: int, both_ways: Any) -> None:
    faiss = pytest.importorskip("faiss")
    rng = np.random.default_rng(sub_dims)
    for M, num_rows in ((1, 257), (3, 255), (2, 1), (5, 0)):
        codebooks = rng.standard_normal((M, 1 << nbits, sub_dims), dtype=np.float32)
        x = rng.standard_normal((num_rows, M * sub_dims), dtype=np.float32)
        codebooks[:, 9] = codebooks[:, 3]  # a tie in every sub-space
        x[: num_rows // 8, :sub_dims] = codebooks[0, 9]
        codes, plain = both_ways(lambda x=x, codebooks=codebooks: pq_encode(x, codebooks))
        np.testing.assert_array_equal(unpacked(codes, M, nbits), nearest_in_float64(x, codebooks))
        np.testing.assert_array_equal(plain, codes)
        pq = faiss.ProductQuantizer(M * sub_dims, M, nbits)
        faiss.copy_array_to_vector(codebooks.ravel(), pq.centroids)
        np.testing.assert_array_equal(pq.decode(codes), pq_decode(codes, codebooks))
        theirs = pq.compute_codes(x)
        np.testing.assert_allclose(
            distances(x, codebooks, theirs), distances(x, codebooks, codes), rtol=1e-5, atol=1e-6
        )


def test_near_ties_are_decided_in_float64(both_ways: Any) -> None:
    # Two codewords that differ by 2^-20, and rows whose float32 scores for them do not.
    step = np.float32(2.0**-20)
    codebooks = np.full((1, 16, 2), -1.0, np.float32)
    codebooks[0, 4, 0], codebooks[0, 5, 0] = 1 + step, 1.0
    codebooks[0, 4:6, 1] = 7.0
    x = np.array([[1, 7], [1 + step, 7], [1 + 2 * step, 7], [1 - step, 7], [0, 0], [1000, 7]], np.float32)
    codes, plain = both_ways(lambda: pq_encode(x, codebooks))
    np.testing.assert_array_equal(codes[:4, 0], [5, 4, 4, 5])
    np.testing.assert_array_equal(codes[:, 0], nearest_in_float64(x, codebooks)[:, 0])
    np.testing.assert_array_equal(plain, codes)


@given(
    num_rows=st.integers(0, 300),
    M=st.integers(1, 5),
    sub_dims=st.integers(1, 17),
    nbits=st.sampled_from([4, 8]),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e5]),
    half=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_residuals_are_encoded_like_their_difference(
    num_rows: int, M: int, sub_dims: int, nbits: int, scale: float, half: bool
) -> None:
    rng = np.random.default_rng([num_rows, M, sub_dims])
    dtype = np.float16 if half and scale >= 1e-3 and scale <= 1.0 else np.float32
    x = (rng.standard_normal((num_rows, M * sub_dims)) * scale).astype(dtype)
    centroids = (rng.standard_normal((7, M * sub_dims)) * scale).astype(np.float32)
    codebooks = (rng.standard_normal((M, 1 << nbits, sub_dims)) * scale).astype(np.float32)
    list_no = rng.integers(0, 7, num_rows).astype(np.int32)
    residuals = x.astype(np.float32) - centroids[list_no]
    codes = pq_encode_residuals(x, centroids, list_no, codebooks)
    np.testing.assert_array_equal(codes, pq_encode(residuals, codebooks))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pq_codewords, "compiled_pq", lambda: None)
        np.testing.assert_array_equal(codes, pq_encode_residuals(x, centroids, list_no, codebooks))


def test_arrays_may_be_mapped_reversed_read_only_or_unaligned(tmp_path: Path) -> None:
    x = rows(2500, 12)
    codebooks = pq_train(x, 3, 4, seed=0, iterations=2)
    codes = pq_encode(x, codebooks)
    np.save(tmp_path / "rows.npy", x)
    np.testing.assert_array_equal(pq_encode(x[::-1], codebooks), codes[::-1])
    np.testing.assert_array_equal(pq_encode(np.asfortranarray(x), codebooks), codes)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    unaligned = np.frombuffer(b"-" + x.tobytes(), np.float32, offset=1).reshape(x.shape)
    zeros, list_no = np.frombuffer(bytes(49), np.float32, offset=1).reshape(1, 12), np.broadcast_to(0, len(x))
    for same in (mapped, unaligned):
        np.testing.assert_array_equal(pq_encode(same, codebooks), codes)
        np.testing.assert_array_equal(pq_encode_residuals(same, zeros, list_no, codebooks), codes)
        np.testing.assert_array_equal(pq_encode_residuals(same, mapped[:1] * 0, list_no, codebooks), codes)
        np.testing.assert_array_equal(pq_train(same, 3, 4, seed=0, iterations=2), codebooks)
    half = x.astype(np.float16)
    np.testing.assert_array_equal(pq_encode(half, codebooks), pq_encode(half.astype(np.float32), codebooks))


def test_the_number_of_threads_and_numba_do_not_change_a_bit(both_ways: Any) -> None:
    x = rows(5000, 15)
    threads = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            for codebooks in both_ways(lambda: pq_train(x, 3, 8, seed=1, iterations=6)):
                results.append(codebooks.tobytes() + pq_encode(x, codebooks).tobytes())
            assert torch.get_num_threads() == num_threads
    finally:
        torch.set_num_threads(threads)
    assert len(set(results)) == 1


def test_numba_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "kernels.pq_compiled", raising=False)
    monkeypatch.delattr("kernels.pq_compiled", raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)
    assert pq_codewords.compiled_pq() is None


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
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        pq_train(x, 4, 8, seed=0, iterations=0)
    list_no = np.zeros(50, np.int64)
    with pytest.raises(ValueError, match=r"list_no_N must be in 0..L-1 \(1\), got 0..2"):
        pq_encode_residuals(x, x[:2], list_no + np.eye(1, 50, 3, dtype=int)[0] * 2, codebooks)
    with pytest.raises(ValueError, match=r"list_no_N must be integers \[50\], got int64 \(49,\)"):
        pq_encode_residuals(x, x[:2], list_no[1:], codebooks)
    codebooks[2, 5, 1] = 1e30
    with pytest.raises(ValueError, match="that of codeword 5 of sub-quantizer 2 is not"):
        pq_encode(x, codebooks)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38])
def test_the_first_row_that_is_not_finite_is_named(value: float, both_ways: Any) -> None:
    x = rows(2600, 12)
    codebooks = pq_train(x, 4, 4, seed=0, iterations=1)
    codebooks[:, :, 1] = 0.0  # a product with it hides nothing
    codebooks[:, 0, 0] = 10.0
    centroids, list_no = np.zeros((1, 12), np.float32), np.zeros(2600, np.int64)
    x[2300, 0] = x[1207, 9] = x[1209, 0] = value
    message = "those of row 1207 are not" if value == 1e38 else "row 1207 holds"

    def encode() -> str:
        with pytest.raises(ValueError, match=message):
            pq_encode_residuals(x, centroids, list_no, codebooks)
        with pytest.raises(ValueError, match=message) as error:
            pq_encode(x, codebooks)
        return str(error.value)

    compiled, plain = both_ways(encode)
    assert compiled == plain
    with pytest.raises(ValueError, match="row 1207 holds"):
        pq_train(x, 4, 4, seed=0)

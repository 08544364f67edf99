from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import hamming, reference
from kernels.hamming import hamming_distances, hamming_search
from kernels.pool import pool_normalize

UInt8Array = npt.NDArray[np.uint8]


def packed_rows(seed: int, num_rows: int, num_bytes: int, values: int = 256) -> UInt8Array:
    return np.random.default_rng(seed).integers(0, values, (num_rows, num_bytes)).astype(np.uint8)


@pytest.fixture(params=["compiled", "numpy"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "numpy":
        monkeypatch.setattr(hamming, "compiled_hamming", lambda: None)
    else:
        pytest.importorskip("numba")


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("num_bytes", [1, 7, 8, 9, 16, 24, 48])
def test_distances_and_neighbours_are_those_of_the_reference(num_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, x = packed_rows(1, 37, num_bytes), packed_rows(2, 700, num_bytes)
    monkeypatch.setattr(hamming, "BLOCK_ROWS", 300)
    np.testing.assert_array_equal(hamming_distances(q, x), reference.hamming_distances(q, x))
    for k in (1, 10, 800):
        for got, expected in zip(hamming_search(q, x, k), reference.hamming_search(q, x, k), strict=True):
            np.testing.assert_array_equal(got, expected, strict=True)


@pytest.mark.usefixtures("path")
def test_ties_go_to_the_lowest_row_with_any_number_of_threads_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    q, x = packed_rows(1, 5, 2, values=2), packed_rows(2, 4000, 2, values=2)
    expected = reference.hamming_search(q, x, 1500)
    threads = torch.get_num_threads()
    try:
        for num_threads, block_rows in ((1, 4096), (2, 4096), (3, 700), (2, 1)):
            torch.set_num_threads(num_threads)
            monkeypatch.setattr(hamming, "BLOCK_ROWS", block_rows)
            num_rows = 4000 if block_rows > 1 else 40
            got = hamming_search(q, x[:num_rows], 1500)
            if num_rows < 4000:
                expected = reference.hamming_search(q, x[:num_rows], 1500)
            np.testing.assert_array_equal(got[0], expected[0])
            np.testing.assert_array_equal(got[1], expected[1])
    finally:
        torch.set_num_threads(threads)


@given(
    seed=st.integers(0, 1000),
    num_queries=st.integers(0, 5),
    num_rows=st.integers(0, 60),
    num_bytes=st.integers(1, 40),
    k=st.integers(1, 70),
)
@settings(max_examples=50, deadline=None)
def test_compiled_loops_and_array_operations_give_the_same(
    seed: int, num_queries: int, num_rows: int, num_bytes: int, k: int
) -> None:
    pytest.importorskip("numba")
    q, x = packed_rows(seed, num_queries, num_bytes), packed_rows(seed + 1, num_rows, num_bytes)
    results = []
    with pytest.MonkeyPatch.context() as patch:
        results.append((hamming_distances(q, x), *hamming_search(q, x, k)))
        patch.setattr(hamming, "compiled_hamming", lambda: None)
        results.append((hamming_distances(q, x), *hamming_search(q, x, k)))
    for one, two in zip(*results, strict=True):
        np.testing.assert_array_equal(one, two)


def test_faiss_finds_the_same_distances() -> None:
    faiss = pytest.importorskip("faiss")
    q, x = packed_rows(1, 20, 16), packed_rows(2, 5000, 16)
    index = faiss.IndexBinaryFlat(128)
    index.add(x)
    expected, _ = index.search(q, 10)
    found, rows = hamming_search(q, x, 10)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.bitwise_count(x[rows] ^ q[:, None]).sum(axis=2), expected)


def test_rows_may_be_memory_mapped_and_strided(tmp_path: Any) -> None:
    q, x = packed_rows(1, 3, 12), packed_rows(2, 100, 12)
    np.save(tmp_path / "bits.npy", x)
    expected = reference.hamming_distances(q, x)
    np.testing.assert_array_equal(hamming_distances(q, np.load(tmp_path / "bits.npy", mmap_mode="r")), expected)
    np.testing.assert_array_equal(hamming_distances(q, np.asfortranarray(x)), expected)
    np.testing.assert_array_equal(hamming_distances(q, x[::-1]), expected[:, ::-1])


def test_signs_of_normalised_vectors_find_the_vector_itself() -> None:
    states = np.random.default_rng(0).standard_normal((50, 100), dtype=np.float32)
    bits = pool_normalize(states, np.arange(51), mode="mean", dtype="binary")
    distances, rows = hamming_search(bits, bits, 1)
    np.testing.assert_array_equal(distances, 0)
    np.testing.assert_array_equal(rows[:, 0], np.arange(50))


def test_wrong_arguments_are_named() -> None:
    q, x = packed_rows(1, 3, 12), packed_rows(2, 5, 13)
    with pytest.raises(ValueError, match=r"q_QB must have the B of x_NB \(13\), got 12"):
        hamming_distances(q, x)
    with pytest.raises(ValueError, match="x_NB must be a uint8 matrix on the host with B >= 1, got float32"):
        hamming_search(q, np.zeros((5, 12), np.float32), 1)
    with pytest.raises(ValueError, match="q_QB must be a uint8 matrix .* got list"):
        hamming_distances([[1]], x)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        hamming_search(x, x, 0)

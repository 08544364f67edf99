"""Kernels of whole numbers: Hamming distances and MinHash signatures, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import reference
from kernels.cuda.hamming import hamming_distances
from kernels.cuda.minhash import minhash

cupy = pytest.importorskip("cupy")
pytestmark = pytest.mark.gpu


@given(num_queries=st.integers(0, 40), num_rows=st.integers(0, 300), num_bytes=st.sampled_from([1, 3, 4, 37, 48, 96]))
@settings(max_examples=40, deadline=None)
def test_distances_are_the_references(num_queries: int, num_rows: int, num_bytes: int) -> None:
    rng = np.random.default_rng(num_rows)
    q, x = (rng.integers(0, 256, (n, num_bytes), dtype=np.uint8) for n in (num_queries, num_rows))
    found = hamming_distances(cupy.asarray(q), cupy.asarray(x))
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found.get(), np.bitwise_count(q[:, None] ^ x[None]).sum(axis=2, dtype=np.int32))


@given(
    lengths=st.lists(st.integers(1, 400), max_size=6),
    num_hashes=st.sampled_from([1, 64, 128, 200]),
    shingle=st.integers(1, 9),
    dtype=st.sampled_from(["uint32", "int32", "int64", "uint8"]),
)
@settings(max_examples=25, deadline=None)
def test_signatures_are_the_references(lengths: list[int], num_hashes: int, shingle: int, dtype: str) -> None:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    most = min(int(np.iinfo(dtype).max), (1 << 32) - 1)
    tokens = np.random.default_rng(shingle).integers(0, most, int(offsets[-1]), endpoint=True).astype(dtype)
    expected = reference.minhash(tokens, offsets, num_hashes=num_hashes, shingle=shingle, seed=(1 << 63) + 5)
    for place in (np.asarray, cupy.asarray):
        found = minhash(
            cupy.asarray(tokens), place(offsets), num_hashes=num_hashes, shingle=shingle, seed=(1 << 63) + 5
        )
        assert found.dtype == np.uint32
        np.testing.assert_array_equal(found.get(), expected)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"B of x_NB \(4\), got 3"):
        hamming_distances(cupy.zeros((2, 3), cupy.uint8), cupy.zeros((2, 4), cupy.uint8))
    with pytest.raises(ValueError, match="x_NB must be a uint8 matrix"):
        hamming_distances(cupy.zeros((2, 4), cupy.uint8), cupy.zeros((2, 4), cupy.int32))
    tokens = cupy.asarray(np.array([3, -1, 5], np.int64))
    with pytest.raises(ValueError, match="token 1 is -1"):
        minhash(tokens, np.array([0, 3]), seed=0)
    with pytest.raises(ValueError, match="segment 1 holds 0"):
        minhash(cupy.abs(tokens), cupy.asarray(np.array([0, 2, 2, 3])), seed=0)
    with pytest.raises(ValueError, match="shingle must be"):
        minhash(cupy.abs(tokens), np.array([0, 3]), shingle=0, seed=0)

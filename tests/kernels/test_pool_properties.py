"""Every path of pooling against kernels/reference.py, within rounding bounds of float32 and of the result's dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import pool, reference
from tests.kernels.array_paths import (
    GPU,
    UNDERFLOW,
    UNIT_ROUNDOFF,
    Array,
    assert_same,
    dims,
    fetched,
    few,
    matrices,
    moved,
    segments,
)


def pooling_error(states: Array, offsets: Array, mode: str, normalize: bool, kept: int) -> Array:
    """Bound [S, D] of the rounding error of vectors that are pooled in float32."""
    magnitudes = reference.pooled(np.abs(states), offsets, mode, False, kept)
    picked = mode in ("cls", "last", "max")
    # A sum of `length` products, the weights and the divisor; nothing is rounded where a token is picked.
    num_roundings = np.zeros((len(offsets) - 1, 1)) if picked else np.diff(offsets)[:, None] + 4.0
    error = UNIT_ROUNDOFF["float32"] * num_roundings * magnitudes + (0.0 if picked else 2.0**-126)
    if not normalize:
        return np.asarray(error)
    vectors = reference.pooled(states, offsets, mode, False, kept)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    norms = np.where(norms > 0, norms, 1.0)
    lost = np.linalg.norm(error, axis=1, keepdims=True)
    # First order in the error of the norm, doubled; a norm that is mostly error bounds nothing.
    relative = np.abs(vectors) / norms
    error = 2.0 * (error + relative * lost) / norms + 4.0 * UNIT_ROUNDOFF["float32"] * relative
    return np.asarray(np.where(lost < 0.25 * norms, error, np.inf))


@pytest.mark.parametrize("path", ["array", "tensor", GPU])
@pytest.mark.parametrize("mode", pool.MODES)
@given(data=st.data(), offsets=segments(), num_dims=dims, normalize=st.booleans())
@few
def test_pooled_vectors(
    path: str, mode: str, data: st.DataObject, offsets: npt.NDArray[np.int64], num_dims: int, normalize: bool
) -> None:
    states = data.draw(matrices(int(offsets[-1]), num_dims))
    kept = data.draw(st.integers(1, num_dims))
    source: Any = torch.from_numpy(states) if path == "tensor" else moved(path, states)
    expected = reference.pooled(states, offsets, mode, normalize, kept)
    error = pooling_error(states, offsets, mode, normalize, kept)
    for dtype in pool.DTYPES:
        arguments: Any = {"mode": mode, "normalize": normalize, "truncate_dim": kept, "dtype": dtype}
        got = fetched(pool.pool_normalize(source, moved(path, offsets), **arguments))
        if path == "array":
            like = reference.pool_normalize(states, offsets, **arguments)
            assert_same(got if dtype == "int8" else (got,), like if dtype == "int8" else (like,))
        elif dtype == "int8":
            codes, scale = got
            assert (codes.dtype, codes.shape, scale.dtype) == (np.int8, expected.shape, np.float32)
            wide = scale.astype(np.float64)[:, None]
            # Half a step, and what float32 moves a quotient of up to 127 by.
            assert (np.abs(codes * wide - expected) <= (0.5 + 2.0**-14) * wide + 2.0 * error).all()
        elif dtype == "binary":
            bits = np.unpackbits(got, axis=1)
            assert got.shape == (len(expected), -(-kept // 8))
            assert ((bits[:, :kept] == (expected > 0)) | (np.abs(expected) < error)).all()
            assert not bits[:, kept:].any()
        else:
            assert (got.dtype, got.shape) == (dtype, expected.shape)
            rounding = UNIT_ROUNDOFF[dtype] * np.abs(expected) + UNDERFLOW[dtype]
            assert (np.abs(got - expected) <= 2.0 * error + 1.01 * rounding).all()

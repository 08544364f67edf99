from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import reference
from kernels.pool import DTYPES, MODES, pool_normalize


def packed(lengths: list[int], num_dims: int, seed: int = 0) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return np.random.default_rng(seed).standard_normal((int(offsets[-1]), num_dims), dtype=np.float32), offsets


def padded_reference(states: npt.NDArray[Any], offsets: npt.NDArray[np.int64], mode: str) -> npt.NDArray[np.float64]:
    """The same poolings written as sentence-transformers does: padded batch, attention mask."""
    lengths = np.diff(offsets)
    batch = np.zeros((len(lengths), max(lengths), states.shape[1]))
    mask = np.arange(max(lengths))[None, :] < lengths[:, None]
    for row, (start, end) in enumerate(pairwise(offsets)):
        batch[row, : end - start] = states[start:end]
    weights = mask * np.arange(1, max(lengths) + 1)
    return {
        "cls": batch[:, 0],
        "last": batch[np.arange(len(lengths)), lengths - 1],
        "max": np.where(mask[:, :, None], batch, -np.inf).max(axis=1),
        "mean": batch.sum(axis=1) / mask.sum(axis=1)[:, None],
        "mean_sqrt_len": batch.sum(axis=1) / np.sqrt(mask.sum(axis=1))[:, None],
        "weighted_mean": (batch * weights[:, :, None]).sum(axis=1) / weights.sum(axis=1)[:, None],
    }[mode]


@pytest.mark.parametrize("mode", MODES)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12), num_dims=st.integers(1, 37), data=st.data())
@settings(max_examples=20, deadline=None)
def test_arrays_and_tensors_pool_like_the_padded_reference(
    mode: str, lengths: list[int], num_dims: int, data: st.DataObject
) -> None:
    states, offsets = packed(lengths, num_dims)
    normalize = data.draw(st.booleans())
    kept = data.draw(st.integers(1, num_dims))
    expected = padded_reference(states, offsets, mode)[:, :kept]
    if normalize:
        expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    array = pool_normalize(states, offsets, mode=mode, normalize=normalize, truncate_dim=kept)
    tensor = pool_normalize(
        torch.from_numpy(states), torch.from_numpy(offsets), mode=mode, normalize=normalize, truncate_dim=kept
    )
    assert array.dtype == np.float32
    assert tensor.dtype == torch.float32
    np.testing.assert_allclose(array, expected, rtol=1e-6, atol=1e-6)
    # Float32 sums of at most 40 terms; a vector near zero is blown up by its norm.
    np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-4, atol=1e-4 / np.abs(expected).max())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_dims", [33, 384])
def test_a_segments_vector_has_the_same_bits_alone_and_among_others(mode: str, num_dims: int) -> None:
    states, offsets = packed([3, 1, 57, 256, 2, 19], num_dims)
    for source in (states, torch.from_numpy(states)):
        together = np.asarray(pool_normalize(source, offsets, mode=mode))
        for segment, (start, end) in enumerate(pairwise(offsets)):
            alone = pool_normalize(source[start:end], np.array([0, end - start]), mode=mode)
            np.testing.assert_array_equal(np.asarray(alone)[0], together[segment])


@pytest.mark.parametrize("mode", MODES)
def test_half_precision_states_and_results(mode: str) -> None:
    states, offsets = packed([5, 9], 16)
    half = states.astype(np.float16)
    from_array = pool_normalize(half, offsets, mode=mode, dtype="float16")
    from_tensor = pool_normalize(torch.from_numpy(half), offsets, mode=mode, dtype="float16")
    assert from_array.dtype == np.float16
    assert from_tensor.dtype == torch.float16
    np.testing.assert_allclose(from_array, from_tensor.numpy(), rtol=2e-3, atol=1e-3)
    bfloat16 = pool_normalize(torch.from_numpy(states).bfloat16(), offsets, mode=mode)
    assert bfloat16.dtype == torch.float32


@pytest.mark.parametrize("mode", MODES)
@given(lengths=st.lists(st.integers(1, 40), max_size=12), num_dims=st.integers(1, 37), data=st.data())
@settings(max_examples=20, deadline=None)
def test_int8_decodes_to_within_half_a_step(mode: str, lengths: list[int], num_dims: int, data: st.DataObject) -> None:
    states, offsets = packed(lengths, num_dims)
    normalize = data.draw(st.booleans())
    states *= 10.0 ** data.draw(st.integers(-30, 30))
    expected = reference.pooled(states, offsets, mode, normalize)
    for source in (states, torch.from_numpy(states)):
        codes, scale = pool_normalize(source, offsets, mode=mode, normalize=normalize, dtype="int8")
        codes, scale = np.asarray(codes), np.asarray(scale)
        assert codes.dtype == np.int8
        assert scale.dtype == np.float32
        assert codes.shape == expected.shape
        assert (np.abs(codes.astype(int)).max(axis=1, initial=0) == 127).all()
        # Float32 sums of at most 40 terms, in units of a step, which is 1/127 of the largest value.
        wide_scale = scale.astype(np.float64)[:, None]
        assert (np.abs(codes * wide_scale - expected) <= (0.5 + 0.02) * wide_scale).all()


@pytest.mark.parametrize("as_tensor", [False, True])
def test_int8_rounds_half_to_even_and_a_zero_vector_to_zeros(as_tensor: bool) -> None:
    states = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5], [0, 0, 0, 0, 0, 0], [-254, 1, 3, 5, -1, 127]], np.float32)
    source: Any = torch.from_numpy(states) if as_tensor else states
    codes, scale = pool_normalize(source, np.arange(4), mode="cls", normalize=False, dtype="int8")
    np.testing.assert_array_equal(np.asarray(scale), np.array([1, 0, 2], np.float32))
    np.testing.assert_array_equal(
        np.asarray(codes), [[127, 0, 2, 2, 0, -2], [0, 0, 0, 0, 0, 0], [-127, 0, 2, 2, 0, 64]]
    )


@pytest.mark.parametrize("num_dims", [1, 7, 8, 9, 33, 384])
def test_binary_is_packbits_of_the_signs(num_dims: int) -> None:
    states, offsets = packed([1] * 20, num_dims)
    states[3], states[5, 0] = 0.0, -0.0
    expected = np.packbits(states > 0, axis=1)
    for source in (states, torch.from_numpy(states)):
        for normalize in (False, True):
            bits = np.asarray(pool_normalize(source, offsets, mode="cls", normalize=normalize, dtype="binary"))
            assert bits.dtype == np.uint8
            np.testing.assert_array_equal(bits, expected)


def test_no_segments_give_no_vectors() -> None:
    states, offsets = np.empty((0, 7), np.float32), np.zeros(1, np.int64)
    for mode in MODES:
        assert pool_normalize(states, offsets, mode=mode).shape == (0, 7)
        assert pool_normalize(torch.from_numpy(states), offsets, mode=mode).shape == (0, 7)
        for source in (states, torch.from_numpy(states)):
            codes, scale = pool_normalize(source, offsets, mode=mode, dtype="int8")
            assert (codes.shape, scale.shape) == ((0, 7), (0,))
            assert pool_normalize(source, offsets, mode=mode, dtype="binary").shape == (0, 1)


def test_a_zero_vector_stays_zero() -> None:
    states, offsets = np.zeros((4, 3), np.float32), np.array([0, 1, 4])
    for source in (states, torch.from_numpy(states)):
        np.testing.assert_array_equal(np.asarray(pool_normalize(source, offsets, mode="mean")), np.zeros((2, 3)))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_wrong_arguments_are_named(as_tensor: bool) -> None:
    states, offsets = packed([2, 3], 4)
    states[4, 1] = 1e6
    source: Any = torch.from_numpy(states) if as_tensor else states
    with pytest.raises(ValueError, match="segment 1 holds 0"):
        pool_normalize(source, np.array([0, 2, 2, 5]), mode="mean")
    with pytest.raises(ValueError, match="segment 2 holds -1"):
        pool_normalize(source, np.array([0, 2, 4, 3, 5]), mode="mean")
    with pytest.raises(ValueError, match=r"number of tokens \(5\), got 0 to 4"):
        pool_normalize(source, np.array([0, 4]), mode="mean")
    with pytest.raises(ValueError, match="got 'median'"):
        pool_normalize(source, offsets, mode="median")
    with pytest.raises(ValueError, match=r"truncate_dim must be in 1..D \(4\), got 5"):
        pool_normalize(source, offsets, mode="mean", truncate_dim=5)
    with pytest.raises(ValueError, match="got 'int4'"):
        pool_normalize(source, offsets, mode="mean", dtype="int4")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"states must be a matrix \[T, D\], got \(5,\)"):
        pool_normalize(source[:, 0], offsets, mode="mean")
    with pytest.raises(ValueError, match=r"offsets must be int64 \[S \+ 1\], got float64"):
        pool_normalize(source, offsets.astype(np.float64), mode="mean")
    with pytest.raises(ValueError, match="segment 1 is not, in float16"):
        pool_normalize(source, offsets, mode="mean", normalize=False, dtype="float16")
    for value in (np.nan, np.inf, -np.inf):
        states[0, 0] = value
        for dtype in DTYPES:
            with pytest.raises(ValueError, match=f"segment 0 is not, in {dtype}"):
                pool_normalize(source, offsets, mode="mean", dtype=dtype)  # type: ignore[call-overload]


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e25])
def test_norms_beyond_float32_still_normalise(size: float) -> None:
    states = np.full((2, 3), size, np.float32)
    for source in (states, torch.from_numpy(states)):
        vectors = np.asarray(pool_normalize(source, np.array([0, 2]), mode="mean"))
        np.testing.assert_allclose(vectors, 3**-0.5, rtol=1e-6)

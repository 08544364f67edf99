from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import reference
from kernels.cuda.pool import MODES, pool_normalize

cupy = pytest.importorskip("cupy")
pytestmark = pytest.mark.gpu


def packed(
    lengths: list[int], num_dims: int, states: str
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[np.int64]]:
    """States in the given type, the same values for the reference, and offsets."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    x = np.random.default_rng(len(lengths)).standard_normal((int(offsets[-1]), num_dims), dtype=np.float32)
    if states == "bfloat16":
        bits = (x.view(np.uint32) >> 16).astype(np.uint16)
        return bits, (bits.astype(np.uint32) << 16).view(np.float32), offsets
    return x.astype(states), x.astype(states), offsets


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("states", ["float32", "float16", "bfloat16"])
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=9),
    num_dims=st.sampled_from([1, 7, 8, 24, 33, 384, 768]),
    data=st.data(),
)
@settings(max_examples=25, deadline=None)
def test_every_result_type_is_the_references(
    mode: str, states: str, lengths: list[int], num_dims: int, data: st.DataObject
) -> None:
    x, values, offsets = packed(lengths, num_dims, states)
    normalize = data.draw(st.booleans())
    kept = data.draw(st.one_of(st.none(), st.integers(1, num_dims)))
    expected = reference.pooled(values, offsets, mode, normalize, kept)
    given_offsets = cupy.asarray(offsets) if data.draw(st.booleans()) else offsets

    def found(dtype: str) -> Any:
        return pool_normalize(
            cupy.asarray(x), given_offsets, mode=mode, normalize=normalize, truncate_dim=kept, dtype=dtype
        )

    # Float32 sums of at most 60 terms, and a vector near zero is blown up by its norm; then float16's own rounding.
    tolerance = 1e-4 / max(float(np.abs(expected).max()), 1e-3)
    single = found("float32").get()
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, expected, rtol=1e-4, atol=tolerance)
    np.testing.assert_allclose(found("float16").get(), expected, rtol=2.0**-10, atol=tolerance + 2.0**-24)
    codes, scales = (part.get() for part in found("int8"))
    expected_codes, expected_scales = reference.quantized_int8(expected)
    assert np.abs(codes.astype(int) - expected_codes).max() <= 1
    np.testing.assert_allclose(scales, expected_scales, rtol=1e-4, atol=tolerance)
    np.testing.assert_array_equal(found("binary").get(), np.packbits(single > 0, axis=1))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_dims", [33, 384])
def test_a_segments_vector_has_the_same_bits_alone_and_among_others(mode: str, num_dims: int) -> None:
    x, _, offsets = packed([3, 1, 57, 256, 2, 19], num_dims, "float16")
    together = pool_normalize(cupy.asarray(x), cupy.asarray(offsets), mode=mode).get()
    for segment in range(6):
        alone = x[offsets[segment] : offsets[segment + 1]]
        vector = pool_normalize(cupy.asarray(alone), np.array([0, len(alone)]), mode=mode).get()
        np.testing.assert_array_equal(vector[0], together[segment])


def test_no_segments_and_zero_vectors() -> None:
    for mode in MODES:
        nothing = pool_normalize(cupy.empty((0, 7), cupy.float32), np.zeros(1, np.int64), mode=mode)
        assert nothing.shape == (0, 7)
    zeros = cupy.zeros((4, 3), cupy.float32)
    np.testing.assert_array_equal(pool_normalize(zeros, np.array([0, 1, 4]), mode="mean").get(), np.zeros((2, 3)))
    codes, scales = pool_normalize(zeros, np.array([0, 1, 4]), mode="mean", dtype="int8")
    assert not codes.get().any() and not scales.get().any()


def test_a_norm_beyond_float32_still_normalises() -> None:
    x = cupy.full((1, 64), 1e38, cupy.float32)
    np.testing.assert_allclose(pool_normalize(x, np.array([0, 1]), mode="mean").get(), np.full((1, 64), 0.125))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_tensor_on_the_device_is_pooled_where_it_lies(dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch has no CUDA device")
    x, _, offsets = packed([3, 1, 40], 64, "float32")
    states = torch.from_numpy(x).to(dtype)
    found = pool_normalize(states.cuda(), offsets, mode="mean").get()
    expected = reference.pooled(states.double().numpy(), offsets, "mean", True)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_wrong_arguments_are_named() -> None:
    x, _, offsets = packed([2, 3], 4, "float32")
    x[4, 1] = 1e6
    states = cupy.asarray(x)
    for wrong, message in (
        ([0, 2, 2, 5], "segment 1 holds 0"),
        ([0, 2, 4, 3, 5], "segment 2 holds -1"),
        ([0, 4], r"number of tokens \(5\), got 0 to 4"),
        ([1, 5], r"number of tokens \(5\), got 1 to 5"),
        ([0, 2, 9], r"number of tokens \(5\), got 0 to 9"),
    ):
        for place in (np.array, cupy.array):
            with pytest.raises(ValueError, match=message):
                pool_normalize(states, place(wrong), mode="mean")
    with pytest.raises(ValueError, match="got 'median'"):
        pool_normalize(states, offsets, mode="median")
    with pytest.raises(ValueError, match=r"truncate_dim must be in 1..D \(4\), got 5"):
        pool_normalize(states, offsets, mode="mean", truncate_dim=5)
    with pytest.raises(ValueError, match="got 'int4'"):
        pool_normalize(states, offsets, mode="mean", dtype="int4")
    with pytest.raises(ValueError, match="segment 1 is not, in float16"):
        pool_normalize(states, offsets, mode="mean", normalize=False, dtype="float16")
    states[0, 0] = np.nan
    for mode in ("mean", "max"):
        for dtype in ("float32", "int8", "binary"):
            with pytest.raises(ValueError, match=f"segment 0 is not, in {dtype}"):
                pool_normalize(states, offsets, mode=mode, dtype=dtype)

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import reference
from kernels.cuda.pq import pq_encode, pq_encode_residuals

cupy = pytest.importorskip("cupy")
pytestmark = pytest.mark.gpu

# Sub-vectors of one dimension, odd, of whole 16 bytes, and wider than registers hold; groups that M does not fill.
VARIANTS = [(1, 1, 8), (4, 8, 8), (5, 4, 8), (3, 7, 8), (2, 16, 8), (3, 24, 8), (7, 1, 4), (9, 16, 4), (8, 12, 4)]


def made(M: int, sub_dims: int, nbits: int, num_rows: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    rng = np.random.default_rng(num_rows)
    codebooks = rng.standard_normal((M, 1 << nbits, sub_dims), dtype=np.float32)
    codebooks[:, 7] = codebooks[:, 3]
    x = rng.standard_normal((num_rows, M * sub_dims), dtype=np.float32)
    x[:3] = codebooks[:, 7].reshape(-1)  # equally near to codewords 3 and 7
    return x, codebooks


@pytest.mark.parametrize(("M", "sub_dims", "nbits"), VARIANTS)
@given(num_rows=st.sampled_from([0, 1, 255, 256, 257, 1100]), dtype=st.sampled_from(["float32", "float16"]))
@settings(max_examples=12, deadline=None)
def test_codes_are_the_references_byte_for_byte(M: int, sub_dims: int, nbits: int, num_rows: int, dtype: str) -> None:
    x, codebooks = made(M, sub_dims, nbits, num_rows)
    half: npt.NDArray[Any] = x.astype(dtype)
    expected = reference.pq_encode(half, codebooks)
    np.testing.assert_array_equal(pq_encode(cupy.asarray(half), cupy.asarray(codebooks)).get(), expected)

    rng = np.random.default_rng(1)
    centroids = rng.standard_normal((11, M * sub_dims), dtype=np.float32)
    list_no = rng.integers(0, 11, num_rows).astype(np.int32)
    expected = reference.pq_encode(half.astype(np.float32) - centroids[list_no], codebooks)
    arrays = (cupy.asarray(array) for array in (half, centroids, list_no, codebooks))
    np.testing.assert_array_equal(pq_encode_residuals(*arrays).get(), expected)


def test_wrong_rows_and_arguments_are_named() -> None:
    x, codebooks = made(4, 8, 8, 60)
    on_device = cupy.asarray(codebooks)
    for value in (np.nan, -np.inf):
        wrong = x.copy()
        wrong[21, 31] = wrong[40, 0] = value
        with pytest.raises(ValueError, match="row 21 holds"):
            pq_encode(cupy.asarray(wrong), on_device)
    wrong = x.copy()
    wrong[9, 2] = 3e38
    with pytest.raises(ValueError, match="those of row 9 are not"):
        pq_encode(cupy.asarray(wrong), on_device * 100)
    with pytest.raises(ValueError, match=r"D of the codebooks \(32\), got 31"):
        pq_encode(cupy.asarray(x[:, :31]), on_device)
    with pytest.raises(ValueError, match="codebooks must be float32"):
        pq_encode(cupy.asarray(x), on_device[:, :100])
    centroids, list_no = cupy.zeros((5, 32), cupy.float32), cupy.full(60, 5, cupy.int32)
    with pytest.raises(ValueError, match=r"in 0\.\.4, got 5 to 5"):
        pq_encode_residuals(cupy.asarray(x), centroids, list_no, on_device)
    with pytest.raises(ValueError, match=r"list_no_N int32 \[60\]"):
        pq_encode_residuals(cupy.asarray(x), centroids, list_no[:59], on_device)

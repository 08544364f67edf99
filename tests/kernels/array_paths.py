"""What the property tests share: the paths that an array can take through the kernels, and the arrays that they draw."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from kernels import assign, hamming, minhash, pq_codewords

Array = npt.NDArray[Any]

UNIT_ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11}
# Half of the smallest step between the numbers around zero.
UNDERFLOW = {"float32": 2.0**-150, "float16": 2.0**-25}
GPU = pytest.param("cupy", marks=pytest.mark.gpu)
# Functions that say None where numba is absent; a module may have one by another's import.
COMPILED = {
    function.__name__
    for function in (
        assign.compiled_assign,
        pq_codewords.compiled_pq,
        hamming.compiled_hamming,
        minhash.compiled_segments,
    )
}
metrics = pytest.mark.parametrize("metric", ["ip", "l2"])
# Paths of the kernels that a CuPy array chooses a device kernel for, and of those that the host alone has.
everywhere = pytest.mark.parametrize("path", ["compiled", "numpy", GPU])
on_the_host = pytest.mark.parametrize("path", ["compiled", "numpy"])
few = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@contextlib.contextmanager
def taken(path: str) -> Iterator[None]:
    """Has the kernels take that path; skips the test where it is not to be had."""
    with pytest.MonkeyPatch.context() as patch:
        if path == "numpy":
            modules = [module for name, module in list(sys.modules.items()) if name.startswith("kernels.")]
            holders = [(module, name) for module in modules for name in COMPILED if name in vars(module)]
            assert {name for _, name in holders} == COMPILED
            for module, name in holders:
                patch.setattr(module, name, lambda: None)
        elif path == "compiled":
            pytest.importorskip("numba")
        yield


def moved(path: str, array: Array) -> Any:
    """The array where the path wants it."""
    return pytest.importorskip("cupy").asarray(array) if path == "cupy" else array


def fetched(result: Any) -> Any:
    """The result, or every one of a tuple, as NumPy arrays."""
    if isinstance(result, tuple):
        return tuple(fetched(part) for part in result)
    return result.get() if hasattr(result, "get") else np.asarray(result)


def assert_same(got: Any, expected: Any) -> None:
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


@st.composite
def matrices(
    draw: st.DrawFn, num_rows: int, num_dims: int, *, kinds: str = "normal integers repeated tiny big"
) -> Array:
    """Rows of float32 or float16: ordinary, small integers (many ties), few different ones, near zero, large."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(kinds.split()))
    x = rng.standard_normal((num_rows, num_dims))
    if kind == "integers":
        x = rng.integers(-2, 3, (num_rows, num_dims)).astype(np.float64)
    elif kind == "repeated" and num_rows:
        x = x[rng.integers(0, min(num_rows, 3), num_rows)]
    elif kind in ("tiny", "big"):
        x *= 1e-3 if kind == "tiny" else 1e3
    return x.astype(draw(st.sampled_from([np.float32, np.float32, np.float16])))


@st.composite
def segments(draw: st.DrawFn) -> npt.NDArray[np.int64]:
    lengths = draw(st.one_of(st.just([]), st.lists(st.integers(1, 40), min_size=1, max_size=9)))
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


# D around multiples of 8 and of 16 bytes as well as anything else.
dims = st.one_of(st.integers(1, 40), st.sampled_from([7, 8, 9, 15, 16, 17, 63, 64, 65, 129]))

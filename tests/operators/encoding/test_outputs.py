"""Representations of one vector: what is asked for, what is refused, what the numbers mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.pool import pool_normalize
from operators import schemas
from operators.encoding.outputs import RESERVED, Output, parse_outputs, represent
from operators.errors import ConfigError

VECTORS = np.random.default_rng(0).standard_normal((50, 33), dtype=np.float32)


def test_outputs_are_read_in_the_order_of_the_setting() -> None:
    found = parse_outputs(("vector_128=128:float16", "bits=384:binary", " i8 = 64 : int8 "), 384)
    assert found == (Output("vector_128", 128, "float16"), Output("bits", 384, "binary"), Output("i8", 64, "int8"))
    assert parse_outputs((), 384) == ()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (("bits",), "must be name=dimensions:type, .* got 'bits'"),
        (("bits=384",), "got 'bits=384'"),
        (("bits=-1:binary",), "got 'bits=-1:binary'"),
        (("1st=8:int8",), "letters, digits and _, got '1st'"),
        (("vector=8:int8",), "'vector' is another column's"),
        (("a=8:int8", "a=9:int8"), "'a' is another column's, in 'a=9:int8'"),
        (("a=8:int8", "a_scale=9:float16"), "'a_scale' is another column's"),
        (("a_scale=9:float16", "a=8:int8"), "'a' is another column's"),
        (("a=0:int8",), r"in 1\.\.384 \(the model's\), got 0"),
        (("a=385:int8",), "got 385 in 'a=385:int8'"),
        (("a=8:int4",), "one of float16, float32, int8, binary, got 'int4'"),
    ],
)
def test_an_output_that_cannot_be_had_is_named(values: tuple[str, ...], reason: str) -> None:
    with pytest.raises(ConfigError, match=f"encode.outputs.*{reason}"):
        parse_outputs(values, 384)


def test_every_column_of_an_encoded_piece_is_reserved() -> None:
    assert set(schemas.committed(8).names) | set(schemas.CHUNKS.names) <= set(RESERVED)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "binary"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_representations_are_those_of_the_pooling_kernel(dtype: str, renormalize: bool) -> None:
    each = torch.arange(len(VECTORS) + 1).numpy()
    expected = pool_normalize(VECTORS, each, mode="cls", normalize=renormalize, truncate_dim=20, dtype=dtype)  # type: ignore[call-overload]
    found = represent(VECTORS, 20, dtype, renormalize)
    pairs = zip(found, expected, strict=True) if dtype == "int8" else [(found, expected)]
    for ours, theirs in pairs:
        assert ours.dtype == theirs.dtype
        assert ours.flags.c_contiguous
        np.testing.assert_array_equal(ours, theirs)


def test_leading_dimensions_have_unit_length_again() -> None:
    np.testing.assert_allclose(np.linalg.norm(represent(VECTORS, 7, "float32", True), axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(represent(VECTORS, 7, "float32", False), VECTORS[:, :7])


def test_a_zero_vector_stays_zero_in_every_type() -> None:
    zeros = np.zeros((2, 9), np.float32)
    for dtype in ("float32", "float16", "binary"):
        assert not represent(zeros, 8, dtype, True).any()
    codes, scale = represent(zeros, 8, "int8", True)
    assert not codes.any()
    assert not scale.any()


def test_no_vectors_have_every_representation() -> None:
    none = VECTORS[:0]
    assert represent(none, 20, "float16", True).shape == (0, 20)
    assert represent(none, 20, "binary", True).shape == (0, 3)
    codes, scale = represent(none, 20, "int8", True)
    assert (codes.shape, scale.shape) == ((0, 20), (0,))

"""Several representations of one vector: leading dimensions of it, in a smaller type. NumPy only.

Shapes: N vectors, D dimensions, K kept ones, B = ceil(K / 8) bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from operators.errors import ConfigError

DTYPES = ("float16", "float32", "int8", "binary")

# Columns that encoded rows have anyway, or get later.
RESERVED = (
    "doc_id",
    "chunk_no",
    "start",
    "end",
    "text",
    "source",
    "row",
    "row_id",
    "list_no",
    "text_hash",
    "doc_hash",
    "input_ids",
    "pool_start",
    "pool_end",
    "vector",
)

_FORM = "name=dimensions:type, for example vector_128=128:float16"


@dataclasses.dataclass(frozen=True)
class Output:
    """One further column: the leading `dim` dimensions of each vector, as `dtype` (one of DTYPES)."""

    name: str
    dim: int
    dtype: str


def parse_outputs(values: Sequence[str], d: int) -> tuple[Output, ...]:
    """Outputs out of the setting `encode.outputs`, in its order. d: the model's dimensions.

    Raises ConfigError that says which value is wrong: its form, a name that is not an identifier, is given twice or is
    one of RESERVED, dimensions outside of 1..d, or an unknown type. An int8 output takes
    a second name, `<name>_scale`.
    """
    outputs: list[Output] = []
    taken = set(RESERVED)
    for value in values:
        name, equals, rest = value.partition("=")
        size, colon, dtype = rest.partition(":")
        if not (equals and colon and size.strip().isascii() and size.strip().isdigit()):
            raise ConfigError(f"encode.outputs must be {_FORM}, got {value!r}")
        name, dim, dtype = name.strip(), int(size), dtype.strip()
        if not (name.isidentifier() and name.isascii()):
            raise ConfigError(f"encode.outputs: a name must be letters, digits and _, got {name!r} in {value!r}")
        if name in taken or (dtype == "int8" and f"{name}_scale" in taken):
            raise ConfigError(f"encode.outputs: a name must be unused, {name!r} is another column's, in {value!r}")
        if not 1 <= dim <= d:
            raise ConfigError(f"encode.outputs: dimensions must be in 1..{d} (the model's), got {dim} in {value!r}")
        if dtype not in DTYPES:
            raise ConfigError(f"encode.outputs: a type must be one of {', '.join(DTYPES)}, got {dtype!r} in {value!r}")
        taken.update((name, f"{name}_scale") if dtype == "int8" else (name,))
        outputs.append(Output(name, dim, dtype))
    return tuple(outputs)


def represent(vectors_ND: npt.NDArray[np.float32], dim: int, dtype: str, renormalize: bool) -> Any:
    """The leading `dim` dimensions of each vector as `dtype`, C order; of unit length again if `renormalize`.

    "float16", "float32": [N, K]. "binary": uint8 [N, B], bit 1 where a value is > 0, the first dimension in the highest
    bit, as numpy.packbits has it. "int8": (codes int8 [N, K], scale float32 [N]) as kernels.pool has them: a vector is
    about scale * codes, scale = max |v| / 127, codes rounded half to even; both are 0 for a zero vector. A zero vector
    is not renormalised. Each vector depends on itself alone.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    kept_NK: npt.NDArray[Any] = vectors_ND[:, :dim]
    if dtype == "binary":
        return np.packbits(kept_NK > 0, axis=1)
    if renormalize:
        kept_NK = kept_NK.astype(np.float64)
        norms_N1 = np.sqrt(np.square(kept_NK).sum(axis=1, keepdims=True))
        kept_NK = kept_NK / np.where(norms_N1 > 0, norms_N1, 1.0)
    if dtype != "int8":
        return np.ascontiguousarray(kept_NK, dtype=dtype)
    largest_N = np.abs(kept_NK).max(axis=1, initial=0.0).astype(np.float64)
    scale_N = (largest_N / 127.0).astype(np.float32)
    divisor_N = np.where(scale_N > 0, largest_N, np.inf)  # a scale that float32 cannot hold is 0, and so are the codes
    return np.rint(kept_NK / divisor_N[:, None] * 127.0).astype(np.int8), scale_N

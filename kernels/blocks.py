"""Rows in blocks of one fixed shape, and the checks that every kernel makes of its input.

Shapes: N rows, B rows of a block, D dimensions, E = D or D + 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

METRICS = ("ip", "l2")


def padded_blocks(
    x_ND: npt.NDArray[Any], block_rows: int, *, ones_column: bool = False
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(start, stop, float32 tensor [block_rows, E]) over the rows; rows beyond stop - start are zeros.

    The tensor is one buffer, refilled at every step: be done with it before the next. `ones_column` appends a column
    of ones.
    """
    num_rows, num_dims = x_ND.shape
    # A tensor of torch's own is 64-byte aligned, without which MKL does not promise the same bits from run to run.
    block_BE = torch.zeros((block_rows, num_dims + ones_column), dtype=torch.float32)
    view_BE = block_BE.numpy()
    if ones_column:
        view_BE[:, num_dims] = 1.0
    for start in range(0, num_rows, block_rows):
        stop = min(start + block_rows, num_rows)
        view_BE[: stop - start, :num_dims] = x_ND[start:stop]
        view_BE[stop - start :, :num_dims] = 0.0
        yield start, stop, block_BE


def on_device(array: Any) -> bool:
    """True for an array in a CUDA device's memory, as CuPy and torch declare it."""
    return not isinstance(array, np.ndarray) and hasattr(array, "__cuda_array_interface__")


def to_host(array: Any) -> npt.NDArray[Any]:
    """The array in the host's memory: itself, or a copy of a CuPy array."""
    return np.asarray(array.get() if on_device(array) else array)


def check_metric(metric: str) -> None:
    """Raises ValueError unless the metric is "ip" or "l2"."""
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")


def check_matrix(name: str, x_ND: npt.NDArray[Any]) -> None:
    """Raises ValueError unless the array is a float32 or float16 matrix with D of at least 1."""
    if x_ND.ndim != 2 or x_ND.shape[1] == 0 or x_ND.dtype not in (np.float32, np.float16):
        raise ValueError(f"{name} must be a float32 or float16 matrix with D >= 1, got {x_ND.dtype} {x_ND.shape}")


def check_same_dims(name: str, x_ND: npt.NDArray[Any], other: str, num_dims: int) -> None:
    """Raises ValueError unless the matrix has `num_dims` columns, as `other` has."""
    if x_ND.shape[1] != num_dims:
        raise ValueError(f"{name} must have the D of {other} ({num_dims}), got {x_ND.shape[1]}")


def check_finite(kind: str, x_ND: npt.NDArray[Any], first: int = 0) -> None:
    """Raises ValueError that names the first row, counted from `first`, that holds a NaN or an infinity."""
    finite_N = np.isfinite(x_ND).all(axis=1)
    if not finite_N.all():
        raise ValueError(
            f"{kind}s must be finite: {kind} {first + int(np.argmin(finite_N))} holds a NaN or an infinity"
        )


def check_scores(scores_BK: npt.NDArray[Any], x_ND: npt.NDArray[Any], start: int) -> None:
    """Raises ValueError that names the first row, counted from `start` in x_ND, with a score that is not finite.

    A row that holds a NaN or an infinity has no finite score at all, so looking at its scores finds it.
    """
    if np.isfinite(scores_BK).all():
        return
    finite_B = np.isfinite(scores_BK).reshape(len(scores_BK), -1).all(axis=1)
    row = start + int(np.argmin(finite_B))
    check_finite("row", x_ND[row : row + 1], row)
    raise ValueError(f"scores must be within float32: those of row {row} are not (its values are too large)")

"""Arrays on the device as the kernels want them, and the place where a kernel notes the first row that it finds wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kernels.blocks import check_finite

# Element kinds of the sources (PRELUDE): the same numbers.
FLOAT32, FLOAT16, BFLOAT16 = range(3)
NOT_FOUND = (1 << 64) - 1


def as_device(name: str, array: Any) -> Any:
    """The array as a C-contiguous CuPy array: a CuPy array or a CUDA tensor; bfloat16 as its bits, uint16.

    Shares the memory where it can. Raises ValueError for an array on the host or on another than the current device.
    """
    import cupy

    if isinstance(array, torch.Tensor) and array.is_cuda:
        if array.dtype == torch.bfloat16:
            found = cupy.asarray(array.detach().view(torch.int16)).view(cupy.uint16)
        else:
            found = cupy.asarray(array.detach())
    elif isinstance(array, cupy.ndarray):
        found = array.view(cupy.uint16) if array.dtype.name == "bfloat16" else array
    else:
        raise ValueError(
            f"{name} must be on the device like the other arrays, got {type(array).__name__}: copy it there"
        )
    current = cupy.cuda.runtime.getDevice()
    if found.device.id != current:
        raise ValueError(
            f"{name} must be on the current device ({current}), got device {found.device.id}: make that the current one"
        )
    return cupy.ascontiguousarray(found)


def float_matrix(name: str, array: Any, *, bfloat16: bool = False) -> tuple[Any, int]:
    """(C-contiguous CuPy matrix, its kind): float32, float16 or, where allowed, bfloat16 as its bits."""
    found = as_device(name, array)
    kinds = {"float32": FLOAT32, "float16": FLOAT16} | ({"uint16": BFLOAT16} if bfloat16 else {})
    if found.ndim != 2 or found.shape[1] == 0 or found.dtype.name not in kinds:
        allowed = "float32, float16 or bfloat16" if bfloat16 else "float32 or float16"
        raise ValueError(f"{name} must be a {allowed} matrix with D >= 1, got {found.dtype} {found.shape}")
    return found, kinds[found.dtype.name]


def no_rows_found(number: int) -> Any:
    """uint64 [number] of NOT_FOUND, into which kernels write the lowest wrong row by atomicMin."""
    import cupy

    return ~cupy.zeros(number, cupy.uint64)


def check_found(found: Any, x_ND: Any) -> None:
    """Raises ValueError as kernels.blocks does; found: [first row that is not finite, first with such a score]."""
    row, scored = (int(value) for value in found.get())
    if row != NOT_FOUND:
        check_finite("row", np.asarray(x_ND[row : row + 1].get()), row)
    if scored != NOT_FOUND:
        raise ValueError(f"scores must be within float32: those of row {scored} are not (its values are too large)")

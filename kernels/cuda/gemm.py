"""Tiles of scores by cuBLAS, with the precision of the products stated in every call.

Shapes: B rows of a block, C columns of a tile (centroids), E columns of both operands.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# cudaDataType_t, cublasComputeType_t, cublasMath_t, cublasGemmAlgo_t and cublasOperation_t of library_types.h and cublas_api.h (CUDA 11 and later).
CUDA_R_32F, CUDA_R_16BF = 0, 14
COMPUTE_32F, COMPUTE_32F_FAST_TF32 = 68, 77
DEFAULT_MATH, GEMM_DEFAULT, OP_N, OP_T = 0, -1, 0, 1
# cuBLAS reads its two factors, 1 and 0, from the host's memory.
_FACTORS = np.array([1.0, 0.0], np.float32)
_ONE, _ZERO = _FACTORS.ctypes.data, _FACTORS.ctypes.data + 4


def score_tile(x_BE: Any, centroids_CE: Any, out_BC: Any, *, precision: str) -> Any:
    """Inner products float32 [B, C] into out_BC: sums in float32, of float32, tf32 or (operands uint16 bits) bfloat16.

    C-contiguous CuPy arrays. "float32" is without tensor cores whatever the process has allowed elsewhere. Runs on the
    current stream.
    """
    import cupy
    from cupy_backends.cuda.libs import cublas

    operand = CUDA_R_16BF if precision == "bf16" else CUDA_R_32F
    compute = COMPUTE_32F_FAST_TF32 if precision == "tf32" else COMPUTE_32F
    num_rows, num_columns = out_BC.shape
    depth = x_BE.shape[1]
    handle = cupy.cuda.device.get_cublas_handle()
    math_mode = cublas.getMathMode(handle)
    cublas.setMathMode(handle, DEFAULT_MATH)
    try:
        # cuBLAS counts in columns: its C is the transpose of out_BC, centroids (transposed) times rows.
        cublas.gemmEx(
            *(handle, OP_T, OP_N, num_columns, num_rows, depth, _ONE),
            *(centroids_CE.data.ptr, operand, depth, x_BE.data.ptr, operand, depth, _ZERO),
            *(out_BC.data.ptr, CUDA_R_32F, num_columns, compute, GEMM_DEFAULT),
        )
    finally:
        cublas.setMathMode(handle, math_mode)
    return out_BC

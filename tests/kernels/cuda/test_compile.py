"""Every CUDA source compiles, without a GPU or a driver, into code that keeps its values in registers."""

from __future__ import annotations

import numpy as np
import pytest

from kernels.cuda.arrays import BFLOAT16, FLOAT16, FLOAT32
from kernels.cuda.assign_fused import SHARED_BYTES, TILE_CENTROIDS, TILE_DIMS, TILE_ROWS
from kernels.cuda.compile import compile_cubin, resources
from kernels.cuda.pool import DTYPES_ON_DEVICE, MAX_DIMS, MODES_ON_DEVICE, launch_shape
from kernels.cuda.sources import SOURCES, Source
from kernels.pool import DTYPES, MODES

pytest.importorskip("cupy")

CASES = [pytest.param(source, arch, id=f"{source.name}-{arch}") for source in SOURCES for arch in source.architectures]


@pytest.mark.parametrize(("source", "arch"), CASES)
def test_a_source_compiles_without_spills_local_memory_or_warnings(source: Source, arch: str) -> None:
    cubin, log = compile_cubin(source.source, arch, source.options)
    assert cubin[:4] == b"\x7fELF"
    assert "warning" not in log.lower(), log
    # The assembler's notes that matrix instructions are serialised, or a register request ignored.
    assert "performance loss" not in log.lower() and "setmaxnreg ignored" not in log.lower(), log
    found = resources(log)
    assert set(found) == set(source.kernels)
    for name, used in found.items():
        assert (used.stack_bytes, used.spill_bytes) == (0, 0), f"{name}: {used}"


def test_a_source_that_does_not_compile_shows_the_compilers_words() -> None:
    with pytest.raises(RuntimeError, match='identifier "undefined_name" is undefined'):
        compile_cubin('extern "C" __global__ void broken() { undefined_name = 1; }', "sm_90")


def test_a_spill_or_a_local_array_is_seen() -> None:
    source = r"""
extern "C" __global__ void local_array(const float* x, float* y, int i) {
    float values[64];
    for (int k = 0; k < 64; ++k) values[k] = x[k] * y[k];
    y[threadIdx.x] = values[i];
}"""
    used = resources(compile_cubin(source, "sm_90")[1])["local_array"]
    assert used.stack_bytes > 0


@pytest.mark.parametrize("kind", [FLOAT32, FLOAT16, BFLOAT16])
@pytest.mark.parametrize("one_token", [False, True])
def test_a_pooling_launch_fits_the_block_and_its_shared_memory(kind: int, one_token: bool) -> None:
    for num_dims in (1, 7, 8, 63, 64, 384, 768, 1000, 1024, 4096, MAX_DIMS):
        for address in (0, 4):
            vector, lanes, groups, threads, shared = launch_shape(kind, num_dims, num_dims, address, one_token)
            assert lanes * groups <= threads <= 256 and threads % 32 == 0
            assert groups * -(-num_dims // vector) * vector * 4 == shared <= 48 * 1024 - 256


def test_the_kernels_numbers_of_modes_and_types_cover_the_hosts() -> None:
    assert sorted(MODES_ON_DEVICE) == sorted(MODES)
    assert sorted(DTYPES_ON_DEVICE) == sorted(DTYPES)


def test_the_fused_kernel_fits_a_multiprocessor() -> None:
    assert SHARED_BYTES <= 227 * 1024  # of compute capability 9.0 for a block
    # Accumulators of the two multiplying warpgroups; 64 x 256 a warpgroup, 128 threads.
    assert TILE_ROWS * TILE_CENTROIDS / 256 == 128
    # A row of a tile is the 128 bytes that the swizzle permutes.
    assert TILE_DIMS * np.dtype(np.uint16).itemsize == 128

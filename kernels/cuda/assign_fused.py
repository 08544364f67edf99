"""Nearest centroids by one kernel that multiplies on Hopper's tensor cores and keeps each row's best in registers.

Shapes: N rows, B rows of a block, K centroids, D dimensions, E = D rounded up to a multiple of 64.

The tiled path writes every score to memory and reads it again: 8 bytes for each 2 E operations. Here the scores never
leave the registers: a block of threads holds 128 rows x 256 centroids of them, while tiles of both operands stream
through shared memory.

Walk of the kernel. Warpgroup 0 copies: for each step (256 centroids x 64 dimensions) it waits until a stage of shared
memory is free, and starts two plain bulk copies, as `prepare_rows` has laid both operands out tile by tile in the
swizzled order that tensor cores read. Warpgroups 1 and 2 multiply 64 of the rows each, and when the dimensions of 256
centroids are through, compare: a thread has two rows, and of each the columns of two classes (kernels/cuda/argmax.py),
so it keeps four best scores and columns. `full` and `empty` barriers of a stage order copies and reads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kernels.assign import UNIT_ROUNDOFF_32
from kernels.cuda import argmax
from kernels.cuda.arrays import FLOAT32, no_rows_found
from kernels.cuda.compile import kernel

if TYPE_CHECKING:
    from kernels.cuda.assign import Prepared

ARCH = "sm_90a"  # the matrix instructions are this architecture's own
COMPUTE_CAPABILITY = "90"
TILE_ROWS, TILE_CENTROIDS, TILE_DIMS, STAGES = 128, 256, 64, 4
STAGE_BYTES = (TILE_ROWS + TILE_CENTROIDS) * TILE_DIMS * 2
SHARED_BYTES = STAGES * STAGE_BYTES + 1024 + 16 * STAGES  # 1024: the stages are aligned to it
THREADS = 384
# Rows prepared at a time: this many for each multiprocessor keep whole waves of blocks, and their copy small.
WAVES = 8

_ACCUMULATORS = 128
_REGISTERS = ", ".join(f"%{i}" for i in range(_ACCUMULATORS))
_OUTPUTS = ", ".join(f'"+f"(sums[{i}])' for i in range(_ACCUMULATORS))

# PTX instructions, each behind a name: what they do is stated in the PTX ISA under theirs.
INSTRUCTIONS = rf"""
#define WAIT_LIMIT (1u << 26)

__device__ __forceinline__ u32 shared_address(const void* pointer) {{ return (u32)__cvta_generic_to_shared(pointer); }}

__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}}

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void barrier_init_fence() {{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {{
    asm volatile("{{ .reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0]; }}" ::"r"(barrier) : "memory");
}}

__device__ __forceinline__ void barrier_arrive_expecting(u32 barrier, u32 bytes) {{
    asm volatile("{{ .reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1; }}"
                 ::"r"(barrier), "r"(bytes) : "memory");
}}

// Waits for the end of the phase of this parity; a wait without end becomes an error.
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {{
#pragma unroll 1
    for (u32 tries = 0; tries < WAIT_LIMIT; ++tries) {{
        u32 done;
        asm volatile(
            "{{ .reg .pred done; mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2; selp.u32 %0, 1, 0, done; }}"
            : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
        if (done) return;
    }}
    __trap();
}}

__device__ __forceinline__ void bulk_copy(u32 target, const void* source, u32 bytes, u32 barrier) {{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(target), "l"(__cvta_generic_to_global(source)), "r"(bytes), "r"(barrier) : "memory");
}}

// Descriptor of a tile of 128-byte rows with 128-byte swizzle: address / 16, and 1024 bytes from 8 rows to the next 8.
__device__ __forceinline__ u64 tile_descriptor(u32 address) {{
    return (u64)((address & 0x3ffffu) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}}

// sums (64 x 256) = a (64 x 16) times b (256 x 16) transposed, plus sums if `accumulate`.
__device__ __forceinline__ void multiply(float (&sums)[{_ACCUMULATORS}], u64 a, u64 b, int accumulate) {{
    asm volatile(
        "{{ .reg .pred p; setp.ne.b32 p, %{_ACCUMULATORS + 2}, 0; "
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {{{_REGISTERS}}}, "
        "%{_ACCUMULATORS}, %{_ACCUMULATORS + 1}, p, 1, 1, 0, 0; }}"
        : {_OUTPUTS} : "l"(a), "l"(b), "r"(accumulate));
}}

__device__ __forceinline__ void multiply_fence() {{ asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }}
__device__ __forceinline__ void multiply_commit() {{ asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }}

template <int PENDING> __device__ __forceinline__ void multiply_wait() {{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}}

// Keeps the compiler from reading the sums before the wait above it.
__device__ __forceinline__ void sums_are_written(float (&sums)[{_ACCUMULATORS}]) {{
    asm volatile("" : {_OUTPUTS} :: "memory");
}}

__device__ __forceinline__ void keep_few_registers() {{ asm volatile("setmaxnreg.dec.sync.aligned.u32 40;"); }}
__device__ __forceinline__ void take_many_registers() {{ asm volatile("setmaxnreg.inc.sync.aligned.u32 232;"); }}
"""

SOURCE = (
    INSTRUCTIONS
    + rf"""
#define STAGES {STAGES}
#define ROWS_BYTES {TILE_ROWS * TILE_DIMS * 2}
#define CENTROIDS_BYTES {TILE_CENTROIDS * TILE_DIMS * 2}
#define STAGE_BYTES {STAGE_BYTES}
"""
    + r"""
extern "C" __global__ void __launch_bounds__(384, 1) assign_fused(
    const u8* __restrict__ row_tiles, const u8* __restrict__ centroid_tiles, const float* __restrict__ bias,
    int num_chunks, int num_centroid_tiles, int num_rows, float* __restrict__ best, int* __restrict__ column) {
    extern __shared__ u8 memory[];
    const u32 stages = (shared_address(memory) + 1023u) & ~1023u;
    const u32 full = stages + STAGES * STAGE_BYTES, empty = full + 8 * STAGES;
    const int warpgroup = threadIdx.x / 128;
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) {
            barrier_init(full + 8 * s, 1);   // the copying thread
            barrier_init(empty + 8 * s, 8);  // the multiplying warps
        }
        barrier_init_fence();
    }
    __syncthreads();

    int stage = 0;
    u32 parity = 0;
    if (warpgroup == 0) {
        keep_few_registers();
        if (threadIdx.x == 0) {
            const u8* rows = row_tiles + (i64)blockIdx.x * num_chunks * ROWS_BYTES;
            const u8* centroids = centroid_tiles;
            for (int tile = 0; tile < num_centroid_tiles; ++tile) {
                for (int chunk = 0; chunk < num_chunks; ++chunk) {
                    // The phase before the first counts as ended: the first round does not wait.
                    barrier_wait(empty + 8 * stage, parity ^ 1u);
                    const u32 target = stages + stage * STAGE_BYTES, barrier = full + 8 * stage;
                    barrier_arrive_expecting(barrier, STAGE_BYTES);
                    bulk_copy(target, rows + (i64)chunk * ROWS_BYTES, ROWS_BYTES, barrier);
                    bulk_copy(target + ROWS_BYTES, centroids, CENTROIDS_BYTES, barrier);
                    centroids += CENTROIDS_BYTES;
                    if (++stage == STAGES) stage = 0, parity ^= 1u;
                }
            }
        }
    } else {
        take_many_registers();
        const int lane = threadIdx.x % 32, pair = lane % 4;
        float sums[128], top[4];
        int place[4];
#pragma unroll
        for (int i = 0; i < 128; ++i) sums[i] = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i) top[i] = minus_infinity(), place[i] = 0x7fffffff;
        for (int tile = 0; tile < num_centroid_tiles; ++tile) {
            int before = 0;
            for (int chunk = 0; chunk < num_chunks; ++chunk) {
                barrier_wait(full + 8 * stage, parity);
                const u32 source = stages + stage * STAGE_BYTES;
                const u64 a = tile_descriptor(source + (warpgroup - 1) * (ROWS_BYTES / 2));
                const u64 b = tile_descriptor(source + ROWS_BYTES);
                multiply_fence();
#pragma unroll
                for (int k = 0; k < 4; ++k) multiply(sums, a + 2 * k, b + 2 * k, chunk | k);  // 16 columns: 32 bytes
                multiply_commit();
                if (chunk > 0) {
                    multiply_wait<1>();  // of the chunk before, whose stage is free then
                    if (lane == 0) barrier_arrive(empty + 8 * before);
                }
                before = stage;
                if (++stage == STAGES) stage = 0, parity ^= 1u;
            }
            multiply_wait<0>();
            sums_are_written(sums);
            if (lane == 0) barrier_arrive(empty + 8 * before);

            // sums[4 j + 2 h + e] is row lane / 4 + 8 h, column 8 j + 2 pair + e of this warp's 16 x 256.
            const float* shift = bias + tile * 256 + 2 * pair;
            float most[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) most[i] = minus_infinity();
#pragma unroll
            for (int j = 0; j < 32; ++j) {
                const float2 plus = *reinterpret_cast<const float2*>(shift + 8 * j);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    sums[4 * j + i] += i % 2 ? plus.y : plus.x;
                    most[i] = fmaxf(most[i], sums[4 * j + i]);
                }
            }
            // Which column it is matters only where a best changes, which becomes rare.
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (most[i] > top[i]) {
                    int found = 0;
#pragma unroll
                    for (int j = 31; j >= 0; --j) found = sums[4 * j + i] == most[i] ? j : found;
                    top[i] = most[i];
                    place[i] = tile * 256 + 8 * found + 2 * pair + i % 2;
                }
            }
        }
        const int warp = threadIdx.x / 32 - 4;  // of the eight multiplying ones
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = blockIdx.x * 128 + warp * 16 + lane / 4 + 8 * (i / 2);
            if (row < num_rows) {
                best[(i64)row * 8 + 2 * pair + i % 2] = top[i];
                column[(i64)row * 8 + 2 * pair + i % 2] = place[i];
            }
        }
    }
}
"""
)


def assign_bf16(x_ND: Any, kind: int, prepared: Prepared, list_no_N: Any, found: Any, operand_roundoff: float) -> None:
    """Fills list_no_N (int32) with the nearest centroids as kernels.cuda.assign states it for "bf16"."""
    import cupy

    from kernels.cuda.assign import error_bound

    num_rows, num_dims = x_ND.shape
    num_padded = -(-num_dims // TILE_DIMS) * TILE_DIMS
    centroid_tiles, bias_K = tiles_of_centroids(prepared, num_padded)
    multiprocessors = cupy.cuda.Device().attributes["MultiProcessorCount"]
    rows = min(WAVES * multiprocessors * TILE_ROWS, -(-num_rows // TILE_ROWS) * TILE_ROWS)
    row_tiles = cupy.empty((rows, num_padded), cupy.uint16)
    norms_B = cupy.empty(rows, cupy.float32)
    best_B8 = cupy.empty((rows, argmax.NUM_CLASSES), cupy.float32)
    column_B8 = cupy.empty((rows, argmax.NUM_CLASSES), cupy.int32)
    slope, offset = error_bound(prepared, UNIT_ROUNDOFF_32, operand_roundoff)
    launch = kernel(SOURCE, "assign_fused", arch=ARCH, shared_bytes=SHARED_BYTES)
    for start in range(0, num_rows, rows):
        count = min(rows, num_rows - start)
        num_tiles = -(-count // TILE_ROWS)
        argmax.prepare_rows(
            x_ND,
            kind,
            start,
            count,
            layout=argmax.BFLOAT16_TILES,
            out_BE=row_tiles,
            norms_B=norms_B,
            found=found,
            num_padded=num_padded,
            num_written=num_tiles * TILE_ROWS,
            tile_rows=TILE_ROWS,
        )
        launch(
            (num_tiles,),
            (THREADS,),
            (
                *(row_tiles, centroid_tiles, bias_K, np.int32(num_padded // TILE_DIMS)),
                *(np.int32(len(bias_K) // TILE_CENTROIDS), np.int32(count), best_B8, column_B8),
            ),
            shared_mem=SHARED_BYTES,
        )
        argmax.rescore_classes(
            *(x_ND, kind, start, count, prepared.centroids_KD, prepared.scale, prepared.bias_K, norms_B),
            *(slope, offset, best_B8, column_B8, list_no_N, found),
        )


def tiles_of_centroids(prepared: Prepared, num_padded: int) -> tuple[Any, Any]:
    """The scaled centroids as bfloat16 tiles (uint16 [K, E] in their order), and their bias; K padded to whole tiles."""
    import cupy

    num_centroids = prepared.num_centroids
    padded = -(-num_centroids // TILE_CENTROIDS) * TILE_CENTROIDS
    num_dims = prepared.centroids_KD.shape[1]
    scaled_KD = cupy.ascontiguousarray(prepared.scaled_KE[:num_centroids, :num_dims])
    tiles = cupy.empty((padded, num_padded), cupy.uint16)
    argmax.prepare_rows(
        scaled_KD,
        FLOAT32,
        0,
        num_centroids,
        layout=argmax.BFLOAT16_TILES,
        out_BE=tiles,
        norms_B=cupy.empty(padded, cupy.float32),
        found=no_rows_found(2),
        num_padded=num_padded,
        num_written=padded,
        tile_rows=TILE_CENTROIDS,
    )
    bias_K = cupy.full(padded, -np.inf, cupy.float32)
    bias_K[:num_centroids] = prepared.bias_K[:num_centroids]
    return tiles, bias_K

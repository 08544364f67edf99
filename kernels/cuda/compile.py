"""CUDA sources to machine code, with NVRTC, which needs no GPU and no driver; and the launchable kernels of a source.

No source includes a header, so that NVRTC alone compiles it: half precision goes through PTX instructions.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

STANDARD_OPTIONS = ("--std=c++17",)
# Shared memory that a kernel gets without asking for more (CUDA C++ Programming Guide, compute capabilities).
DEFAULT_SHARED_BYTES = 48 * 1024

PRELUDE = r"""
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define FLOAT32 0
#define FLOAT16 1
#define BFLOAT16 2

__device__ __forceinline__ float half_to_float(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ u16 float_to_half(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ float bfloat_to_float(u16 bits) { return __uint_as_float((u32)bits << 16); }

__device__ __forceinline__ u16 float_to_bfloat(float value) {
    u32 bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;  // NaN
    return (u16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);  // to nearest, ties to even
}

__device__ __forceinline__ bool is_finite(float value) {
    return (__float_as_uint(value) & 0x7f800000u) != 0x7f800000u;
}

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }

template <int K> struct Element { typedef u16 type; };
template <> struct Element<FLOAT32> { typedef float type; };

template <int K> __device__ __forceinline__ float widen(typename Element<K>::type value) {
    if constexpr (K == FLOAT16) return half_to_float(value);
    else if constexpr (K == BFLOAT16) return bfloat_to_float(value);
    else return value;
}
"""


@dataclass(frozen=True)
class Resources:
    """What the assembler reports of one kernel."""

    registers: int
    stack_bytes: int
    spill_bytes: int


def compile_cubin(source: str, arch: str, options: tuple[str, ...] = ()) -> tuple[bytes, str]:
    """(cubin, log) of a CUDA source (PRELUDE goes before it) for an architecture such as "sm_90".

    The log holds the compiler's warnings and the assembler's report. Needs cupy and NVRTC, no driver.
    Raises RuntimeError with the log where the source does not compile.
    """
    from cupy_backends.cuda.libs import nvrtc

    program = nvrtc.createProgram(PRELUDE + source, "kernel.cu", (), ())
    try:
        flags = (f"--gpu-architecture={arch}", "--ptxas-options=-v", *STANDARD_OPTIONS, *options)
        try:
            nvrtc.compileProgram(program, flags)
        except nvrtc.NVRTCError as error:
            raise RuntimeError(f"{arch}: {error}\n{nvrtc.getProgramLog(program)}") from error
        # cupy 14.2 cuts the last byte off, as if a text ended there; it is the high byte of an alignment, a zero.
        return nvrtc.getCUBIN(program) + b"\0", nvrtc.getProgramLog(program)
    finally:
        nvrtc.destroyProgram(program)


def resources(log: str) -> dict[str, Resources]:
    """Resources of every kernel that a log of `compile_cubin` reports."""
    pattern = re.compile(
        r"Compiling entry function '(?P<name>\w+)'.*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores,"
        r" (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
        re.DOTALL,
    )
    return {
        match["name"]: Resources(
            int(match["registers"]), int(match["stack"]), int(match["stores"]) + int(match["loads"])
        )
        for match in pattern.finditer(log)
    }


def kernel(source: str, name: str, options: tuple[str, ...] = (), *, arch: str = "", shared_bytes: int = 0) -> Any:
    """A launchable kernel of a source on the current device: kernel(grid, block, arguments, shared_mem=bytes).

    Compiled once a process and device. arch: another than the device's own, such as "sm_90a". shared_bytes: the most
    dynamic shared memory that a launch will ask for.
    """
    import cupy

    device = cupy.cuda.Device()
    loaded = _function(source, name, options, arch or f"sm_{device.compute_capability}", device.id)
    if shared_bytes > DEFAULT_SHARED_BYTES:
        from cupy_backends.cuda.api import driver

        limit = driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        driver.funcSetAttribute(loaded.ptr, limit, shared_bytes)
    return loaded


@functools.cache
def _function(source: str, name: str, options: tuple[str, ...], arch: str, device_id: int) -> Any:
    return _module(source, options, arch, device_id).get_function(name)


@functools.cache
def _module(source: str, options: tuple[str, ...], arch: str, device_id: int) -> Any:
    from cupy.cuda import runtime
    from cupy.cuda.function import Module

    runtime.free(0)  # makes the device's context, which loading needs
    module = Module()
    module.load(compile_cubin(source, arch, options)[0])
    return module

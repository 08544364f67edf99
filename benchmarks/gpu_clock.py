"""Times by CUDA events, the floors that they are compared with, and the numbers that they are taken on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SEED = 0


def seconds_of(run: Callable[[], Any], rounds: int = 5) -> float:
    """Best of the rounds, by CUDA events, after one warm-up."""
    import cupy

    if rounds > 1:
        run()
    times = []
    for _ in range(rounds):
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(begin, end) / 1e3)
    return min(times)


def floors() -> dict[str, float]:
    import cupy
    import torch

    source = cupy.ones(1 << 30, cupy.uint8)
    target = cupy.empty_like(source)
    copy = seconds_of(lambda: cupy.copyto(target, source), 10)
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    product = torch.empty_like(a)
    matrix = seconds_of(lambda: torch.mm(a, b, out=product), 10)
    return {
        "copy_gb_per_s": round(2 * source.nbytes / copy / 1e9, 1),
        "matrix_tflops": round(2 * 8192**3 / matrix / 1e12, 1),
    }


def normal(shape: tuple[int, ...], dtype: str) -> Any:
    """Normal numbers on the device, made in pieces so that they need little more memory than they take."""
    import cupy

    rng = cupy.random.default_rng(SEED)
    values = cupy.empty(shape, dtype)
    for start in range(0, shape[0], 1 << 18):
        part = values[start : start + (1 << 18)]
        part[:] = rng.standard_normal(part.shape, dtype=cupy.float32)
    return values

"""The compiled attention computes in memory that is its own, whatever other threads of the process allocate."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPO_ROOT = Path(__file__).resolve().parents[3]
CODE = """
import threading
import numpy as np
from operators.encoding.attention_compiled import attend_segments

T, H, D = 336, 12, 32
offsets = np.array([0, 138, 200, 330], np.int64)
floats = np.random.default_rng(0).standard_normal((3, T, H, D), np.float32)
q, k, v = (floats.view(np.uint32) >> 16).astype(np.uint16)

def attend():
    out = np.zeros((T, H, D), np.uint16)
    attend_segments(q, k, v, offsets, -1, -1, D**-0.5, out)
    return out

def allocate():
    while not ended.is_set():
        [np.full(n, np.nan, np.float32) for n in (256, 576, 1100, 1152)]

alone = attend()
ended = threading.Event()
threads = [threading.Thread(target=allocate) for _ in range(2)]
for thread in threads: thread.start()
differing = sum(not np.array_equal(attend(), alone) for _ in range(60))
ended.set()
for thread in threads: thread.join()
print(differing)
"""


@pytest.mark.skipif(
    not torch.cpu.get_capabilities().get("avx512_bf16", False), reason="the compiled attention needs AVX512-BF16"
)
def test_attention_beside_threads_that_allocate_gives_the_bits_that_it_gives_alone() -> None:
    pytest.importorskip("numba")
    # One arena: what one thread frees, another is given at once. (Elsewhere that takes many threads, as a Ray worker has.)
    variables = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=REPO_ROOT, env=variables, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr

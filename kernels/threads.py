"""Independent blocks of work side by side, in threads, with results that do not depend on how many there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Block = TypeVar("Block")
Result = TypeVar("Result")


def run_blocks(function: Callable[[Block], Result], blocks: Iterable[Block]) -> list[Result]:
    """`function` of every block, in order, on torch.get_num_threads() threads.

    Inside, torch works on one thread, so a block's matrix products are the same whatever the number of threads. The
    first exception, in the order of the blocks, is raised. Numpy, torch and compiled kernels let go of the
    interpreter, which is what makes threads worth having here.
    """
    work = list(blocks)
    num_threads = min(torch.get_num_threads(), len(work))
    before = torch.get_num_threads()

    def one_thread() -> None:
        torch.set_num_threads(1)

    try:
        with ThreadPoolExecutor(max(num_threads, 1), initializer=one_thread) as pool:
            return list(pool.map(function, work))
    finally:
        torch.set_num_threads(before)

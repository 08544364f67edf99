from __future__ import annotations

import threading

import pytest
import torch

from kernels.threads import run_blocks


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_results_come_in_the_order_of_the_blocks_from_so_many_threads(num_threads: int) -> None:
    before = torch.get_num_threads()
    together = threading.Barrier(num_threads)

    def block(number: int) -> tuple[int, int, int]:
        together.wait(60)  # passes only if so many blocks run at once
        return number, torch.get_num_threads(), threading.get_ident()

    try:
        torch.set_num_threads(num_threads)
        results = run_blocks(block, range(4 * num_threads))
        assert torch.get_num_threads() == num_threads
    finally:
        torch.set_num_threads(before)
    assert [number for number, _, _ in results] == [*range(4 * num_threads)]
    assert {inside for _, inside, _ in results} == {1}
    assert len({thread for _, _, thread in results}) == num_threads


def test_no_blocks_give_no_results() -> None:
    assert run_blocks(lambda block: block, []) == []


def test_the_first_exception_in_the_order_of_the_blocks_is_raised() -> None:
    before = torch.get_num_threads()
    later = threading.Event()

    def block(number: int) -> None:
        if number == 1:
            later.set()
            raise ValueError("block 1")
        if number == 0:
            assert later.wait(60)
            raise ValueError("block 0")

    try:
        torch.set_num_threads(2)
        with pytest.raises(ValueError, match="block 0"):
            run_blocks(block, range(10))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)

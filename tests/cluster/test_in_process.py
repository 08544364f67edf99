"""A session without Ray: tasks in turn with the errors of parallel ones, and a process that is left as it was."""

from __future__ import annotations

import faiss
import pytest
import torch

from cluster.in_process import tasks_in_turn
from cluster.preflight import plan_stream
from cluster.session import ClusterConfig, connect
from operators.errors import ConfigError, SourceError


def _answer(number: int) -> int:
    if number >= 2:
        raise SourceError(f"object {number} is damaged")
    return number * 10


def test_tasks_in_turn_return_in_order_and_keep_going_after_failures() -> None:
    done: list[int] = []
    checks: list[None] = []
    assert tasks_in_turn(_answer, [(1,), (0,)], check=lambda: checks.append(None)) == [10, 0]
    assert tasks_in_turn(divmod, [(4,), (5,)], shared=(23,)) == [(5, 3), (4, 3)]
    assert len(checks) == 2
    with pytest.raises(SourceError, match=r"object 2 is damaged \(and 1 more failed: object 3 is damaged\)"):
        tasks_in_turn(_answer, [(2,), (0,), (3,), (1,)], on_done=lambda number, result: done.append(number))
    assert done == [1, 3]


def test_the_threads_of_this_process_are_afterwards_what_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = torch.get_num_threads(), faiss.omp_get_max_threads()
    with connect(ClusterConfig(where="process")) as session:
        torch.set_num_threads(before[0] + 1)
        faiss.omp_set_num_threads(before[1] + 1)
    assert (torch.get_num_threads(), faiss.omp_get_max_threads()) == before
    plan = plan_stream(session, workers=7, threads_per_worker=3, use_gpu=False, pieces_in_flight=0)
    assert (plan.workers, plan.threads_per_worker) == (1, 3)


def test_a_run_without_ray_refuses_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    with pytest.raises(ConfigError, match=r"no address may be given, got 'head:6379' \(RAY_ADDRESS\)"):
        connect(ClusterConfig(where="process")).__enter__()
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(ConfigError, match=r"got 'auto' \(cluster.address\)"):
        connect(ClusterConfig(where="process", address="auto")).__enter__()
    with pytest.raises(ConfigError, match="cluster.where must be one of auto, ray, process, got 'local'"):
        ClusterConfig(where="local")

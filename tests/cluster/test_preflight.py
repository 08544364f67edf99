"""Demands are checked before start, with numbers; what never finishes ends with an error, not a hang."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from cluster.preflight import plan_stream
from cluster.session import ClusterConfig, Session, connect
from cluster.tasks import run_tasks
from operators.errors import ConfigError, ResourceError, SourceError


def plan(cpus: float, gpus: float = 0, **sizes: int) -> object:
    wanted = {"workers": 0, "threads_per_worker": 1, "pieces_in_flight": 0, **sizes}
    return plan_stream(Session(cpus, gpus, cpus), use_gpu=gpus > 0, **wanted)


def test_the_pool_leaves_a_slot_for_reading() -> None:
    assert plan(3).workers == 2  # type: ignore[attr-defined]
    assert plan(9, threads_per_worker=4).workers == 2  # type: ignore[attr-defined]
    assert plan(16, gpus=4).workers == 4  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("cpus", "sizes", "message"),
    [
        (2, {"workers": 2}, "2 CPU slots .* plus one .* Ray has 2 CPU slots .* at most 1 worker"),
        (2, {"threads_per_worker": 2}, "at most 0 worker.*fewer threads"),
        (1, {}, "at most 0 worker"),
    ],
)
def test_a_pool_that_would_starve_the_readers_is_refused_with_numbers(
    cpus: float, sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(ResourceError, match=message):
        plan(cpus, **sizes)


def test_negative_sizes_name_their_option() -> None:
    with pytest.raises(ConfigError, match="--workers"):
        plan(3, workers=-1)


def _answer(number: int) -> int:
    if number == 2:
        raise SourceError("object two is damaged")
    if number == 3:
        raise SourceError("object three is damaged")
    return number * 10


def _divided(first: int, second: int) -> tuple[int, int]:
    return divmod(first, second)


def _die_once(flag: str) -> str:
    if not os.path.exists(flag):
        with open(flag, "w"):
            pass
        os.kill(os.getpid(), 9)
    return "done"


def test_tasks_return_in_order_keep_going_after_failures_and_survive_a_dead_worker(
    ray_cluster: str, tmp_path: object
) -> None:
    with connect(ClusterConfig(address=ray_cluster)):
        done: list[int] = []
        assert run_tasks(_answer, [(0,), (1,), (5,)]) == [0, 10, 50]
        assert run_tasks(_divided, [(4,), (5,)], shared=(23,)) == [(5, 3), (4, 3)]
        with pytest.raises(SourceError, match="object two is damaged .*1 more failed: object three"):
            run_tasks(_answer, [(2,), (0,), (3,), (1,)], on_done=lambda number, result: done.append(number))
        assert sorted(done) == [1, 3]
        assert run_tasks(_die_once, [(f"{tmp_path}/flag",)]) == ["done"]
        started = time.monotonic()
        with pytest.raises(ResourceError, match=r"no _answer finished for 3 s .*may lack the resources"):
            run_tasks(_answer, [(0,)], num_cpus=1000, stall_timeout_s=3)
        assert time.monotonic() - started < 30


def test_transformers_ignores_our_kernels_folder_in_a_ray_worker(ray_cluster: str) -> None:
    with connect(ClusterConfig(address=ray_cluster)):
        assert run_tasks(_kernels_seen_by_transformers, [()]) == [False]


def _kernels_seen_by_transformers() -> bool:
    from transformers import AutoModel  # noqa: F401 - the import is what must work
    from transformers.utils import is_kernels_available

    return bool(is_kernels_available())


def test_an_unreachable_cluster_is_one_clear_error() -> None:
    code = "from cluster.session import *\nwith connect(ClusterConfig(address='127.0.0.1:1')): pass\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert "ResourceError: could not connect to the Ray cluster at 127.0.0.1:1" in done.stderr

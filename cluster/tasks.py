"""Parallel Ray tasks with bounded submission: a failed task does not stop the others, its error is raised at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from cluster.session import check_alive
from cluster.supply import Demand, SupplyWatch
from operators.errors import ResourceError, VectormillError

WORKER_CRASH_RETRIES = 3


def run_tasks(
    function: Callable[..., Any],
    calls: Sequence[tuple[Any, ...]],
    *,
    shared: Sequence[Any] = (),
    num_cpus: float = 1,
    num_gpus: float = 0,
    stall_timeout_s: float = 900.0,
    wait_for_nodes_s: float = 0.0,
    say: Callable[[str], None] | None = None,
    on_done: Callable[[int, Any], None] | None = None,
    check: Callable[[], None] | None = None,
    max_in_flight: int = 256,
) -> list[Any]:
    """Results of function(*shared, *call) for every call, in order. What is shared goes to each node once.

    A worker that dies is replaced and its task run again (its commits make that safe). An exception of the function is
    kept until all other tasks have ended, then raised: a VectormillError as it is, with the number of further failures.
    `check` is called about once a second. Raises ResourceError when nothing finishes for `stall_timeout_s`, or no node
    could hold one such task for `wait_for_nodes_s`, which `say` tells before; that wait does not count as a stall.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    remote = ray.remote(function).options(num_cpus=num_cpus, num_gpus=num_gpus, max_retries=WORKER_CRASH_RETRIES)
    kept = [ray.put(value) for value in shared]
    results: list[Any] = [None] * len(calls)
    failures: list[tuple[int, Exception]] = []
    waiting = list(range(len(calls)))[::-1]
    running: dict[Any, int] = {}
    supply = SupplyWatch(Demand(f"{function.__name__} task", num_cpus, num_gpus), wait_for_nodes_s, say)
    last_progress = time.monotonic()
    while waiting or running:
        while waiting and len(running) < max_in_flight:
            number = waiting.pop()
            running[remote.remote(*kept, *calls[number])] = number
        done, _ = ray.wait(list(running), num_returns=1, timeout=1.0)
        for ref in done:
            number = running.pop(ref)
            last_progress = time.monotonic()
            try:
                results[number] = ray.get(ref)
            except RayTaskError as error:
                cause = error.cause if isinstance(error.cause, Exception) else error
                failures.append((number, cause))
                continue
            except RayError as error:
                failures.append(
                    (
                        number,
                        ResourceError(
                            f"{function.__name__} {number}: its worker died {WORKER_CRASH_RETRIES + 1} times ({type(error).__name__}); look at the memory of the machine"
                        ),
                    )
                )
                continue
            if on_done is not None:
                on_done(number, results[number])
        check_alive()
        if check is not None:
            check()
        if not done:
            supply.look()
            if supply.is_waiting:
                last_progress = time.monotonic()
        if time.monotonic() - last_progress > stall_timeout_s:
            raise ResourceError(
                f"no {function.__name__} finished for {stall_timeout_s:.0f} s ({len(running)} running, {len(waiting)} waiting);"
                " the cluster may lack the resources they ask for, or storage hangs (cluster.stall_timeout_s)"
            )
    raise_first(failures)
    return results


def raise_first(failures: list[tuple[int, Exception]]) -> None:
    """Raise the failure of the lowest call, a VectormillError with what else failed; nothing when there is none."""
    if not failures:
        return
    failures.sort(key=lambda failure: failure[0])
    first = failures[0][1]
    if isinstance(first, VectormillError):
        more = (
            f" (and {len(failures) - 1} more failed: {'; '.join(str(e) for _, e in failures[1:3])})"
            if len(failures) > 1
            else ""
        )
        raise type(first)(f"{first}{more}") from None
    raise first

"""The encoder pool while it runs: one execution of the streaming job, watched, and begun again when nodes were lost.

Ray Data 2.60 starts the encoders of a lost node again on others, for as long as it takes. Those that find no room keep the
pieces that they had been given, and may take the slot that reading and committing needs, so nothing moves any more. Then
the execution is ended, and what is left is run by a pool that fits.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from cluster.preflight import READING_CPUS, StreamPlan, smaller_plan
from cluster.session import check_alive
from cluster.supply import SupplyWatch, living_nodes, room_for, supply_text
from operators.errors import ResourceError

# Nothing finished for so long, or three times the longest pause so far: what still runs will not finish either.
PATIENCE_S = 15.0
START_S = 20.0  # what the pause before the first piece is taken for: encoders load their model meanwhile
ROOM_FOR_S = 30.0  # nodes that came back are used when so long none has come or gone
END_TIMEOUT_S = 60.0  # Ray waits for the tasks that it ends: for those of a node out of reach until it counts as dead


class PoolChangedError(Exception):
    """The execution was given up; `EncoderPool.plan` says with which pool to go on."""


class KeepExecutor:
    """Callback of Ray Data that keeps the running execution, which it offers no other way to end from outside."""

    executor: Any = None

    def before_execution_starts(self, executor: Any) -> None:
        KeepExecutor.executor = executor

    def on_execution_step(self, executor: Any) -> None:
        pass

    def after_execution_succeeds(self, executor: Any) -> None:
        pass

    def after_execution_fails(self, executor: Any, error: Exception) -> None:
        pass


class EncoderPool:
    """Which pool is running, and which one the cluster has room for."""

    def __init__(self, plan: StreamPlan, wait_for_nodes_s: float, say: Callable[[str], None] | None = None) -> None:
        self.plan = self._wanted = plan
        self._say = say or (lambda text: None)
        self._watch = SupplyWatch(plan.demand, wait_for_nodes_s, say, spare_cpus=READING_CPUS)
        self._node_ids = {node.node_id for node in living_nodes()}
        self._larger: tuple[int, float] | None = None  # room for more than run, and since when
        self._is_short = False
        self._longest_pause_s: float | None = None  # between two pieces; None: none has ended since the start
        self._stalled_s = 0.0  # since a piece ended, over all pools, without the time of waiting for nodes
        self._counted_at = time.monotonic()

    @property
    def is_waiting(self) -> bool:
        """Whether there is room for no encoder, and nodes are waited for."""
        return self._watch.is_waiting

    def ended_one(self, pause_s: float) -> None:
        """A piece has ended, so long after the one before; the first one after the pool was started."""
        self._longest_pause_s = 0.0 if self._longest_pause_s is None else max(self._longest_pause_s, pause_s)
        self._stalled_s, self._counted_at = 0.0, time.monotonic()

    def check_stall(self, stall_timeout_s: float) -> None:
        """Raise ResourceError when no piece has ended for so long, over all pools, waiting for nodes not counted."""
        if self._stalled_s > stall_timeout_s:
            raise ResourceError(
                f"no piece was committed for {stall_timeout_s:.0f} s: the encoder pool ({self.plan.workers} x"
                f" {self.plan.cpus_per_worker} CPU, {self.plan.gpus_per_worker:g} GPU) may not be schedulable"
                f"{_used_by_others()}, nodes are lost again and again, or storage hangs; what was committed is kept, run again"
                " to resume (cluster.stall_timeout_s)"
            )

    def look(self, idle_s: float) -> None:
        """To be called all the time; looks every few seconds. Does the pool still fit? idle_s: since a piece ended.

        Raises PoolChangedError when another pool must go on, ResourceError when there is room for none.
        """
        room = self._room()
        if room is None:
            return
        if room >= self.plan.workers:
            self._is_short = False
            self._grow(min(room, self._wanted.workers))
            return
        self._larger = None
        if room and not self._is_short:
            self._is_short = True
            nodes = supply_text(self._watch.nodes)
            self._say(f"nodes were lost: {nodes} have room for {room} of {self.plan.workers} encoders")
        if room and idle_s > max(PATIENCE_S, 3 * (self._longest_pause_s or START_S)):
            self._change(room)

    def goes_on_after(self, error: BaseException, pause: Callable[[], None]) -> bool:
        """Whether `error` of Ray may come of a node that was lost since the last time: then what is left is run again.

        Where there is room for no encoder it calls `pause` until there is. Raises ResourceError when that takes too long.
        """
        nodes = living_nodes()
        now = {node.node_id for node in nodes}
        lost, self._node_ids = self._node_ids - now, now
        if not lost:
            return False
        self._say(f"{len(lost)} node(s) were lost, and the streaming job with them: {_first_line(error)}")
        room = room_for(self._watch.demand, nodes, READING_CPUS)
        self._count()
        while not room:
            pause()
            room = self._room() or 0
        self._replan(min(room, self.plan.workers))
        return True

    def _room(self) -> int | None:
        self._count()
        room = self._watch.look()
        if room is not None:
            self._node_ids |= {node.node_id for node in self._watch.nodes}
        return room

    def _count(self) -> None:
        now = time.monotonic()
        if not self.is_waiting:
            self._stalled_s += now - self._counted_at
        self._counted_at = now

    def _grow(self, room: int) -> None:
        if room <= self.plan.workers:
            self._larger = None
            return
        now = time.monotonic()
        if self._larger is None or self._larger[0] != room:
            self._larger = room, now
        # Without a piece since the last start, nodes that come one by one would keep the encoders loading their model.
        if self._longest_pause_s is not None and now - self._larger[1] > ROOM_FOR_S:
            self._change(room)

    def _change(self, workers: int) -> None:
        self._replan(workers)
        raise PoolChangedError

    def _replan(self, workers: int) -> None:
        self._say(f"going on with {workers} encoder(s) in place of {self.plan.workers}")
        self.plan = smaller_plan(self._wanted, workers)
        self._larger, self._longest_pause_s, self._is_short = None, None, False


def run_dataset(
    dataset: Any, pool: EncoderPool, *, stall_timeout_s: float, check: Callable[[], None] | None
) -> Iterator[dict[str, Any]]:
    """Rows of the dataset as they come. `check` is called about once a second while none does.

    Raises PoolChangedError, after ending the execution, when the pool must change; ResourceError when no row has come for
    `stall_timeout_s` (of this dataset or of those before it with the same pool; waiting for nodes does not count), when the
    cluster has lost what the pool needs, or when Ray failed or cannot be ended.
    """
    results: queue.Queue[Any] = queue.Queue()
    dataset.context.custom_execution_callback_classes = [KeepExecutor]

    def consume() -> None:
        try:
            for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                for line in batch.to_pylist():
                    results.put(line)
            results.put(None)
        except BaseException as error:
            results.put(error)

    def stand_by() -> None:
        check_alive()
        if check is not None:
            check()

    def pause() -> None:
        time.sleep(1.0)
        stand_by()

    threading.Thread(target=consume, daemon=True, name="ray-data-consumer").start()
    idle_since = time.monotonic()
    while True:
        idle_s = 0.0
        try:
            line = results.get(timeout=1.0)
        except queue.Empty:
            stand_by()
            pool.check_stall(stall_timeout_s)
            idle_s = time.monotonic() - idle_since
        else:
            if line is None:
                return
            if isinstance(line, BaseException):
                if pool.goes_on_after(line, pause):
                    pool.check_stall(stall_timeout_s)
                    raise PoolChangedError from line
                raise ResourceError(f"the streaming job failed: {_first_line(line)}; run again to resume") from line
            now = time.monotonic()
            pool.ended_one(now - idle_since)
            idle_since = now
            yield line
        try:
            pool.look(idle_s)
        except PoolChangedError:
            _end_execution()
            yield from _ended_meanwhile(results)
            raise
        if pool.is_waiting:
            idle_since = time.monotonic()


def _ended_meanwhile(results: queue.Queue[Any]) -> Iterator[dict[str, Any]]:
    while not results.empty():
        line = results.get_nowait()
        if isinstance(line, dict):
            yield line


def _end_execution() -> None:
    """End the running execution and its actors; what it has committed is kept.

    Raises ResourceError when Ray has not done that after END_TIMEOUT_S: it asks all tasks, and waits without a limit.
    """
    executor, KeepExecutor.executor = KeepExecutor.executor, None
    if executor is None:
        return
    errors: list[BaseException] = []

    def shut_down() -> None:
        try:
            executor.shutdown(force=True)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=shut_down, daemon=True, name="ray-data-shutdown")
    thread.start()
    thread.join(END_TIMEOUT_S)
    if thread.is_alive():
        raise ResourceError(
            f"the encoder pool had to be begun again, and Ray did not end it within {END_TIMEOUT_S:.0f} s: a node, or the head,"
            " cannot be reached (`ray status`, `ray list nodes`); remove that node and run again to resume, what was"
            " committed is kept"
        )
    if errors:
        raise errors[0]


def _used_by_others() -> str:
    import ray

    free, total = ray.available_resources(), ray.cluster_resources()
    taken = [
        f"{total.get(name, 0.0) - free.get(name, 0.0):g} of {total.get(name, 0.0):g} {name}" for name in ("CPU", "GPU")
    ]
    return f" (in use by this job and others: {' and '.join(taken)})"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

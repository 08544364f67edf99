"""How many encoders the nodes of a cluster can hold, and how that is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from cluster.encoder_pool import EncoderPool, KeepExecutor, PoolChangedError, run_dataset
from cluster.preflight import StreamPlan, plan_stream, smaller_plan
from cluster.session import session_of
from cluster.supply import Demand, NodeSupply, room_for, supply_text, waiting_for_nodes
from operators.errors import ResourceError


def nodes(*slots: float) -> list[NodeSupply]:
    return [NodeSupply(cpus, node_id=str(number)) for number, cpus in enumerate(slots)]


def plan(cluster: list[NodeSupply], workers: int = 0, threads: int = 1, use_gpu: bool = False) -> StreamPlan:
    sizes = {"workers": workers, "threads_per_worker": threads, "pieces_in_flight": 0}
    return plan_stream(session_of(cluster, joined=True), use_gpu=use_gpu, **sizes)


def test_an_encoder_takes_its_slots_of_one_node_and_one_slot_stays_free_somewhere() -> None:
    assert room_for(Demand("encoder", 2), nodes(2, 2, 1)) == 2
    assert room_for(Demand("encoder", 2), nodes(2, 2, 1), 1) == 2
    assert room_for(Demand("encoder", 2), nodes(2, 2), 1) == 1
    assert room_for(Demand("encoder", 3), nodes(2, 2, 2), 1) == 0
    assert room_for(Demand("encoder", 1), [], 1) == 0
    gpus = [NodeSupply(8, 4), NodeSupply(2, 4), NodeSupply(16)]
    assert room_for(Demand("encoder", 1, 1), gpus, 1) == 6
    assert (plan(nodes(4, 4), threads=4).workers, plan(nodes(4, 4, 1), threads=4).workers) == (1, 2)


@pytest.mark.parametrize(
    ("cluster", "workers", "threads", "use_gpu", "message"),
    [
        (nodes(2, 2, 2), 0, 4, False, r"Ray has 6 CPU slots .*\(3 node\(s\) with 2, 2, 2 CPU slot\(s\) and no GPU\): no node is large enough for one worker, which takes 4 CPU slots"),
        (nodes(8, 8), 2, 1, True, "need 2 CPU slots and 2 GPUs.*no node has a GPU; encode on CPUs .*encode.device=cpu"),
        ([NodeSupply(8, 1), NodeSupply(8)], 2, 1, True, r"8, 8 CPU slot\(s\) and 1, 0 GPU\(s\)\): use at most 1 worker"),
        (nodes(4, 4), 8, 1, False, "8 encoder .* need 8 CPU slots .* use at most 7 worker"),
        (nodes(0), 0, 1, False, "Ray has 0 CPU slots .* use at most 0 worker"),
    ],
)  # fmt: skip
def test_a_pool_that_cannot_be_placed_is_refused_with_demand_and_supply(
    cluster: list[NodeSupply], workers: int, threads: int, use_gpu: bool, message: str
) -> None:
    with pytest.raises(ResourceError, match=message):
        plan(cluster, workers, threads, use_gpu)


def test_supply_is_told_in_few_words() -> None:
    assert supply_text(nodes(0, 4)) == "1 node(s) with 4 CPU slot(s) and no GPU"
    assert supply_text(nodes(*[1] * 20)).startswith("20 node(s) with 1, 1, 1, 1, 1, 1, 1, 1, ... CPU slot(s)")
    assert supply_text(nodes(0)) == "1 node(s) without CPU slots or GPUs"


def test_without_a_wait_what_is_lacking_is_told_at_once() -> None:
    said: list[str] = []
    with pytest.raises(ResourceError, match="^all is lacking$"), waiting_for_nodes(0.0, said.append) as is_over:
        is_over([Demand("encoder", 1)], "all is lacking")
    assert said == []


def test_fewer_encoders_have_fewer_pieces_in_flight() -> None:
    assert smaller_plan(StreamPlan(4, 1, 0.0, 12), 1) == StreamPlan(1, 1, 0.0, 3)


class Pool:
    """An EncoderPool on nodes, and with a clock, that the test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, there: list[NodeSupply], workers: int, wait_s: float) -> None:
        self.there, self.now, self.said = there, time.monotonic(), list[str]()
        self.comes: tuple[float, list[NodeSupply]] | None = None  # when, and what is there then
        monkeypatch.setattr("cluster.encoder_pool.living_nodes", lambda: self.there)
        monkeypatch.setattr("cluster.supply.living_nodes", lambda: self.there)
        monkeypatch.setattr("cluster.supply.SupplyWatch._head_answers", lambda *_: True)
        monkeypatch.setattr("cluster.encoder_pool._used_by_others", str)
        monkeypatch.setattr("cluster.encoder_pool.time.monotonic", lambda: self.now)
        self.pool = EncoderPool(StreamPlan(workers, 1, 0.0, 3 * workers), wait_s, self.said.append)

    def pass_time(self, seconds: float, idle_s: float = 0.0) -> None:
        """Look once a second."""
        for _ in range(int(seconds)):
            self.pause()
            self.pool.look(idle_s)

    def pause(self) -> None:
        self.now += 1.0
        if self.comes is not None and self.now >= self.comes[0]:
            self.there, self.comes = self.comes[1], None


def test_a_pool_is_begun_again_when_nothing_moves_any_more_and_grows_when_nodes_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = Pool(monkeypatch, nodes(2, 2), 3, 60.0)
    pool = cluster.pool
    cluster.pass_time(10, 1000.0)  # all there is room for: whatever takes so long, it is not a lost node
    cluster.there = nodes(2)
    for pause in (1.0, 2.0, 8.0):
        pool.ended_one(pause)
    cluster.pass_time(10, 20.0)
    assert len(cluster.said) == 1 and "have room for 1 of 3 encoders" in cluster.said[0]
    with pytest.raises(PoolChangedError):
        cluster.pass_time(10, 25.0)  # three times the longest pause
    assert pool.plan == StreamPlan(1, 1, 0.0, 3)
    cluster.there = nodes(2, 2)
    pool.ended_one(9.0)
    with pytest.raises(PoolChangedError):
        cluster.pass_time(45)
    assert pool.plan == StreamPlan(3, 1, 0.0, 9)
    assert not pool.goes_on_after(RuntimeError("of another kind"), cluster.pause)
    cluster.there = nodes(2)
    assert pool.goes_on_after(RuntimeError("the object is lost"), cluster.pause)
    assert pool.plan.workers == 1
    assert not pool.goes_on_after(RuntimeError("again"), cluster.pause)


def test_a_pool_does_not_grow_while_nodes_still_come_or_before_a_piece_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = Pool(monkeypatch, nodes(1, *[1] * 8), 8, 60.0)
    cluster.there = nodes(1, 1)
    with pytest.raises(PoolChangedError):
        cluster.pass_time(10, 100.0)
    assert cluster.pool.plan.workers == 1
    cluster.there = nodes(1, 1, 1)
    cluster.pass_time(100)  # nothing has ended since the start
    cluster.pool.ended_one(1.0)
    for number in range(3, 8):
        cluster.there = nodes(*[1] * (number + 1))
        cluster.pass_time(20)  # one node after the other
    with pytest.raises(PoolChangedError):
        cluster.pass_time(30)
    assert cluster.pool.plan.workers == 7


def test_a_node_that_joined_later_may_be_lost_and_then_nodes_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Pool(monkeypatch, nodes(2), 1, 60.0)
    replacement = NodeSupply(2, node_id="replacement")
    cluster.there = [replacement]
    cluster.pass_time(10)
    assert cluster.pool.goes_on_after(RuntimeError("the first is lost"), cluster.pause)
    cluster.there = [replacement, second := NodeSupply(2, node_id="second")]
    cluster.pass_time(10)
    cluster.there, began = [], cluster.now
    cluster.comes = began + 30, [second]
    assert cluster.pool.goes_on_after(RuntimeError("both are lost"), cluster.pause)
    assert 30 <= cluster.now - began <= 35
    assert any(line.startswith("waiting up to 60 s for nodes: each encoder takes 1 CPU slot") for line in cluster.said)
    cluster.there = []
    with pytest.raises(ResourceError, match="no node that could hold one came within 60 s"):
        cluster.pool.goes_on_after(RuntimeError("none comes"), cluster.pause)


def test_a_stall_adds_up_over_pools_and_waiting_for_nodes_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Pool(monkeypatch, nodes(2), 1, 3600.0)
    cluster.there = []
    cluster.pass_time(2000)
    assert cluster.pool.is_waiting
    cluster.pool.check_stall(900.0)
    for life in range(60):  # a node that dies whenever it has come
        cluster.there = [NodeSupply(2, node_id=f"life {life}")]
        cluster.pass_time(20)
        cluster.there = []
        cluster.comes = cluster.now + 30, [NodeSupply(2, node_id=f"life {life} and a half")]
        assert cluster.pool.goes_on_after(RuntimeError("lost"), cluster.pause)
        if life == 30:
            cluster.pool.check_stall(900.0)
    with pytest.raises(ResourceError, match="no piece was committed for 900 s.*nodes are lost again and again"):
        cluster.pool.check_stall(900.0)
    cluster.pool.ended_one(1.0)
    cluster.pool.check_stall(900.0)


class Rows:
    """In place of a Ray dataset and its executor: rows without a pause until it is shut down."""

    def __init__(self, hangs: bool = False) -> None:
        self.context = SimpleNamespace()
        self._shut_down, self._ended = threading.Event(), threading.Event()
        self.made, self._hangs = 0, hangs

    def iter_batches(self, **_: Any) -> Iterator[pa.Table]:
        KeepExecutor.executor = self
        while self.made < 500 and not self._shut_down.wait(0.005):
            yield pa.table({"id": [self.made]})
            self.made += 1
        if not self._hangs:
            self._ended.set()

    def shutdown(self, force: bool) -> None:
        assert force
        self._shut_down.set()
        self._ended.wait(30.0)


def test_nodes_that_come_back_are_used_while_pieces_end_all_the_time_and_no_ended_piece_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool, rows = _pool_that_can_grow(monkeypatch), Rows()
    got: list[int] = []

    def take() -> None:
        for line in run_dataset(rows, pool, stall_timeout_s=10.0, check=None):
            got.append(line["id"])
            time.sleep(0.01)  # slower than they come

    with pytest.raises(PoolChangedError):
        take()
    assert pool.plan.workers == 3
    assert got == list(range(rows.made))


def test_an_execution_that_ray_does_not_end_is_told_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.encoder_pool.END_TIMEOUT_S", 0.2)
    pool, began = _pool_that_can_grow(monkeypatch), time.monotonic()
    with pytest.raises(ResourceError, match="Ray did not end it within .* remove that node and run again"):
        list(run_dataset(Rows(hangs=True), pool, stall_timeout_s=10.0, check=None))
    assert time.monotonic() - began < 20


def _pool_that_can_grow(monkeypatch: pytest.MonkeyPatch) -> EncoderPool:
    monkeypatch.setattr("cluster.encoder_pool.living_nodes", lambda: nodes(2, 2))
    monkeypatch.setattr("cluster.encoder_pool.ROOM_FOR_S", 0.2)
    pool = EncoderPool(StreamPlan(3, 1, 0.0, 9), 60.0)
    monkeypatch.setattr(pool._watch, "look", lambda: 3)
    pool.plan = smaller_plan(pool.plan, 1)
    return pool

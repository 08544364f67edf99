"""How many encoders the nodes of a cluster can hold, and how that is told."""

from __future__ import annotations

import time

import pytest

from cluster.encoder_pool import EncoderPool, PoolChangedError
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


def test_a_pool_is_begun_again_when_nothing_moves_any_more_and_grows_when_nodes_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = nodes(2, 2)
    monkeypatch.setattr("cluster.encoder_pool.living_nodes", lambda: there)
    said: list[str] = []
    pool = EncoderPool(StreamPlan(3, 1, 0.0, 9), 60.0, said.append)
    now = time.monotonic()
    monkeypatch.setattr("cluster.encoder_pool.time.monotonic", lambda: now)
    room = 3
    monkeypatch.setattr(pool._watch, "look", lambda: room)
    pool.look(1000.0)  # all there is room for: whatever takes so long, it is not a lost node
    room = 1
    for pause in (1.0, 2.0, 8.0):
        pool.ended_one(pause)
    pool.look(20.0)
    assert len(said) == 1 and "have room for 1 of 3 encoders" in said[0]
    with pytest.raises(PoolChangedError):
        pool.look(25.0)  # three times the longest pause
    assert pool.plan == StreamPlan(1, 1, 0.0, 3)
    room = 3
    pool.look(0.0)
    now += 31.0
    with pytest.raises(PoolChangedError):
        pool.look(0.0)
    assert pool.plan == StreamPlan(3, 1, 0.0, 9)
    assert not pool.goes_on_after(RuntimeError("of another kind"))
    there = nodes(2)
    assert pool.goes_on_after(RuntimeError("the object is lost"))
    assert pool.plan.workers == 1
    assert not pool.goes_on_after(RuntimeError("again"))

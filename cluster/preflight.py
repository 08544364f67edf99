"""Checks before any work: the demand of all pools and tasks against what the cluster has, and the environment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from cluster.session import Session, session_of
from cluster.supply import Demand, NodeSupply, living_nodes, room_for, supply_text, waiting_for_nodes
from operators.errors import ConfigError, ResourceError

READING_CPUS = 1  # free beside the encoders, for the tasks that read and commit


@dataclass(frozen=True)
class StreamPlan:
    """Resolved pools of the streaming job."""

    workers: int
    threads_per_worker: int
    gpus_per_worker: float
    pieces_in_flight: int

    @property
    def cpus_per_worker(self) -> int:
        """CPU slots that an encoder takes: its threads, or one to feed a GPU."""
        return 1 if self.gpus_per_worker else self.threads_per_worker

    @property
    def demand(self) -> Demand:
        """What each encoder asks of a node."""
        return Demand("encoder", self.cpus_per_worker, self.gpus_per_worker)


def plan_stream(
    session: Session, *, workers: int, threads_per_worker: int, use_gpu: bool, pieces_in_flight: int
) -> StreamPlan:
    """Sizes of the encoder pool for this session (workers 0: as many as fit). Raises ResourceError with the numbers.

    Without Ray there is one encoder, which shares this process with all else, whatever `workers` says.

    Measured on Ray 2.60: when actor pools take every CPU slot, the read tasks never start and the job hangs for ever
    without a word. So one slot must stay free for them.
    """
    if threads_per_worker < 1:
        raise ConfigError(
            f"encode.threads_per_worker must be at least 1, got {threads_per_worker} (--threads-per-worker)"
        )
    if workers < 0:
        raise ConfigError(f"encode.workers must be at least 0 (0: as many as fit), got {workers} (--workers)")
    gpus = 1.0 if use_gpu else 0.0
    if session.in_process:
        return StreamPlan(1, threads_per_worker, gpus, 1)
    plan = StreamPlan(max(workers, 1), threads_per_worker, gpus, 0)
    nodes = session.nodes or (NodeSupply(session.num_cpus, session.num_gpus),)
    fitting = room_for(plan.demand, nodes, READING_CPUS)
    chosen = workers or fitting
    if chosen < 1 or chosen > fitting:
        raise ResourceError(_lacking(plan, nodes, fitting))
    return StreamPlan(chosen, threads_per_worker, gpus, pieces_in_flight or 2 * chosen + 4)


def await_stream_plan(
    session: Session, wait_for_nodes_s: float, say: Callable[[str], None], **sizes: Any
) -> StreamPlan:
    """`plan_stream` for the nodes that are there now; where they do not suffice, those that come within `wait_for_nodes_s`.

    sizes: its keywords. Raises ResourceError, at once when the Ray was started here.
    """
    if session.in_process or not session.joined:
        return plan_stream(session, **sizes)
    with waiting_for_nodes(wait_for_nodes_s, say) as is_over:
        while True:
            now = session_of(living_nodes(), joined=True)
            try:
                return plan_stream(now, **sizes)
            except ResourceError as error:
                each = StreamPlan(1, sizes["threads_per_worker"], 1.0 if sizes["use_gpu"] else 0.0, 0).demand
                is_over([each] * max(1, sizes["workers"]) + [Demand("reader", READING_CPUS)], str(error))


def smaller_plan(plan: StreamPlan, workers: int) -> StreamPlan:
    """The plan with fewer encoders, or again with more, and as many pieces in flight for each."""
    in_flight = max(1, round(plan.pieces_in_flight * workers / plan.workers))
    return replace(plan, workers=workers, pieces_in_flight=in_flight)


def _lacking(plan: StreamPlan, nodes: Sequence[NodeSupply], fitting: int) -> str:
    """Demand, supply, and what to do."""
    number, each = plan.workers, plan.demand
    told = (
        f"{number} encoder worker(s) of {plan.cpus_per_worker} CPU slot(s) and {plan.gpus_per_worker:g} GPU(s) need"
        f" {number * plan.cpus_per_worker} CPU slots and {number * plan.gpus_per_worker:g} GPUs, plus one CPU slot for reading"
        f" and committing; Ray has {sum(node.cpus for node in nodes):g} CPU slots and"
        f" {sum(node.gpus for node in nodes):g} GPUs"
    )
    told += f" ({supply_text(nodes)})" if len(nodes) > 1 else ""
    if each.gpus and not any(node.gpus for node in nodes):
        return f"{told}: no node has a GPU; encode on CPUs (--set encode.device=cpu), or start nodes with GPUs"
    if not room_for(each, nodes) and sum(node.cpus for node in nodes) >= each.cpus:
        return f"{told}: no node is large enough for one worker, which takes {each.text()}; use fewer threads (--threads-per-worker), or larger nodes"
    return f"{told}: use at most {fitting} worker(s) (--workers), fewer threads (--threads-per-worker), or a larger cluster"


def check_environment() -> None:
    """Raise ConfigError for an installed distribution `kernels`: transformers would load it in place of our folder."""
    try:
        found = version("kernels")
    except PackageNotFoundError:
        return
    raise ConfigError(
        f"the Python package 'kernels' {found} is installed; its import name is that of vectormill's folder kernels/,"
        " so one would hide the other: uninstall it (pip uninstall kernels) or use a fresh virtual environment"
    )

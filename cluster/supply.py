"""What the nodes of a cluster can hold, and what is said and done when that is not what was planned with.

Nodes come (autoscaling) and go (spot instances, evicted pods, broken machines) while a run goes on. Ray 2.60 starts
actors and tasks of a lost node again elsewhere; where no node has room for them it waits for ever, without a word.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from operators.errors import ResourceError

LOOK_EVERY_S = 5.0
WAIT_STEP_S = 1.0
HEAD_TIMEOUT_S = 30.0  # Ray itself gives up after 60 s, by ending the driver's process without a word
HEAD_PROBE_S = 3.0


@dataclass(frozen=True)
class NodeSupply:
    """What a living node has in all, taken or not."""

    cpus: float
    gpus: float = 0.0
    node_id: str = ""


@dataclass(frozen=True)
class Demand:
    """What each of some equal actors or tasks asks for, all of it from one node."""

    what: str  # `encoder`, for messages
    cpus: float
    gpus: float = 0.0

    def text(self) -> str:
        """`4 CPU slots and 1 GPU`."""
        slots = f"{self.cpus:g} CPU slot{'' if self.cpus == 1 else 's'}"
        return slots + (f" and {self.gpus:g} GPU{'' if self.gpus == 1 else 's'}" if self.gpus else "")


def living_nodes() -> list[NodeSupply]:
    """Nodes of the cluster that this process is joined to."""
    import ray

    alive = [(node["Resources"], node["NodeID"]) for node in ray.nodes() if node["Alive"]]
    return [NodeSupply(has.get("CPU", 0.0), has.get("GPU", 0.0), node_id) for has, node_id in alive]


def room_for(demand: Demand, nodes: Sequence[NodeSupply], spare_cpus: float = 0) -> int:
    """How many such actors the nodes can hold beside one task that takes `spare_cpus`."""
    held = [_on_node(demand, node) for node in nodes]
    left = [node.cpus - number * demand.cpus for node, number in zip(nodes, held, strict=True)]
    crowded = spare_cpus > 0 and max(left, default=0.0) < spare_cpus
    return max(0, sum(held) - (1 if crowded else 0))


def _on_node(demand: Demand, node: NodeSupply) -> int:
    bounds = [int(node.cpus // demand.cpus)] if demand.cpus else []
    bounds += [int(node.gpus // demand.gpus)] if demand.gpus else []
    return min(bounds, default=0)


def supply_text(nodes: Sequence[NodeSupply]) -> str:
    """`3 nodes with 8, 8 and 4 CPU slots and no GPU`: the largest first, and only what can work."""
    working = sorted((node for node in nodes if node.cpus or node.gpus), key=lambda n: (-n.gpus, -n.cpus))
    if not working:
        return f"{len(nodes)} node(s) without CPU slots or GPUs"
    slots = ", ".join(f"{node.cpus:g}" for node in working[:8]) + (", ..." if len(working) > 8 else "")
    gpus = ", ".join(f"{node.gpus:g}" for node in working[:8]) + (", ..." if len(working) > 8 else "")
    told = f"{len(working)} node(s) with {slots} CPU slot(s)"
    return f"{told} and {gpus} GPU(s)" if any(node.gpus for node in working) else f"{told} and no GPU"


@contextlib.contextmanager
def waiting_for_nodes(wait_s: float, say: Callable[[str], None]) -> Iterator[Callable[[Sequence[Demand], str], None]]:
    """A function (demands, what is lacking) to call in a loop while there is not room for all of them.

    It asks an autoscaler for that much, if the cluster has one, says once what is waited for, and waits a moment. After
    `wait_s` it raises ResourceError. What was asked for is taken back at the end of the block.
    """
    started: float | None = None

    def wait(demands: Sequence[Demand], lacking: str) -> None:
        nonlocal started
        now = time.monotonic()
        if started is None:
            started = now
            if wait_s > 0:
                say(f"waiting up to {wait_s:.0f} s for nodes: {lacking}")
                _ask_autoscaler(demands)
        if now - started >= wait_s:
            waited = f"; no nodes came within {wait_s:.0f} s (cluster.wait_for_nodes_s)" if wait_s > 0 else ""
            raise ResourceError(f"{lacking}{waited}")
        time.sleep(WAIT_STEP_S)

    try:
        yield wait
    finally:
        if started is not None and wait_s > 0:
            _ask_autoscaler([])


def _ask_autoscaler(demands: Sequence[Demand]) -> None:
    """Ask for nodes that hold all of these at once, in place of what was asked for before. Without autoscaler: nothing."""
    from ray.autoscaler.sdk import request_resources

    request_resources(
        bundles=[{"CPU": demand.cpus, **({"GPU": demand.gpus} if demand.gpus else {})} for demand in demands]
    )


class SupplyWatch:
    """Looks, every few seconds, whether the cluster still has room for what a stage needs."""

    def __init__(
        self, demand: Demand, wait_for_nodes_s: float, say: Callable[[str], None] | None = None, spare_cpus: float = 0
    ) -> None:
        self.demand, self.spare_cpus = demand, spare_cpus
        self.nodes: list[NodeSupply] = []
        self._wait_s = wait_for_nodes_s
        self._say = say or (lambda text: None)
        self._looked = time.monotonic()
        self._none_since: float | None = None
        self._silent_since: float | None = None  # the head

    @property
    def is_waiting(self) -> bool:
        """Whether the last look found room for none."""
        return self._none_since is not None

    def look(self) -> int | None:
        """How many the cluster has room for, None when it is not time to look yet.

        Raises ResourceError when there was room for none for `wait_for_nodes_s`, or the head node is gone.
        """
        now = time.monotonic()
        if now - self._looked < LOOK_EVERY_S:
            return None
        self._looked = now
        if not self._head_answers(now):
            return None
        self.nodes = living_nodes()
        room = room_for(self.demand, self.nodes, self.spare_cpus)
        if room:
            self._none_since = None
            return room
        lacking = f"each {self.demand.what} takes {self.demand.text()} of one node" + (
            f" beside {self.spare_cpus:g} CPU slot for reading and committing" if self.spare_cpus else ""
        )
        told = f"{lacking}, and the Ray cluster has {supply_text(self.nodes)}"
        if self._none_since is None:
            self._none_since = now
            self._say(f"waiting up to {self._wait_s:.0f} s for nodes: {told}")
        if now - self._none_since >= self._wait_s:
            raise ResourceError(
                f"{told}; no node that could hold one came within {self._wait_s:.0f} s (cluster.wait_for_nodes_s). What was"
                " committed is kept: bring nodes back, or ask for less, and run again to resume"
            )
        return 0

    def _head_answers(self, now: float) -> bool:
        """Whether the head's GCS takes connections. Raises ResourceError when it has not for HEAD_TIMEOUT_S."""
        import ray

        if ray.util.client.ray.is_connected():  # by way of the head's Ray Client server; its GCS may be out of reach
            return True
        address = ray.get_runtime_context().gcs_address
        host, _, port = address.rpartition(":")
        with contextlib.suppress(OSError):
            socket.create_connection((host.strip("[]"), int(port)), HEAD_PROBE_S).close()
            self._silent_since = None
            return True
        self._silent_since = self._silent_since or now
        if now - self._silent_since > HEAD_TIMEOUT_S:
            raise ResourceError(
                f"the head node of the Ray cluster at {address} has not answered for {now - self._silent_since:.0f} s: it is gone,"
                " or cannot be reached; what was committed is kept, run again on a cluster that works to resume"
            )
        return False

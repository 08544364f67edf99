"""Sizes of the machines or pods that a build needs: head (driver and Ray's own processes), CPU workers, GPU workers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.capacity.memory import MemoryPeak, memory_peaks, update_driver_bytes
from cluster.capacity.workload import Workload

GIB = 1 << 30
HEADROOM = 1.25  # over the predicted peak: predictions are checked to within 15% (benchmarks/plan_check.py)
HEAD_CPUS = 2


@dataclass(frozen=True)
class PodSize:
    """One kind of pod. memory_bytes is what to request and limit; the object store is within it."""

    num_pods: int
    cpus: int
    gpus: int
    memory_bytes: int
    object_store_bytes: int


@dataclass(frozen=True)
class PodSizes:
    """The cluster of a build. gpu_workers is None where encoders run on CPUs, cpu_workers where GPU nodes do all."""

    head: PodSize
    cpu_workers: PodSize | None
    gpu_workers: PodSize | None


def size_pods(work: Workload, c: Mapping[str, float], *, for_updates: bool = False) -> PodSizes:
    """Pods for the fleet's nodes. The head runs the driver and no work; for_updates: it must hold the ledger, too."""
    peaks = memory_peaks(work, c)
    driver = next(peak.size_bytes for peak in peaks if peak.process == "driver")
    if for_updates:
        driver = max(driver, update_driver_bytes(work, c))
    head_store = GIB // 2
    head = PodSize(1, HEAD_CPUS, 0, _rounded(driver + c["ray_bytes"], head_store), head_store)
    fleet, store = work.fleet, _object_store(work)
    encoders = math.ceil(work.num_encoders / fleet.num_nodes)
    memory = _rounded(node_bytes(work, c, peaks, fleet.cpus_per_node, encoders), store)
    size = PodSize(fleet.num_nodes, fleet.cpus_per_node, fleet.gpus_per_node, memory, store)
    return PodSizes(head, None, size) if fleet.gpus_per_node else PodSizes(head, size, None)


def node_bytes(work: Workload, c: Mapping[str, float], peaks: list[MemoryPeak], slots: int, encoders: int) -> float:
    """Private bytes of all processes of a node in its worst stage, with the libraries' code once."""
    of = {(peak.stage, peak.process): peak for peak in peaks}
    encoding = encoders * of["encode pieces", "encoder"].size_bytes
    free_slots = max(1, slots - encoders * (1 if work.uses_gpu else work.threads_per_worker))
    encoding += free_slots * of["encode pieces", "task"].size_bytes
    idle = (slots - 1) * c["task_worker_bytes"]
    tasks = [
        slots * peak.size_bytes if peak.parallel else idle + peak.size_bytes
        for peak in peaks
        if peak.process == "task" and peak.stage != "encode pieces"
    ]
    return c["ray_bytes"] + c["libraries_bytes"] + max(encoding, *tasks)


def _object_store(work: Workload) -> int:
    """Bytes of a node's object store: twice its share of what cluster/stream.py lets be in flight; at least 1 GiB."""
    in_flight = work.pieces_in_flight * work.pieces_per_task * max(2 * work.read.piece_bytes, 1 << 20)
    return math.ceil(max(GIB, 2 * in_flight / work.fleet.num_nodes) / GIB) * GIB


def _rounded(size: float, store: int) -> int:
    return math.ceil((HEADROOM * size + store) / GIB) * GIB

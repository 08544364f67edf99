"""What of a plan will not fit or will not be in time, and what to do about it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.planning.plan import Planned


def find_limits(planned: Planned, deadline_s: float | None) -> list[str]:
    """What will not fit or will not be in time, the worst first, each with what to do."""
    work, found = planned.work, []
    memory = work.fleet.memory_per_node
    if planned.update is not None and planned.update["driver_bytes"] > 0.5 * memory:
        size = planned.update["driver_bytes"]
        verdict = "does not fit" if size > memory else "is much"
        found.append(
            f"UPDATES: the driver of an update holds about 200 B for each document of the corpus, {_gb(size)} for"
            f" {work.corpus.num_docs:,}; that {verdict} in a node of {_gb(memory)}: give the head {_gb(1.25 * size)}, or"
            " cut the corpus into several indices"
        )
    for peak in sorted(planned.peaks, key=lambda peak: -peak.size_bytes):
        if peak.size_bytes > memory:
            found.append(
                f"MEMORY: {peak.stage} needs {_gb(peak.size_bytes)} in one {peak.process}, a node has {_gb(memory)}; it grows"
                f" with {peak.grows_with}"
            )
    nodes = [size for size in (planned.pods.cpu_workers, planned.pods.gpu_workers) if size is not None]
    if nodes and nodes[0].memory_bytes > memory and not any("MEMORY" in one for one in found):
        found.append(f"MEMORY: all processes of a node together need {_gb(nodes[0].memory_bytes)} of its {_gb(memory)}")
    if not planned.storage_known:
        found.append(
            "STORAGE: its latency or its bandwidth is not known, so waiting for it is not all in the times; measure it with"
            " --calibrate --root s3://..., or say --storage-latency-ms and --network-gbit"
        )
    if deadline_s is not None and planned.seconds > deadline_s:
        found.append(_deadline_text(planned, deadline_s))
    total = planned.seconds
    for stage in planned.stages:
        if stage.single_task_s > 0.2 * total and stage.single_task_s > 600:
            found.append(
                f"ONE TASK: {stage.name} has one worker at work for {stage.single_task_s / 3600:.1f} h of {total / 3600:.1f} h; more"
                f" nodes do not help ({stage.binds})"
            )
    lists = planned.sizes["inverted lists"]
    if work.on_s3 and lists > 10e9:
        found.append(
            f"DISK: measuring recall copies the inverted lists, {_gb(lists)}, to the disk of one worker (VECTORMILL_CACHE)"
        )
    return found


def _deadline_text(planned: Planned, deadline_s: float) -> str:
    """What more nodes could do about it."""
    encode = next(stage for stage in planned.stages if stage.name == "encode pieces")
    single = sum(stage.single_task_s for stage in planned.stages)
    shared = planned.seconds - single
    text = f"DEADLINE: {planned.seconds / 3600:.1f} h are more than {deadline_s / 3600:.1f} h"
    if single >= deadline_s:
        return f"{text}, and {single / 3600:.1f} h of them are tasks that run alone: no number of nodes is enough"
    factor = shared / (deadline_s - single)
    nodes = math.ceil(planned.work.fleet.num_nodes * factor)
    return f"{text}: about {nodes} nodes like these ({encode.binds} bind the encoding stage), if storage keeps up"


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"

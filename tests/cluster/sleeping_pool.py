"""A driver for the tests of lost nodes: the encoder pool as the streaming job runs it, with sleep in place of encoding.

Run in the cluster: python -m tests.cluster.sleeping_pool ROWS SECONDS WORKERS WAIT_S [gpu]
Prints `row N` as each ends and `all N rows` at the end; an error is its last line, as that of a vectormill command.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import numpy as np

from cluster.encoder_pool import EncoderPool, PoolChangedError, run_dataset
from cluster.preflight import StreamPlan, await_stream_plan
from cluster.session import ClusterConfig, connect
from operators.errors import VectormillError


class Sleeper:
    """In place of EncodeStage."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        time.sleep(self._seconds)
        return batch


def pass_on(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """In place of committing: a task that needs the slot which the pool must leave free."""
    return batch


def dataset_of(rows: list[int], seconds: float, plan: StreamPlan) -> Any:
    """As cluster/stream.py builds it: tasks, an actor pool, tasks; one row a block."""
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext

    DataContext.get_current().issue_detectors_config.detectors = []
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    each: dict[str, Any] = {"batch_size": 1}
    task = {**each, "num_cpus": 1, "memory": 256 << 20}
    pool = {"compute": ActorPoolStrategy(size=min(plan.workers, len(rows))), "num_cpus": plan.cpus_per_worker}
    dataset: Any = ray.data.from_items([{"id": row} for row in rows], override_num_blocks=len(rows))
    dataset = dataset.map_batches(pass_on, **task)
    dataset = dataset.map_batches(
        Sleeper, fn_constructor_args=(seconds,), num_gpus=plan.gpus_per_worker, **each, **pool
    )
    return dataset.map_batches(pass_on, **task)


def main(rows: int, seconds: float, workers: int, wait_s: float, use_gpu: bool) -> None:
    """See the top of the file."""

    def say(text: str) -> None:
        print(text, flush=True)

    left = set(range(rows))
    with connect(ClusterConfig(where="ray", wait_for_nodes_s=wait_s), say) as session:
        sizes = {"workers": workers, "threads_per_worker": 1, "use_gpu": use_gpu, "pieces_in_flight": 0}
        plan = await_stream_plan(session, wait_s, say, **sizes)
        pool = EncoderPool(plan, wait_s, say)
        say(f"{plan.workers} workers")
        while left:
            try:
                dataset = dataset_of(sorted(left), seconds, pool.plan)
                for line in run_dataset(dataset, pool, stall_timeout_s=300.0, check=None):
                    left.discard(line["id"])
                    say(f"row {line['id']}")
                break
            except PoolChangedError:
                continue
        say(f"all {rows} rows" if not left else f"lost: {sorted(left)}")


if __name__ == "__main__":
    given = sys.argv[1:]
    try:
        main(int(given[0]), float(given[1]), int(given[2]), float(given[3]), "gpu" in given)
    except VectormillError as error:
        print(f"error: {error}", flush=True)
        sys.exit(error.exit_code)

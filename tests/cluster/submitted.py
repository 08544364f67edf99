"""Jobs as a user submits them: `vectormill submit` in a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from cluster.job_log import JobEnd, follow
from cluster.jobs import Jobs
from operators.storage.store import open_store
from tests.cluster.ray_nodes import RayNodes
from tests.faults.running import Running

REPO_ROOT = Path(__file__).resolve().parents[2]
STOP_TIMEOUT_S = 240.0
POLL_S = 0.2


def submit(nodes: RayNodes, *words: str, options: Sequence[str] = ()) -> Running:
    """`vectormill submit -- WORDS`, which follows the job. It is killed at the end of its block, the job is not."""
    command = [sys.executable, "-m", "pipelines.cli", "submit", *options, "--", *words]
    return Running(command, {**os.environ, "RAY_API_SERVER_ADDRESS": nodes.address})


class SleepingPool:
    """tests/cluster/sleeping_pool.py as a job, followed by a thread."""

    def __init__(self, nodes: RayNodes, *, rows: int, workers: int, wait_s: float, use_gpu: bool = False) -> None:
        from ray.job_submission import JobSubmissionClient

        words = ["python", "-m", "tests.cluster.sleeping_pool", rows, 1, workers, wait_s, *(["gpu"] if use_gpu else [])]
        client = JobSubmissionClient(nodes.address)
        job_id = client.submit_job(
            entrypoint=" ".join(str(word) for word in words), runtime_env={"env_vars": {"PYTHONPATH": str(REPO_ROOT)}}
        )
        self.lines: list[str] = []
        self._end: list[JobEnd] = []
        self._thread = threading.Thread(target=self._follow, args=(Jobs(nodes.address), job_id), daemon=True)
        self._thread.start()

    def _follow(self, jobs: Jobs, job_id: str) -> None:
        self._end.append(follow(jobs, job_id, self.lines.append, lambda remark: None))

    def wait_for(self, line: str) -> None:
        """AssertionError unless the job writes that line."""
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while line not in self.lines:
            assert self._thread.is_alive() and time.monotonic() < deadline, self.lines
            time.sleep(POLL_S)

    def end(self) -> JobEnd:
        """How it ended. AssertionError when it takes too long."""
        self._thread.join(STOP_TIMEOUT_S)
        assert self._end, self.lines
        return self._end[0]


def lose_node_of_stopped_worker(nodes: RayNodes, job: Running) -> None:
    """Kill a node while a worker of the job stands still there at its stop point. Others that stop there go on."""
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while not (found := stopped(nodes)):
        assert job.returncode is None, f"the job ended before its workers stopped: {job.stderr}"
        assert time.monotonic() < deadline, f"no worker stopped: {job.stderr}"
        time.sleep(POLL_S)
    nodes.kill(next(iter(found)))
    threading.Thread(target=_wake, args=(nodes, job), daemon=True).start()


def wait_for_piece(root: str, job: Running) -> None:
    """Until the job has committed a piece, which another one can go on with."""
    deadline = time.monotonic() + STOP_TIMEOUT_S
    store = open_store(root)
    while not any("/pieces/" in key and key.endswith(".json") for key in store.list_keys("runs")):
        assert job.returncode is None, f"the job ended before it committed anything: {job.stderr}"
        assert time.monotonic() < deadline, f"nothing was committed: {job.stderr}"
        time.sleep(POLL_S)


def _wake(nodes: RayNodes, job: Running) -> None:
    """Each worker stops once; let them go on until the job has ended."""
    while job.returncode is None:
        for pids in stopped(nodes).values():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
        time.sleep(POLL_S)


def stopped(nodes: RayNodes) -> dict[str, list[int]]:
    """Processes that stand still, by node."""
    found = {name: [pid for pid in nodes.pids(name) if state_of(pid) == "T"] for name in nodes.names}
    return {name: pids for name, pids in found.items() if pids}


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"

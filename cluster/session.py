"""The session of a run: a Ray cluster that is joined, a Ray started on this machine, or this process alone."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.supply import Demand, NodeSupply, living_nodes, room_for, supply_text, waiting_for_nodes
from cluster.telemetry import METRICS
from operators import crash_points
from operators.errors import ConfigError, ResourceError
from operators.settings import operational

WHERE = ("auto", "ray", "process")
VITAL_PROCESSES = ("gcs_server", "raylet")  # without which nothing goes on
REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class ClusterConfig:
    """Where the job runs, and the bounds that it keeps."""

    where: str = operational(
        "auto", "ray, process (all work in this process, one after the other, without Ray) or auto: as the command does"
    )
    address: str = operational("", "Ray address to join; empty: RAY_ADDRESS, else Ray is started on this machine")
    num_cpus: int = operational(0, "CPU slots of a Ray started here; 0: the cores plus one")
    object_store_bytes: int = operational(1 << 30, "object store of a Ray started here")
    pieces_in_flight: int = operational(0, "pieces between reading and commit; 0: 2 per encoder plus 4")
    stall_timeout_s: float = operational(
        900.0, "a run on Ray that finishes no piece or task for so long is ended with an error"
    )
    wait_for_nodes_s: float = operational(
        60.0,
        "how long a run waits for nodes that can hold its encoders and tasks, at its start and when nodes are lost; more"
        " where an autoscaler has to bring them",
    )

    def __post_init__(self) -> None:
        if self.where not in WHERE:
            raise ConfigError(f"cluster.where must be one of {', '.join(WHERE)}, got {self.where!r}")


@dataclass(frozen=True)
class Session:
    """Where the work is done, and its totals."""

    num_cpus: float
    num_gpus: float
    node_cpus: float  # of the largest node: what one task can ask for
    in_process: bool = False  # no Ray: see cluster/in_process.py
    nodes: tuple[NodeSupply, ...] = ()  # none given: one node that has the totals
    joined: bool = False  # a cluster that others may use too, and whose nodes come and go


def is_in_process(config: ClusterConfig, is_small: bool) -> bool:
    """Whether work is done without Ray: as `cluster.where` says; auto: what is small, unless a cluster is named."""
    if config.where == "auto":
        return is_small and not (config.address or os.environ.get("RAY_ADDRESS"))
    return config.where == "process"


@contextmanager
def connect(config: ClusterConfig, say: Callable[[str], None] | None = None) -> Iterator[Session]:
    """A session for the duration of the block: of Ray, unless `cluster.where` is `process`. `say` tells what is waited for.

    A Ray that was started here ends with the block. Without Ray the numbers of threads of torch and faiss, which the
    work sets for itself, are afterwards what they were. Raises ResourceError when there is no connection, ConfigError
    when an address is given to a run that is to use no Ray.
    """
    if config.where == "process":
        with _this_process(config) as session:
            yield session
    else:
        with _ray(config, say or (lambda text: None)) as session:
            yield session


@contextmanager
def _this_process(config: ClusterConfig) -> Iterator[Session]:
    import faiss
    import torch

    for name, address in (("cluster.address", config.address), ("RAY_ADDRESS", os.environ.get("RAY_ADDRESS", ""))):
        if address:
            raise ConfigError(
                f"cluster.where=process works without Ray, so no address may be given, got {address!r} ({name});"
                " leave it empty, or use cluster.where=ray"
            )
    cpus = float(os.cpu_count() or 1)
    torch_threads, faiss_threads = torch.get_num_threads(), faiss.omp_get_max_threads()
    try:
        yield Session(cpus, 1.0 if torch.cuda.is_available() else 0.0, cpus, in_process=True)
    finally:
        torch.set_num_threads(torch_threads)
        faiss.omp_set_num_threads(faiss_threads)


@contextmanager
def _ray(config: ClusterConfig, say: Callable[[str], None]) -> Iterator[Session]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray resets the logging of the driver; its INFO lines would tear the progress display apart.
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # When a run ends with an error, the thread that reads from Ray Data may outlive the session for a moment; without
    # this its next call would start another Ray.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    import ray

    address = config.address or os.environ.get("RAY_ADDRESS", "")
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "runtime_env": _runtime_env(joining=bool(address)),
        "configure_logging": True,
    }
    if address:
        options["address"] = address
    else:
        # One slot more than cores: encoders may take all cores while reading and committing, which mostly wait, go on.
        options["num_cpus"] = config.num_cpus or (os.cpu_count() or 1) + 1
        options["object_store_memory"] = config.object_store_bytes
        options["include_dashboard"] = False
    if address:
        _check_reachable(address)
    try:
        with _quiet_core():
            ray.init(**options)
    except Exception as error:  # Ray 2.60 raises a bare Exception for a raylet that dies while it starts
        where = f"the Ray cluster at {address} (cluster.address or RAY_ADDRESS)" if address else "Ray on this machine"
        # Ray 2.60 says no more of a token that is refused. That something listens was found out before.
        why = "; is that the port of its GCS (mostly 6379), and the token here the cluster's (RAY_AUTH_TOKEN,"
        why += " RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token)?"
        raise ResourceError(f"could not connect to {where}: {_in_short(error)}{why if address else ''}") from None
    METRICS.forget()
    try:
        nodes = _nodes_that_work(config.wait_for_nodes_s if address else 0.0, say)
        yield session_of(nodes, joined=bool(address))
    finally:
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what the abandoned thread has to say then
        ray.shutdown()


def _in_short(error: Exception) -> str:
    """Ray's message without its advice on how to read the documentation."""
    return str(error).partition(" Ensure that ")[0].rstrip(". ")


def session_of(nodes: Sequence[NodeSupply], *, joined: bool) -> Session:
    """The session of a Ray that has these nodes."""
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    return Session(cpus, gpus, max((node.cpus for node in nodes), default=0.0), nodes=tuple(nodes), joined=joined)


def _nodes_that_work(wait_s: float, say: Callable[[str], None]) -> list[NodeSupply]:
    """Nodes of the cluster, once one of them has a CPU slot. Raises ResourceError when none comes within `wait_s`."""
    with waiting_for_nodes(wait_s, say) as is_over:
        while True:
            nodes = living_nodes()
            if room_for(Demand("task", 1), nodes):
                return nodes
            is_over([Demand("task", 1)], f"the Ray cluster has {supply_text(nodes)}, so no task can run")


def check_alive() -> None:
    """Raise ResourceError when a part of the Ray that was started here has died.

    Ray 2.60 finds out after up to a minute, and then mostly ends the driver's process without a word.
    """
    import ray

    node = ray._private.worker._global_node  # None on a cluster that was joined
    died: set[str] = {str(name) for name, _ in node.dead_processes()} if node is not None else set()
    if dead := sorted(died & set(VITAL_PROCESSES)):
        raise ResourceError(
            f"the {' and the '.join(dead)} of the Ray on this machine died (killed, or out of memory); what was committed is"
            " kept, run again to resume"
        )


def _check_reachable(address: str, timeout_s: float = 10.0) -> None:
    """Raise ResourceError unless something listens at host:port. Ray 2.60 tries for minutes without a word."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator or not port.isdigit():
        return  # "auto" and the like: Ray finds the address itself
    try:
        socket.create_connection((host, int(port)), timeout_s).close()
    except OSError as error:
        raise ResourceError(
            f"could not connect to the Ray cluster at {address} (cluster.address or RAY_ADDRESS): {error};"
            " start it, mend the address, or leave both empty to run on this machine"
        ) from None


@contextmanager
def _quiet_core() -> Iterator[None]:
    """Keep Ray's C++ core from writing to the terminal; its errors still reach Python.

    Ray 2.60 prints a warning about Ray Data's own actors to the driver's standard error. The log level that silences
    it (RAY_BACKEND_LOG_LEVEL, read when the driver connects) announces itself there too, so standard error is closed
    for that moment; the level is taken back, since workers that are started later shall log as usual.
    """
    if "RAY_BACKEND_LOG_LEVEL" in os.environ:
        yield
        return
    os.environ["RAY_BACKEND_LOG_LEVEL"] = "fatal"
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
        del os.environ["RAY_BACKEND_LOG_LEVEL"]


def _runtime_env(joining: bool) -> dict[str, Any]:
    """Environment of the workers: this code on their path, the crash setting of a fault test."""
    submitted = _environment_of_job()
    # glibc keeps freed memory in up to eight arenas a core, and forward passes run on new threads each time: without this an
    # encoder grows by some 30 MB a piece, to 1.2 GB after 22 pieces on 2 cores, and stays at 0.6 GB with it (Ray 2.60).
    variables = {"MALLOC_ARENA_MAX": os.environ.get("MALLOC_ARENA_MAX", "2")}
    if "working_dir" not in submitted:  # Ray puts that on the path, where it lies on each node
        variables["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    if crash_points.VARIABLE in os.environ:
        os.environ[crash_points.DRIVER_VARIABLE] = str(os.getpid())
    passed_on: tuple[str, ...] = (crash_points.VARIABLE, crash_points.DRIVER_VARIABLE, "HF_HUB_OFFLINE")
    if joining:  # workers of a cluster do not inherit this process's environment
        # Never credentials: Ray writes runtime environments to its logs. A cluster's nodes have their own.
        passed_on += ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE")
    variables |= {name: os.environ[name] for name in passed_on if name in os.environ}
    # Ray refuses a variable that the job has set already: its workers have it.
    return {"env_vars": {name: value for name, value in variables.items() if name not in submitted.get("env_vars", {})}}


def _environment_of_job() -> dict[str, Any]:
    """Runtime environment of the submitted job whose driver this process is; empty when it is not one."""
    return dict(json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env") or {})

"""The session of a run: a Ray cluster that is joined, a Ray started on this machine, or this process alone."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def is_in_process(config: ClusterConfig, is_small: bool) -> bool:
    """Whether work is done without Ray: as `cluster.where` says; auto: what is small, unless a cluster is named."""
    if config.where == "auto":
        return is_small and not (config.address or os.environ.get("RAY_ADDRESS"))
    return config.where == "process"


@contextmanager
def connect(config: ClusterConfig) -> Iterator[Session]:
    """A session for the duration of the block: of Ray, unless `cluster.where` is `process`.

    A Ray that was started here ends with the block. Without Ray the numbers of threads of torch and faiss, which the
    work sets for itself, are afterwards what they were. Raises ResourceError when there is no connection, ConfigError
    when an address is given to a run that is to use no Ray.
    """
    if config.where == "process":
        with _this_process(config) as session:
            yield session
    else:
        with _ray(config) as session:
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
def _ray(config: ClusterConfig) -> Iterator[Session]:
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
        raise ResourceError(f"could not connect to {where}: {error}") from None
    try:
        totals = ray.cluster_resources()
        node_cpus = max(node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"])
        yield Session(totals.get("CPU", 0.0), totals.get("GPU", 0.0), node_cpus)
    finally:
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what the abandoned thread has to say then
        ray.shutdown()


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
    variables = {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])}
    if crash_points.VARIABLE in os.environ:
        os.environ[crash_points.DRIVER_VARIABLE] = str(os.getpid())
    passed_on: tuple[str, ...] = (crash_points.VARIABLE, crash_points.DRIVER_VARIABLE, "HF_HUB_OFFLINE")
    if joining:  # workers of a cluster do not inherit this process's environment
        # Never credentials: Ray writes runtime environments to its logs. A cluster's nodes have their own.
        passed_on += ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE")
    variables |= {name: os.environ[name] for name in passed_on if name in os.environ}
    return {"env_vars": variables}

"""Checks before any work: the demand of all pools and tasks against what the cluster has, and the environment."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from cluster.session import Session
from operators.errors import ConfigError, ResourceError


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
    cpus_each = 1 if use_gpu else threads_per_worker
    fitting = int((session.num_cpus - 1) // cpus_each)
    if use_gpu:
        fitting = min(fitting, int(session.num_gpus))
    chosen = workers or fitting
    if chosen < 1 or chosen > fitting:
        raise ResourceError(
            f"{max(chosen, 1)} encoder worker(s) of {cpus_each} CPU slot(s) and {gpus:g} GPU(s) need"
            f" {max(chosen, 1) * cpus_each} CPU slots and {max(chosen, 1) * gpus:g} GPUs, plus one CPU slot for reading and"
            f" committing; Ray has {session.num_cpus:g} CPU slots and {session.num_gpus:g} GPUs:"
            f" use at most {max(fitting, 0)} worker(s) (--workers), fewer threads (--threads-per-worker), or a larger cluster"
        )
    return StreamPlan(chosen, threads_per_worker, gpus, pieces_in_flight or 2 * chosen + 4)


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

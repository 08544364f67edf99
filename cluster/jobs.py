"""Jobs on a cluster by Ray's Jobs API: submit, list, follow and stop. The driver runs in the cluster, not here.

A job is a vectormill command line. What the cluster knows of it is in Ray's own store: its state, its log, and metadata
that says which command it is and at which root. Nothing of it is kept on this machine.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import shlex
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from cluster.job_package import pinned_requirements, write_package
from operators.errors import ConfigError, ResourceError
from operators.storage.fencing import JOB_VARIABLE

ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
DASHBOARD_PORT = 8265  # Ray's default
CALL_TIMEOUT_S = 30.0  # Ray's client waits for ever for a head node that vanished
METADATA = "vectormill_"  # prefix of the keys in a job's metadata
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
T = TypeVar("T")


class ContactLostError(Exception):
    """The head node did not answer. The job may be going on."""


@dataclass(frozen=True)
class Submission:
    """A command line for the cluster, and what it needs there."""

    command: Sequence[str]  # `build SOURCE --out ROOT ...`
    root: str
    submission_id: str
    ship_code: bool = True  # else the nodes have vectormill
    pinned_requirements: bool = False  # install them on the nodes; else the nodes have them
    files: Mapping[str, Path] = field(default_factory=dict)  # see write_package
    variables: Mapping[str, str] = field(default_factory=dict)
    num_cpus: float = 0  # of the driver. All zero: it runs on the head node
    num_gpus: float = 0
    memory_bytes: int = 0
    submitted_by: str = ""


@dataclass(frozen=True)
class Job:
    """A job as the cluster knows it."""

    submission_id: str
    command: str
    root: str
    state: str  # PENDING, RUNNING, or one of ENDED
    started_at: float | None  # seconds since 1970, when it was submitted
    ended_at: float | None
    exit_code: int | None  # of the command; None while it runs, or when the driver could not be started or was lost
    message: str  # Ray's
    submitted_by: str

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED


def find_address(given: str | None) -> str:
    """Address of the cluster: the given one, else that of RAY_API_SERVER_ADDRESS or RAY_ADDRESS. Raises ConfigError."""
    for address in (given, *(os.environ.get(name) for name in ADDRESS_VARIABLES)):
        if address:
            return address
    raise ConfigError(
        "no cluster is named: give the address of its dashboard, for example --address http://head:8265, or set"
        " RAY_API_SERVER_ADDRESS or RAY_ADDRESS"
    )


class Jobs:
    """The jobs of one cluster."""

    def __init__(self, address: str) -> None:
        """Connect. Raises ResourceError when nothing answers, ConfigError when it refuses the token or there is none."""
        self.address = address
        self._client = self._call(lambda: _connect(address))

    @property
    def ray_version(self) -> str:
        """Ray's version in the cluster."""
        return str(getattr(self._client, "_server_ray_version", None) or "")

    def submit(self, job: Submission) -> None:
        """Upload the code unless the cluster has it already, and start. Raises ConfigError for an id that is taken."""
        environment: dict[str, Any] = {"env_vars": {**job.variables, JOB_VARIABLE: job.submission_id}}
        with tempfile.TemporaryDirectory(prefix="vectormill-job-") as folder:
            if job.ship_code:
                write_package(Path(folder), job.files)
                environment["working_dir"] = folder
            if job.pinned_requirements:
                environment["pip"] = pinned_requirements()
            program = ["python", "-m", "pipelines.cli"] if job.ship_code else ["vectormill"]
            metadata = {"command": shlex.join(job.command), "root": job.root, "submitted_by": job.submitted_by}
            try:
                self._call(
                    lambda: self._client.submit_job(
                        entrypoint=shlex.join([*program, *job.command]),
                        submission_id=job.submission_id,
                        runtime_env=environment,
                        metadata={f"{METADATA}{name}": value for name, value in metadata.items()},
                        entrypoint_num_cpus=job.num_cpus or None,
                        entrypoint_num_gpus=job.num_gpus or None,
                        entrypoint_memory=job.memory_bytes or None,
                    ),
                    timeout_s=10 * CALL_TIMEOUT_S,
                )
            except ResourceError as error:
                raise ResourceError(
                    f"{error}. Job {job.submission_id} may have been submitted all the same: `vectormill jobs` tells"
                ) from None
            except RuntimeError as error:
                if "already exists" not in str(error):
                    raise
                raise ConfigError(
                    f"job {job.submission_id!r} exists already at {self.address}: Ray runs an id once; take another"
                    " (--submission-id), or leave it out"
                ) from None

    def list(self, *, others: bool = False) -> list[Job]:
        """Jobs of vectormill, the newest first; with `others` all that were submitted to the cluster."""
        found = [_job(details) for details in self._call(self._client.list_jobs) if details.submission_id]
        found = [job for job in found if others or job.root]
        return sorted(found, key=lambda job: job.started_at or 0.0, reverse=True)

    def get(self, submission_id: str) -> Job:
        """Raises ConfigError for an unknown id, ContactLostError when the head does not answer."""
        with self._unknown(submission_id):
            return _job(self._call(lambda: self._client.get_job_info(submission_id), lost=ContactLostError))

    def log(self, submission_id: str) -> str:
        """What the job has written so far. Raises ResourceError when the node that keeps it is gone."""
        with self._unknown(submission_id):
            return str(self._call(lambda: self._client.get_job_logs(submission_id)))

    def tail(self, submission_id: str) -> Any:
        """Asynchronous iterator over the job's log from its beginning, until the job has ended."""
        return self._client.tail_job_logs(submission_id)

    def stop(self, submission_id: str) -> bool:
        """Ask the job to end (SIGTERM, after 3 s SIGKILL); whether it was running."""
        with self._unknown(submission_id):
            return bool(self._call(lambda: self._client.stop_job(submission_id)))

    @contextlib.contextmanager
    def _unknown(self, submission_id: str) -> Iterator[None]:
        """Turn Ray's error for an id that it does not know into ConfigError."""
        try:
            yield
        except RuntimeError as error:
            if "does not exist" not in str(error):
                raise
            raise ConfigError(
                f"there is no job {submission_id!r} at {self.address}; `vectormill jobs` lists them"
            ) from None

    def _call(
        self, call: Callable[[], T], timeout_s: float = CALL_TIMEOUT_S, lost: type[Exception] = ResourceError
    ) -> T:
        """What `call` returns. Raises `lost` when the head does not answer, ConfigError for a token that is refused."""
        from ray.exceptions import AuthenticationError

        try:
            return _within(timeout_s, call)
        except AuthenticationError as error:
            told = str(error)
            wrong = "the token given here is not the cluster's" if "Authentication failed" in told else "none was given"
            raise ConfigError(
                f"the Ray cluster at {self.address} asks for its token, and {wrong}: put it into RAY_AUTH_TOKEN, the file"
                " that RAY_AUTH_TOKEN_PATH names, or ~/.ray/auth_token"
            ) from None
        except (OSError, RuntimeError) as error:  # those of requests are OSErrors
            # A head that is in trouble answers with code 500, and so does one that refuses what it was asked.
            told = str(error)
            if isinstance(error, RuntimeError) and (
                "already exists" in told or "does not exist" in told or "status code 5" not in told
            ):
                raise
            raise lost(
                f"no answer from the Jobs API at {self.address}: {_first_line(error)}; give the address of the head node's"
                " dashboard (--address http://HOST:8265), and see that the cluster runs and the port can be reached from here"
            ) from None


def _connect(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard.modules.job.sdk", "dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
    if "://" not in address and address.endswith(f":{DASHBOARD_PORT}"):
        address = f"http://{address}"
    host, _, port = address.rpartition(":")
    if "://" not in address and port.isdigit():  # of Ray itself; its own attempts to connect write to standard error
        socket.create_connection((host, int(port)), CALL_TIMEOUT_S / 3).close()
    # The client gives both variables precedence over the address it is called with.
    kept = {name: os.environ.pop(name, None) for name in ADDRESS_VARIABLES}
    try:
        return JobSubmissionClient(address, headers=_token_header())
    finally:
        os.environ.update({name: value for name, value in kept.items() if value is not None})


def _token_header() -> dict[str, str]:
    """Ray's own client sends the token only where RAY_AUTH_MODE says so; a cluster that asks for one needs it anyway."""
    if (os.environ.get("RAY_AUTH_MODE") or "token").lower() != "token":
        return {}
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not token and file.is_file():
        token = file.read_text().strip()
    return {"Authorization": f"Bearer {token}"} if token else {}


def _within(timeout_s: float, call: Callable[[], T]) -> T:
    """What `call` returns or raises; TimeoutError when that takes longer. The call itself cannot be ended."""
    outcome: queue.Queue[tuple[bool, Any]] = queue.Queue()

    def work() -> None:
        try:
            outcome.put((True, call()))
        except BaseException as error:
            outcome.put((False, error))

    threading.Thread(target=work, daemon=True, name="ray-jobs-call").start()
    try:
        succeeded, value = outcome.get(timeout=timeout_s)
    except queue.Empty:
        raise TimeoutError(f"nothing within {timeout_s:.0f} s") from None
    if not succeeded:
        raise value
    return cast(T, value)


def _job(details: Any) -> Job:
    metadata = details.metadata or {}
    exit_code = details.driver_exit_code
    return Job(
        submission_id=details.submission_id,
        command=metadata.get(f"{METADATA}command") or details.entrypoint,
        root=metadata.get(f"{METADATA}root", ""),
        state=str(details.status.value),
        started_at=details.start_time / 1000 if details.start_time else None,
        ended_at=details.end_time / 1000 if details.end_time else None,
        exit_code=int(exit_code) if exit_code is not None else None,
        message=details.message or "",
        submitted_by=metadata.get(f"{METADATA}submitted_by", ""),
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

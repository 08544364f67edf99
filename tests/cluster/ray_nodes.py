"""A Ray cluster of several nodes on this machine, each with its own raylet and, where the system allows it, its own /tmp.

The nodes share no folder that anything is written to. `unshare` gives each a mount namespace in which /tmp is its own folder (needs
user namespaces or root); elsewhere each has a temporary folder of its own only. The token of Ray's authentication is on.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path

START_TIMEOUT_S = 90.0
POLL_S = 0.1
OBJECT_STORE_BYTES = 100_000_000
# A node that is gone is found out in about 3 s in place of 15 s.
QUICK_HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "2",
}


class Node:
    """A started node: a raylet, its agents and its workers; the head also has the GCS and the dashboard."""

    def __init__(self, name: str, arguments: list[str], environment: Mapping[str, str]) -> None:
        self.name = name
        # Not pytest's tmp_path: the path of a unix socket must be shorter than about 100 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix=f"vm-{name}-", dir="/tmp"))
        self._log = self.folder / "start.log"
        start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *arguments]
        if own_tmp_is_possible():
            script = f"mount --bind {self.folder} /tmp && exec {shlex.join([*start, '--temp-dir=/tmp/ray'])}"
            start = ["unshare", "--map-root-user", "--mount", "sh", "-c", script]
        else:
            start += [f"--temp-dir={self.folder}/ray"]
        with self._log.open("wb") as output:
            # A session of its own: it can be ended as a whole, and nothing else of this machine with it.
            self._process = subprocess.Popen(
                start,
                cwd="/",
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_started(self) -> None:
        """AssertionError with the log if it ends or takes too long."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while self._process.poll() is None and time.monotonic() < deadline:
            if b"Ray runtime started" in self._log.read_bytes():
                return
            time.sleep(POLL_S)
        raise AssertionError(f"{self.name} did not start:\n{self._log.read_text(errors='replace')[-4000:]}")

    def pids(self) -> list[int]:
        """Its living processes."""
        return [int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit() and self._owns(entry.name)]

    def _owns(self, pid: str) -> bool:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return False
        return int(fields[3]) == self._process.pid and fields[0] not in "ZX"

    def kill(self) -> None:
        """Everything at once, as when the machine loses its power."""
        while left := self.pids():
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(POLL_S)
        self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


class RayNodes:
    """A head without CPU slots for work, and nodes that can be added and killed. Close it at the end."""

    def __init__(self, environment: Mapping[str, str] | None = None, head_cpus: int = 0) -> None:
        self._environment = {**(os.environ if environment is None else environment), **QUICK_HEALTH_CHECKS}
        self._environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        for name in ("PYTHONPATH", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            self._environment.pop(name, None)
        self.gcs_address = f"127.0.0.1:{free_port()}"
        self.address = f"http://127.0.0.1:{(dashboard := free_port())}"
        self._nodes: dict[str, Node] = {}
        arguments = ["--head", "--node-ip-address=127.0.0.1", f"--port={self.gcs_address.rpartition(':')[2]}"]
        arguments += ["--include-dashboard=true", f"--dashboard-port={dashboard}", "--disable-usage-stats"]
        arguments += [f"--ray-client-server-port={free_port()}"]
        self._start("head", head_cpus, 0, arguments).wait_started()

    def add(self, *names: str, num_cpus: int = 2, num_gpus: int = 0) -> None:
        """Start nodes of that many slots; returns when all are up."""
        arguments = [f"--address={self.gcs_address}", "--node-ip-address=127.0.0.1"]
        for node in [self._start(name, num_cpus, num_gpus, arguments) for name in names]:
            node.wait_started()

    def _start(self, name: str, num_cpus: int, num_gpus: int, arguments: list[str]) -> Node:
        own = [f"--num-cpus={num_cpus}", f"--num-gpus={num_gpus}", f"--object-store-memory={OBJECT_STORE_BYTES}"]
        own += [f"--dashboard-agent-listen-port={free_port()}"]
        self._nodes[name] = Node(name, [*arguments, *own], self._environment)
        return self._nodes[name]

    def only(self, *names: str) -> None:
        """Have these nodes, of two slots each, beside the head, and no others."""
        for name in set(self.names) - {"head", *names}:
            self.kill(name)
        self.add(*[name for name in names if name not in self.names])

    @property
    def names(self) -> list[str]:
        """Living nodes, the head among them."""
        return list(self._nodes)

    def kill(self, name: str) -> None:
        """End a node without a warning."""
        self._nodes.pop(name).kill()

    def pids(self, name: str, title: str = "") -> list[int]:
        """Living processes of a node; with a title, as Ray gives them to its workers, those whose title holds it."""
        return [pid for pid in self._nodes[name].pids() if title in _title(pid)]

    def close(self) -> None:
        """End all nodes."""
        for name in self.names[::-1]:
            self.kill(name)


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


@cache
def own_tmp_is_possible() -> bool:
    """Whether a process here may mount a /tmp of its own, and still finds its Python and this checkout."""
    if any(Path(place).is_relative_to("/tmp") for place in (sys.prefix, sys.executable, __file__)):
        return False
    trial = ["unshare", "--map-root-user", "--mount", "sh", "-c", "mount --bind /var /tmp"]
    try:
        return subprocess.run(trial, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

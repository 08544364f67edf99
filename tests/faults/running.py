"""A command with all its processes: start it, see what it consists of, kill one, wait with a bound, clear up after it.

The command is the leader of a session of its own. Ray puts its workers into process groups of their own, but nothing
that Ray starts leaves the session: so its members are the command's processes, whoever their parent is by now.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parents[2]
POLL_S = 0.05
ROLES = ("driver", "worker", "raylet", "gcs_server", "other")
RAY_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


@dataclass(frozen=True)
class Process:
    """A living process of a command. `name` is for messages."""

    pid: int
    role: str  # one of ROLES
    name: str


class Running:
    """A started command. Use it as a context manager: what is left of it is killed at the end."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="vm-run-")
        self._out, self._err = (Path(self._folder.name, name) for name in ("stdout", "stderr"))
        self.started = time.monotonic()
        with self._out.open("wb") as out, self._err.open("wb") as err:
            # faulthandler: SIGABRT makes a driver that hangs say where.
            self._driver = subprocess.Popen(
                command,
                cwd=REPO_ROOT,
                env={**environment, "PYTHONFAULTHANDLER": "1"},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
                # A shell that runs the tests in the background has them ignore Ctrl-C, which commands would inherit.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )
        self.pid = self._driver.pid

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *exception: object) -> None:
        self.clear(0.0)
        self._folder.cleanup()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    @property
    def returncode(self) -> int | None:
        """Exit status of the driver, minus the signal that ended it; None while it runs."""
        return self._driver.poll()

    def wait(self, timeout_s: float) -> bool:
        """Whether the driver has ended within `timeout_s`."""
        try:
            self._driver.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def wait_stopped(self, timeout_s: float) -> bool:
        """Whether the driver has been stopped (SIGSTOP) within `timeout_s`; False when it ended instead."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and self.returncode is None:
            if _status(self.pid)[0] == "T":
                return True
            time.sleep(POLL_S)
        return False

    def resume(self) -> None:
        """Let a stopped driver go on."""
        os.kill(self.pid, signal.SIGCONT)

    def processes(self) -> list[Process]:
        """All that live now, the driver among them."""
        found = []
        for entry in os.scandir("/proc"):
            if entry.name.isdigit() and _session_of(int(entry.name)) == self.pid:
                process = self._described(int(entry.name))
                if process is not None:
                    found.append(process)
        return found

    def _described(self, pid: int) -> Process | None:
        """None when it has ended meanwhile, or is only waiting to be reaped."""
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return None
        if _status(pid)[0] in "ZX":
            return None
        command = " ".join(word.decode(errors="replace") for word in words if word)
        program = os.path.basename(command.partition(" ")[0])
        if pid == self.pid:
            return Process(pid, "driver", "driver")
        if program in ("raylet", "gcs_server"):
            return Process(pid, program, program)
        if command.startswith("ray::") and not command.startswith(RAY_AGENTS):
            return Process(pid, "worker", command.strip())
        scripts = [os.path.basename(word) for word in command.split() if word.endswith(".py")]
        return Process(pid, "other", (scripts or [command.strip() or "?"])[0])

    def kill(self, process: Process) -> bool:
        """SIGKILL to one of its processes; whether it was still there."""
        if _session_of(process.pid) != self.pid:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
            return True
        return False

    def clear(self, grace_s: float) -> list[str]:
        """Wait until no process is left; names of those that live on after `grace_s`. They are killed."""
        deadline = time.monotonic() + grace_s
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        names = [process.name for process in left]
        while left:
            for process in left:
                self.kill(process)
            time.sleep(POLL_S)
            left = self.processes()
        self._driver.wait()
        return names

    @property
    def stdout(self) -> str:
        return self._out.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return self._err.read_text(errors="replace")

    def dump(self) -> str:
        """What a command that hangs is made of and where its driver stands; the driver is ended by it (SIGABRT)."""
        lines = [f"{process.pid} {process.role} {process.name}" for process in self.processes()]
        if self.returncode is None:
            self._driver.send_signal(signal.SIGABRT)
            self.wait(5.0)
        return "\n".join([f"after {self.seconds:.0f} s:", *lines, self.stderr[-6000:]])


def _status(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on (the name before it may hold anything); ["X"] when it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ["X"]
    return text.rpartition(")")[2].split()


def _session_of(pid: int) -> int:
    fields = _status(pid)
    return int(fields[3]) if len(fields) > 3 else -1

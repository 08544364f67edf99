"""Private memory of a driver and of the Ray processes that it started on this machine, sampled from /proc (Linux).

Private: pages of the process's own; not shared memory, nor the libraries' code. Processes are told by a marker in their environment, which those that Ray starts inherit.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path

PROC = Path("/proc")
DRIVER, ENCODER, TASK, SYSTEM = "driver", "encoder", "task", "ray"


def private_bytes(pid: int | str = "self") -> int:
    """Bytes of a process's own pages. Raises OSError when it has ended, 0 for this process without /proc."""
    return _bytes_of(pid, "RssAnon")


def mapped_bytes(pid: int | str = "self") -> int:
    """Bytes of mapped files, above all the libraries' code, which processes of a machine share. Errors as above."""
    return _bytes_of(pid, "RssFile")


def _bytes_of(pid: int | str, field_name: str) -> int:
    status = PROC / str(pid) / "status"
    if pid == "self" and not status.exists():
        return 0
    lines = status.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field_name)), 0)


@dataclass
class ProcessSampler:
    """Samples from `with` to its end. `peaks[stage, kind]`: most that one process of the kind held in the stage."""

    driver_pid: int
    marker: str  # NAME=value
    interval_s: float = 0.05
    stage: str = "start"
    peaks: dict[tuple[str, str], int] = field(default_factory=dict)
    system_bytes: int = 0  # most of all of Ray's own processes together
    _kinds: dict[int, str | None] = field(default_factory=dict)
    _ended: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> ProcessSampler:
        self._thread = threading.Thread(target=self._run, daemon=True, name="process-sampler")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        assert self._thread is not None
        self._thread.join()

    def peak(self, kind: str, *stages: str) -> int:
        """Most that one process of the kind held in any of the stages (none named: in all)."""
        return max(
            (size for (s, k), size in self.peaks.items() if k == kind and (not stages or s in stages)), default=0
        )

    def _run(self) -> None:
        while not self._ended.wait(self.interval_s):
            stage, system = self.stage, 0
            for entry in os.listdir(PROC):
                if not entry.isdigit():
                    continue
                try:
                    kind = self._kind(int(entry))
                    size = private_bytes(entry) if kind else 0
                except OSError:  # it ended meanwhile
                    continue
                if kind == SYSTEM:
                    system += size
                elif kind:
                    self.peaks[stage, kind] = max(self.peaks.get((stage, kind), 0), size)
            self.system_bytes = max(self.system_bytes, system)

    def _kind(self, pid: int) -> str | None:
        if pid == self.driver_pid:
            return DRIVER
        if pid not in self._kinds:
            marked = self.marker.encode() in (PROC / str(pid) / "environ").read_bytes().split(b"\0")
            self._kinds[pid] = SYSTEM if marked else None
        if self._kinds[pid] is None:
            return None
        command = (PROC / str(pid) / "cmdline").read_bytes()
        if not command.startswith(b"ray::"):
            return SYSTEM
        if b"EncodeStage" in command:
            return ENCODER
        own = (b"_StatsActor", b"Autoscaling", b"LocationTracker", b"Agent")
        return SYSTEM if any(name in command for name in own) else TASK

"""Memory of a process and all that it started, sampled from /proc (Linux).

PSS counts a page that several processes share once over all of them, so the object store's shared memory and the
libraries' code are in the sum once. Where PSS cannot be read: private pages (RssAnon) of each process, and the largest
shared memory (RssShmem) that any of them sees, once.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

PROC = Path("/proc")
KINDS = ("driver", "encoders", "tasks", "ray system")


@dataclass(frozen=True)
class Sample:
    """Bytes at one moment. `shared` (object store and other shared memory) is part of the sum of `by_kind`."""

    time: float  # CLOCK_MONOTONIC
    by_kind: dict[str, int]
    shared: int
    num_processes: int

    @property
    def total(self) -> int:
        """Bytes of all processes together."""
        return sum(self.by_kind.values())


@dataclass
class MemorySampler:
    """Samples from `start` to `stop`. `marker` NAME=value stands in the environment of every process that counts."""

    root_pid: int
    marker: bytes
    interval_s: float = 0.2
    samples: list[Sample] = field(default_factory=list)
    pss: bool = True
    _marked: dict[int, bool] = field(default_factory=dict)
    _stopped: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin sampling in a thread."""
        self._thread = threading.Thread(target=self._run, daemon=True, name="memory-sampler")
        self._thread.start()

    def stop(self) -> list[Sample]:
        """End sampling; all samples."""
        self._stopped.set()
        assert self._thread is not None
        self._thread.join()
        return self.samples

    def _run(self) -> None:
        while not self._stopped.is_set():
            began = time.monotonic()
            self.samples.append(self._sample(began))
            self._stopped.wait(max(0.0, self.interval_s - (time.monotonic() - began)))

    def _sample(self, now: float) -> Sample:
        by_kind = dict.fromkeys(KINDS, 0)
        shared = shared_once = processes = 0
        for pid in self._pids():
            try:
                kind = self._kind(pid)
                private, shmem = self._read(pid)
            except (OSError, KeyError):  # it ended meanwhile
                continue
            by_kind[kind] += private + (shmem if self.pss else 0)
            shared += shmem
            shared_once = max(shared_once, shmem)
            processes += 1
        if not self.pss:
            shared = shared_once
            by_kind["ray system"] += shared_once
        return Sample(now, by_kind, shared, processes)

    def _pids(self) -> list[int]:
        """Processes that carry the marker; a process that Ray detached from its parent still does."""
        pids = [int(entry) for entry in os.listdir(PROC) if entry.isdigit()]
        for pid in pids:
            if pid not in self._marked:
                try:
                    self._marked[pid] = self.marker in (PROC / str(pid) / "environ").read_bytes().split(b"\0")
                except OSError:
                    continue
        return [pid for pid in pids if self._marked.get(pid)]

    def _kind(self, pid: int) -> str:
        if pid == self.root_pid:
            return "driver"
        command = (PROC / str(pid) / "cmdline").read_bytes()
        if not command.startswith(b"ray::"):
            return "ray system"
        if b"EncodeStage" in command:
            return "encoders"
        actor_of_ray = any(name in command for name in (b"_StatsActor", b"Autoscaling", b"LocationTracker"))
        return "ray system" if actor_of_ray else "tasks"

    def _read(self, pid: int) -> tuple[int, int]:
        """(other bytes, bytes of shared memory) of one process."""
        if self.pss:
            try:
                fields = _fields(PROC / str(pid) / "smaps_rollup")
                return fields["Pss"] - fields["Pss_Shmem"], fields["Pss_Shmem"]
            except (PermissionError, KeyError):
                self.pss = False
        fields = _fields(PROC / str(pid) / "status")
        return fields["RssAnon"], fields["RssShmem"]


def _fields(file: Path) -> dict[str, int]:
    """Bytes of the `name:  123 kB` lines of a file of /proc."""
    found = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            found[name] = int(value[:-3]) * 1024
    return found

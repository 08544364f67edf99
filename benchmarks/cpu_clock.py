"""CPU seconds of this process and of the Ray that it started, by kind of process, sampled from /proc (Linux)."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

PROC = Path("/proc")
KINDS = ("driver", "raylet", "gcs", "encoders", "tasks", "other")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class CpuClock:
    """Samples from the beginning of the block to its end; `between` gives what was used meanwhile."""

    def __init__(self, interval_s: float = 0.5) -> None:
        self._interval_s = interval_s
        self._last: dict[int, tuple[str, float]] = {}
        self._samples: list[tuple[float, dict[str, float]]] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="cpu-clock")

    def __enter__(self) -> CpuClock:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def between(self, begin: float, end: float) -> dict[str, float]:
        """CPU seconds by kind from `begin` to `end` (CLOCK_MONOTONIC), interpolated between samples."""
        first, last = self._at(begin), self._at(end)
        return {kind: last[kind] - first[kind] for kind in KINDS}

    def _at(self, moment: float) -> dict[str, float]:
        after = next((n for n, (when, _) in enumerate(self._samples) if when >= moment), len(self._samples) - 1)
        (t0, low), (t1, high) = self._samples[max(after - 1, 0)], self._samples[after]
        share = min(1.0, max(0.0, (moment - t0) / (t1 - t0))) if t1 > t0 else 1.0
        return {kind: low[kind] + share * (high[kind] - low[kind]) for kind in KINDS}

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._samples.append((time.monotonic(), self._used()))
            self._stopped.wait(self._interval_s)
        self._samples.append((time.monotonic(), self._used()))

    def _used(self) -> dict[str, float]:
        """CPU seconds so far; a process that ended keeps what it had used when it was last seen."""
        parents, stats = {}, {}
        for entry in os.listdir(PROC):
            if entry.isdigit():
                try:
                    fields = (PROC / entry / "stat").read_text().rsplit(")", 1)[1].split()
                except OSError:  # it ended meanwhile
                    continue
                parents[int(entry)] = int(fields[1])
                stats[int(entry)] = (int(fields[11]) + int(fields[12])) / TICKS_PER_S
        for pid, used in stats.items():
            if _descends(pid, os.getpid(), parents):
                kind = self._last[pid][0] if pid in self._last else "other"
                # An actor is named when it is ready.
                self._last[pid] = (_kind(pid) if kind in ("other", "tasks") else kind, used)
        totals = dict.fromkeys(KINDS, 0.0)
        for kind, used in self._last.values():
            totals[kind] += used
        return totals


def _descends(pid: int, ancestor: int, parents: dict[int, int]) -> bool:
    while pid and pid != ancestor:
        pid = parents.get(pid, 0)
    return pid == ancestor


def _kind(pid: int) -> str:
    if pid == os.getpid():
        return "driver"
    try:
        command = (PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return "other"
    program = command.split(b"\0")[0]
    if program.startswith(b"ray::"):
        if b"EncodeStage" in command:
            return "encoders"
        actor_of_ray = any(name in command for name in (b"_StatsActor", b"Autoscaling", b"LocationTracker"))
        return "other" if actor_of_ray else "tasks"
    return {b"raylet": "raylet", b"gcs_server": "gcs"}.get(os.path.basename(program), "other")

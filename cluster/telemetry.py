"""What workers measure of a piece or task, and how it gets to the driver and to Ray's metrics.

Every stage notes a span: where and when it ran, and what it asked of storage. Spans travel beside a piece's tables to the
driver and end there; nothing of them enters a commit record or anything that a digest covers.

Positions are seconds since 1970 that never step back within a process (a wall-clock anchor plus a monotonic clock), so
durations are exact; gaps between spans of two machines are as good as their clocks agree.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from operators.storage.traffic import Traffic, traffic

_HOST = socket.gethostname()
_ANCHOR = time.time() - time.monotonic()
TOKEN_BIN = 8  # width of the bins in which sequences are counted by their tokens
PIECE_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # buckets of the histogram
PREFIX = "vectormill_"


def now() -> float:
    """Seconds since 1970, by a clock that never steps back in this process."""
    return _ANCHOR + time.monotonic()


def worker_name() -> str:
    """`host:pid` of this process."""
    return f"{_HOST}:{os.getpid()}"


@dataclass(frozen=True)
class Span:
    """A stage's work on one piece, or a task: where, when, and what it asked of storage."""

    stage: str
    worker: str  # host:pid
    begin: float  # seconds since 1970
    seconds: float
    traffic: Traffic = field(default_factory=Traffic)
    gpu: tuple[float, float] | None = None  # mean utilisation 0..1 since the span before, bytes of memory in use

    @property
    def end(self) -> float:
        return self.begin + self.seconds

    def to_json(self) -> list[Any]:
        """As short as it can be: one travels with every stage of every piece."""
        used = self.traffic
        counts = [used.bytes_read, used.bytes_written, used.requests, used.retries]
        return [self.stage, self.worker, round(self.begin, 4), round(self.seconds, 6), counts, self.gpu]

    @staticmethod
    def from_json(fields: Sequence[Any]) -> Span:
        """Inverse of `to_json`."""
        stage, worker, begin, seconds, counts, gpu = fields
        return Span(stage, worker, begin, seconds, Traffic(*counts), (gpu[0], gpu[1]) if gpu else None)


class Stopwatch:
    """Runs from its making to `span`."""

    def __init__(self) -> None:
        self._before = traffic()
        self._begin = time.monotonic()

    def span(self, stage: str, *, retries: int = 0, gpu: tuple[float, float] | None = None) -> Span:
        """What passed since. retries: attempts that storage did not see."""
        seconds = time.monotonic() - self._begin
        used = traffic() - self._before
        if retries:
            used += Traffic(retries=retries)
        return Span(stage, worker_name(), _ANCHOR + self._begin, seconds, used, gpu)


def dump_spans(spans: Sequence[Span]) -> str:
    """Spans as they travel with a piece."""
    return json.dumps([span.to_json() for span in spans], separators=(",", ":"))


def load_spans(text: str | None) -> list[Span]:
    """Inverse of `dump_spans`; none for a row that lost them."""
    return [Span.from_json(fields) for fields in json.loads(text or "[]")]


def with_span(function: Callable[..., Any], stage: str) -> Callable[..., tuple[Any, Span]]:
    """The function, whose result comes with the span of the call."""

    @functools.wraps(function)
    def timed(*arguments: Any) -> tuple[Any, Span]:
        watch = Stopwatch()
        result = function(*arguments)
        return result, watch.span(stage)

    return timed


class RayMetrics:
    """Gauges, counters and histograms of this process, which Ray's agent exports to Prometheus as `ray_vectormill_...`.

    Without a Ray session every call does nothing. Metrics are made when they are first used.
    """

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def forget(self) -> None:
        """Make all metrics anew: those of another session are of no use in this one."""
        self._made.clear()

    def gauge(self, name: str, value: float, help_text: str, **tags: str) -> None:
        """Set a gauge."""
        if has_ray():
            from ray.util.metrics import Gauge

            self._metric(Gauge, name, help_text, tags).set(value, tags)

    def count(self, name: str, value: float, help_text: str, **tags: str) -> None:
        """Add to a counter; nothing is recorded for 0."""
        if value > 0 and has_ray():
            from ray.util.metrics import Counter

            self._metric(Counter, name, help_text, tags).inc(value, tags)

    def observe(self, name: str, value: float, help_text: str, **tags: str) -> None:
        """Add a value in seconds to a histogram."""
        if has_ray():
            from ray.util.metrics import Histogram

            kind = functools.partial(Histogram, boundaries=list(PIECE_SECONDS))
            self._metric(kind, name, help_text, tags).observe(value, tags)

    def _metric(self, kind: Callable[..., Any], name: str, help_text: str, tags: Mapping[str, str]) -> Any:
        if name not in self._made:
            self._made[name] = kind(PREFIX + name, description=help_text, tag_keys=tuple(tags))
        return self._made[name]


METRICS = RayMetrics()


def has_ray() -> bool:
    """Whether this process is part of a Ray session. Does not import Ray."""
    ray = sys.modules.get("ray")
    return ray is not None and hasattr(ray, "is_initialized") and bool(ray.is_initialized())


def observe_span(span: Span) -> None:
    """Tell Ray's metrics how long a stage of a piece took in this worker."""
    METRICS.observe("piece_seconds", span.seconds, "Seconds of a stage's work on one piece", stage=span.stage)

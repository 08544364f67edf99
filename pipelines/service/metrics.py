"""What the service counts, for Prometheus. A registry of its own for each application, so that tests do not share one."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from operators.artifact.row_groups import RowGroups

LATENCY_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
STAGES = ("queue", "encode", "search", "rows")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """All metrics of one replica. Labels take values from fixed sets only."""

    def __init__(self) -> None:
        disable_created_metrics()
        self.registry = CollectorRegistry()
        # The library's own look for labels takes longer than counting.
        self._answers: dict[tuple[str, int], Counter] = {}
        self._latencies: dict[str, Histogram] = {}
        registry = self.registry
        self.requests = Counter(
            "vectormill_requests", "Answers, by route and status.", ["route", "status"], registry=registry
        )
        self.request_s = Histogram(
            "vectormill_request_seconds",
            "From the request's head to its answer.",
            ["route"],
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        stage_s = Histogram(
            "vectormill_stage_seconds",
            "Time of a search in each stage; queue: all waiting. A stage is that of the whole batch.",
            ["stage"],
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.stage_s = {stage: stage_s.labels(stage) for stage in STAGES}
        batch = Histogram(
            "vectormill_batch_queries",
            "Queries that were worked on together.",
            ["stage"],
            buckets=BATCH_BUCKETS,
            registry=registry,
        )
        self.batch = {stage: batch.labels(stage) for stage in ("encode", "search")}
        self.queries = Counter("vectormill_queries", "Queries answered, by form.", ["form"], registry=registry)
        self.refused = Counter(
            "vectormill_refused", "Requests refused, by the code of the error.", ["code"], registry=registry
        )
        self.waiting = Gauge("vectormill_queue_queries", "Queries that wait or are being worked on.", registry=registry)
        self.queue_limit = Gauge(
            "vectormill_queue_limit_queries", "Queries beyond which requests are refused.", registry=registry
        )
        self.index_info = Gauge(
            "vectormill_index_info", "The version that is served: always 1.", ["version"], registry=registry
        )
        self.index_vectors = Gauge(
            "vectormill_index_vectors", "Live vectors of the version that is served.", registry=registry
        )
        self.index_age = Gauge(
            "vectormill_index_version_age_seconds", "Since the version that is served was made.", registry=registry
        )
        self.opened = Gauge(
            "vectormill_index_opened_timestamp_seconds",
            "When the version that is served was opened.",
            registry=registry,
        )
        self.swaps = Counter("vectormill_index_swaps", "Changes to another version.", registry=registry)
        self.swap_failures = Counter(
            "vectormill_index_swap_failures",
            "Looks for a new version, or openings of one, that failed.",
            registry=registry,
        )
        self.swap_s = Histogram(
            "vectormill_index_swap_seconds",
            "Opening and warming of a new version.",
            buckets=(0.1, 0.5, 1, 2, 5, 10, 30, 60, 300),
            registry=registry,
        )
        row_groups = Counter(
            "vectormill_row_groups", "Row groups asked for, by where they were.", ["found"], registry=registry
        )
        self._groups_found, self._groups_read = row_groups.labels("cache"), row_groups.labels("storage")
        self.row_cache = Gauge("vectormill_row_cache_bytes", "Decoded row groups that are kept.", registry=registry)

    def read_rows(self, groups: RowGroups) -> None:
        """Count what was asked of the row groups since the last call. By one thread."""
        found, read = groups.take_counts()
        self._groups_found.inc(found)
        self._groups_read.inc(read)
        self.row_cache.set(groups.held_bytes)

    def searched(self, form: str, num_queries: int, took_s: dict[str, float]) -> None:
        """A search was answered."""
        for stage, seconds in took_s.items():
            self.stage_s[stage].observe(seconds)
        self.queries.labels(form).inc(num_queries)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """A request was answered; 0: its client did not wait."""
        counter = self._answers.get((route, status))
        if counter is None:
            counter = self._answers[route, status] = self.requests.labels(route, str(status or 499))
        counter.inc()
        histogram = self._latencies.get(route)
        if histogram is None:
            histogram = self._latencies[route] = self.request_s.labels(route)
        histogram.observe(seconds)

    def exposition(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)

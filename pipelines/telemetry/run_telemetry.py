"""What a run has done so far and how fast, put together by the driver from the spans of its pieces and tasks.

One object a run (`RunProgress.telemetry`): the displays ask it for `live`, the sidecar beside the manifest is `to_json`.
Its size does not grow with the corpus.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.telemetry import TOKEN_BIN, Span, now
from operators.storage.traffic import Traffic
from pipelines.telemetry.piece_flow import PieceFlow, Work

FORMAT = 1


@dataclass
class Stage:
    """A stage of the run. Positions are seconds since 1970."""

    name: str
    begin: float
    total: int | None
    done_before: int  # by earlier attempts
    units: int = 0  # done by this one
    end: float | None = None
    failed: bool = False
    tasks: Work = field(default_factory=Work)

    def seconds(self) -> float:
        """How long it took, or has taken so far."""
        return (self.end if self.end is not None else now()) - self.begin

    def to_json(self, run_begin: float) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "name": self.name,
            "begin_s": round(self.begin - run_begin, 3),
            "seconds": round(self.seconds(), 3),
            "total": self.total,
            "done_before": self.done_before,
            "units": self.units,
            "failed": self.failed,
            "tasks": self.tasks.to_json(),
        }


class RunTelemetry:
    """Stages, pieces and tasks of a run, and the series of its throughput."""

    def __init__(self) -> None:
        self.begin = now()
        self.stages: list[Stage] = []
        self.pieces = PieceFlow(self.begin)

    def seconds(self) -> float:
        """How long the run has taken so far."""
        return now() - self.begin

    def stage(self, name: str, total: int | None, done: int) -> Stage:
        """A stage begins."""
        self.stages.append(Stage(name, now(), total, done))
        return self.stages[-1]

    def end_stage(self, failed: bool = False) -> None:
        """The running stage ends."""
        if self.stages and self.stages[-1].end is None:
            self.stages[-1].end = now()
            self.stages[-1].failed = failed

    def task_done(self, span: Span) -> None:
        """A task of the running stage has ended."""
        if self.stages:
            self.stages[-1].tasks.add(span)

    def note_records(self, facts: Iterable[Mapping[str, Any]]) -> None:
        """What the commit records of all pieces say, those of earlier attempts included."""
        for each in facts:
            lengths = each.get("token_lengths", {})
            self.pieces.token_lengths.update({int(low): count for low, count in lengths.items()})

    def traffic(self) -> Traffic:
        """What workers and tasks have asked of storage so far."""
        works = [*self.pieces.stages.values(), *(stage.tasks for stage in self.stages)]
        return sum((work.traffic for work in works), Traffic())

    def live(self, stage: Stage) -> dict[str, Any]:
        """The running stage as it is now: units, rates, what is left."""
        facts: dict[str, Any] = {
            "done": stage.done_before + stage.units,
            "total": stage.total,
            "resumed": stage.done_before,
            "seconds": stage.seconds(),
        }
        seconds = stage.seconds()
        facts["eta_s"] = seconds / stage.units * (stage.total - facts["done"]) if stage.total and stage.units else None
        return facts | stage.tasks.traffic.to_json() if stage.tasks.count else facts

    def to_json(self) -> dict[str, Any]:
        """The run as it is stored beside the manifest of the version that it made (docs/telemetry.md)."""
        return {
            "format": FORMAT,
            "began_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.begin)),
            "seconds": round(self.seconds(), 3),
            "stages": [stage.to_json(self.begin) for stage in self.stages],
            "pieces": self.pieces.to_json(self.begin),
            "storage": self.traffic().to_json(),
            "token_lengths": {"bin": TOKEN_BIN, "counts": dict(sorted(self.pieces.token_lengths.items()))},
            "series": self.pieces.series(self.begin),
        }

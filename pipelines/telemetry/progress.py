"""Progress of a run, always on standard error, so that --json stays clean; and the telemetry that it is made of.

On a terminal bars, elsewhere one line a stage, or JSON lines for machines (docs/telemetry.md): `--progress`, or the
environment's VECTORMILL_PROGRESS.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from cluster.telemetry import METRICS, Span
from operators.errors import ConfigError
from pipelines.telemetry.progress_views import BarsView, JsonView, LinesView, View
from pipelines.telemetry.run_telemetry import RunTelemetry, Stage

if TYPE_CHECKING:
    from cluster.parcels import PieceResult
    from operators.sources.pieces import Piece

STYLES = ("auto", "bars", "lines", "json")
VARIABLE = "VECTORMILL_PROGRESS"
UPDATE_EVERY_S = 1.0
STARTING = "encoders load the model"  # until the first piece is done


class RunProgress:
    """Stages of a run in order. `stage` ends the one before; `stages` keeps the seconds that each took."""

    def __init__(self, *, quiet: bool = False, style: str | None = None) -> None:
        """style: one of STYLES; None: as the environment says, else auto. Raises ConfigError for another one."""
        chosen = _style(style)
        # A duplicate of standard error: the session closes the original for a moment while Ray starts.
        terminal = os.fdopen(os.dup(2), "w") if sys.stderr.isatty() else sys.stderr
        self._view: View
        if quiet:
            self._view = View()
        elif chosen == "json":
            self._view = JsonView(terminal)
        elif chosen == "bars" or (chosen == "auto" and terminal.isatty()):
            self._view = BarsView(terminal)
        else:
            self._view = LinesView(terminal)
        self.telemetry = RunTelemetry()
        self._running: Stage | None = None
        self._name = ""
        self._note = ""
        self._updated = 0.0
        self._streaming = False
        self.stages: dict[str, float] = {}

    def __enter__(self) -> RunProgress:
        self._view.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_stage(failed=error is not None)
        self._view.stop(self.telemetry.seconds(), failed=error is not None)

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None:
        """Begin a stage of `total` units, `done` of which an earlier attempt committed."""
        self._end_stage()
        self._name, self._note = name, ""
        self._streaming = False
        self._running = self.telemetry.stage(name, total, done)
        self._updated = time.monotonic()
        self._view.begin(name, self._facts())

    def advance(self, units: int = 1, note: str | None = None) -> None:
        """Units done in the running stage; `note` replaces the text beside it."""
        if note is not None:
            self._note = note
        if self._running is not None:
            self._running.units += units
            self.tick()

    def say(self, text: str) -> None:
        """A line of its own."""
        self._view.say(text)

    def expect_pieces(self, pieces: Sequence[Piece], missing: Iterable[Piece], encoders: int, in_process: bool) -> None:
        """The running stage streams these pieces; those that are not missing were committed before."""
        self._streaming = True
        self.telemetry.pieces.expect(pieces, missing, encoders, in_process)

    def piece_done(self, result: PieceResult) -> None:
        """A piece of the streaming job has ended, well or not."""
        self.telemetry.pieces.add(result)
        _count_piece(result)
        if result.error is None:
            self.advance()

    def task_done(self, span: Span) -> None:
        """A task of the running stage has ended."""
        self.telemetry.task_done(span)
        self.advance()

    def published(self, version: str, rows: Mapping[str, Any], content_digest: str) -> None:
        """The version is the published one from now on."""
        self._view.published({"version": version, "rows": rows, "content_digest": content_digest})

    def tick(self) -> None:
        """Bring display and metrics up to date, at most once a second. Cheap: call it as often as you like."""
        if self._running is not None and time.monotonic() - self._updated >= UPDATE_EVERY_S:
            self._updated = time.monotonic()
            facts = self._facts()
            self._view.update(self._name, facts)
            _show_stage(self._name, facts)

    def _facts(self) -> dict[str, Any]:
        assert self._running is not None
        facts = self.telemetry.live(self._running)
        if self._streaming:
            facts |= self.telemetry.pieces.live() or {"note": STARTING}
        return {**facts, "note": self._note} if self._note else facts

    def _end_stage(self, failed: bool = False) -> None:
        if self._running is None:
            return
        self.telemetry.end_stage(failed)
        seconds = self._running.seconds()
        self.stages[self._name] = self.stages.get(self._name, 0.0) + seconds
        facts = self._facts()
        if self._streaming:
            facts.pop("note", None)
            facts |= self.telemetry.pieces.totals()
        self._view.end(self._name, facts, failed)
        _show_stage(self._name, facts)
        self._running = None


def _style(given: str | None) -> str:
    asked, where = (given, "--progress") if given else (os.environ.get(VARIABLE) or "auto", VARIABLE)
    if asked not in STYLES:
        raise ConfigError(f"progress must be shown as one of {', '.join(STYLES)}, got {asked!r} ({where})")
    return asked


def _count_piece(result: PieceResult) -> None:
    """Ray's counters of what went through."""
    used = [span.traffic for span in result.spans]
    METRICS.count("storage_bytes", sum(t.bytes_read for t in used), "Bytes of the pieces", direction="read")
    METRICS.count("storage_bytes", sum(t.bytes_written for t in used), "Bytes of the pieces", direction="written")
    METRICS.count("storage_retries", sum(t.retries for t in used), "Requests to storage that were repeated")
    METRICS.count("pieces", 1, "Pieces that ended", outcome="failed" if result.error else "encoded")
    if result.error is None:
        METRICS.count("rows", result.facts["num_rows_read"], "Rows read")
        METRICS.count("tokens", result.facts["num_tokens"], "Tokens encoded")
        for outcome in ("rejected", "dropped"):
            for reason, number in result.facts[outcome].items():
                METRICS.count("rows_left_out", number, "Rows left out", outcome=outcome, reason=reason)


GAUGES = {
    "done": ("stage_units_done", "Units of the stage that are done, those of earlier attempts included"),
    "total": ("stage_units", "Units of the stage"),
    "eta_s": ("stage_eta_seconds", "Seconds until the stage ends, at its rate so far"),
    "rows_per_s": ("rows_per_second", "Rows encoded per second, over the last half minute"),
    "tokens_per_s": ("tokens_per_second", "Tokens encoded per second, over the last half minute"),
    "busy_share": ("encoder_busy_share", "Share of their time in which the encoders encode"),
    "queue": ("pieces_waiting", "Pieces that wait for an encoder"),
}


def _show_stage(name: str, facts: Mapping[str, Any]) -> None:
    """Ray's gauges of the running stage."""
    for fact, (gauge, help_text) in GAUGES.items():
        if facts.get(fact) is not None:
            METRICS.gauge(gauge, float(facts[fact]), help_text, stage=name)

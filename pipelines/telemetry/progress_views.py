"""The ways in which a run's progress is shown: bars on a terminal, a line a stage, JSON lines, nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from cluster.telemetry import now

HEARTBEAT_S = 10.0  # of JSON lines while nothing changes
BAR_WIDTH = 20


class View:
    """Shows nothing."""

    def start(self) -> None:
        """The run begins."""

    def stop(self, seconds: float, failed: bool) -> None:
        """The run ends."""

    def begin(self, stage: str, facts: Mapping[str, Any]) -> None:
        """A stage begins. facts: `done`, `total`, `seconds`, `eta_s`, and of a stage that encodes rates."""

    def update(self, stage: str, facts: Mapping[str, Any]) -> None:
        """The stage goes on; about once a second."""

    def end(self, stage: str, facts: Mapping[str, Any], failed: bool) -> None:
        """The stage ends."""

    def say(self, text: str) -> None:
        """A message."""

    def published(self, facts: Mapping[str, Any]) -> None:
        """A version is published."""


class LinesView(View):
    """A line for each stage when it ends."""

    def __init__(self, file: TextIO) -> None:
        self._console = Console(file=file)

    def end(self, stage: str, facts: Mapping[str, Any], failed: bool) -> None:
        said = rates_text(facts)
        note = f"  {said}" if said else ""
        self.say(f"{stage:<22} {'failed after ' if failed else ''}{facts['seconds']:6.1f} s{note}")

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


class _Display(Progress):
    """The stages as a table, and below it what the running one does."""

    status = Text()

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.status:
            yield self.status


class BarsView(View):
    """A bar for each stage; below the running one its rates. Fits 80 columns."""

    def __init__(self, file: TextIO) -> None:
        self._console = Console(file=file)
        self._display = _Display(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description:<21}", markup=False),
            BarColumn(bar_width=BAR_WIDTH),
            TextColumn("{task.fields[count]}", justify="right", style="progress.download", markup=False),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", style="cyan", markup=False),
            console=self._console,
        )
        self._task: TaskID | None = None

    def start(self) -> None:
        self._display.start()

    def stop(self, seconds: float, failed: bool) -> None:
        self._display.status = Text()
        self._display.stop()

    def begin(self, stage: str, facts: Mapping[str, Any]) -> None:
        total = None if facts["total"] == 1 else facts["total"]  # one unit has no middle: the bar only moves
        self._task = self._display.add_task(stage, total=total, completed=facts["done"], left="", count=_count(facts))
        self._show(facts)

    def update(self, stage: str, facts: Mapping[str, Any]) -> None:
        assert self._task is not None
        left = f"eta {duration(facts['eta_s'])}" if facts.get("eta_s") is not None else ""
        self._display.update(self._task, completed=facts["done"], left=left, count=_count(facts))
        self._show(facts)

    def _show(self, facts: Mapping[str, Any]) -> None:
        said = rates_text(facts, live=True)
        self._display.status = Text(f"  {said}", style="dim", no_wrap=True, overflow="ellipsis") if said else Text()

    def end(self, stage: str, facts: Mapping[str, Any], failed: bool) -> None:
        assert self._task is not None
        left = f"{facts['rows_per_s']:,.0f} rows/s" if facts.get("rows_per_s") else ""
        if failed:
            self._display.update(self._task, completed=facts["done"], left="failed")
        else:
            total = facts["total"] or max(1, facts["done"])
            self._display.update(self._task, total=total, completed=total, left=left, count=_count(facts))
        self._display.stop_task(self._task)
        self._display.status = Text()

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)


class JsonView(View):
    """One JSON object a line (docs/telemetry.md): begin and end of stages, progress about once a second."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._last: tuple[Any, float] = (None, 0.0)

    def start(self) -> None:
        self._write("begin", {})

    def stop(self, seconds: float, failed: bool) -> None:
        self._write("end", {"seconds": seconds, "failed": failed})

    def begin(self, stage: str, facts: Mapping[str, Any]) -> None:
        kept = {name: facts[name] for name in ("done", "total", "resumed")}
        self._write("stage_begin", {"stage": stage, **kept})
        self._last = (facts["done"], time.monotonic())

    def update(self, stage: str, facts: Mapping[str, Any]) -> None:
        if facts["done"] == self._last[0] and time.monotonic() - self._last[1] < HEARTBEAT_S:
            return
        self._last = (facts["done"], time.monotonic())
        self._write("progress", {"stage": stage, **facts})

    def end(self, stage: str, facts: Mapping[str, Any], failed: bool) -> None:
        kept = {name: value for name, value in facts.items() if name != "eta_s"}
        self._write("stage_end", {"stage": stage, **kept, "failed": failed})

    def say(self, text: str) -> None:
        self._write("message", {"text": text})

    def published(self, facts: Mapping[str, Any]) -> None:
        self._write("published", facts)

    def _write(self, event: str, facts: Mapping[str, Any]) -> None:
        rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in facts.items()}
        line = {"event": event, "at": round(now(), 3), **rounded}
        print(json.dumps(line, ensure_ascii=False, allow_nan=False), file=self._file, flush=True)


def _count(facts: Mapping[str, Any]) -> str:
    """`12/40`; nothing for a stage of one unit."""
    return f"{facts['done']:,}/{facts['total']:,}" if (facts["total"] or 1) > 1 else ""


def rates_text(facts: Mapping[str, Any], live: bool = False) -> str:
    """`322 rows/s  10,610 tokens/s  busy 97%  queue 3.1`; the stage's note where there are no rates."""
    if "rows_per_s" not in facts:
        parts = [str(facts["note"])] if facts.get("note") else []
    else:
        parts = [f"{facts['rows_per_s']:,.0f} rows/s", f"{facts['tokens_per_s']:,.0f} tokens/s"]
        if facts.get("busy_share") is not None:
            parts.append(f"encoders {facts['busy_share']:.0%} busy")
        if live:
            parts.append(f"{facts['queue']:.1f} waiting")
        for name in ("retries", "rejected"):
            if facts.get(name):
                parts.append(f"{facts[name]:,} {name}")
    if facts.get("resumed"):
        parts.append(f"{facts['resumed']:,} resumed")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """`0:05`, `12:30`, `3:07:02`, `2d 04h`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d}"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours < 48 else f"{hours // 24}d {hours % 24:02d}h"

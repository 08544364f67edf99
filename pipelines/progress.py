"""Progress of a run: bars on a terminal, one line a stage elsewhere. Always on standard error, so that --json stays clean."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class RunProgress:
    """Stages of a run in order. `stage` ends the one before; `stages` keeps the seconds that each took."""

    def __init__(self, *, quiet: bool = False) -> None:
        # A duplicate of standard error: the session closes the original for a moment while Ray starts.
        terminal = os.fdopen(os.dup(2), "w") if sys.stderr.isatty() else sys.stderr
        self._console = Console(file=terminal, quiet=quiet)
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<22}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
            transient=False,
        )
        self._task: TaskID | None = None
        self._name = ""
        self._note = ""
        self._started = time.monotonic()
        self.stages: dict[str, float] = {}

    def __enter__(self) -> RunProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_stage(failed=error is not None)
        self._bars.stop()

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None:
        """Begin a stage of `total` units, `done` of which an earlier attempt committed."""
        self._end_stage()
        self._name, self._note = name, ""
        self._started = time.monotonic()
        self._task = self._bars.add_task(name, total=total, completed=done, note=f"({done} resumed)" if done else "")

    def advance(self, units: int = 1, note: str | None = None) -> None:
        """Units done in the running stage; `note` replaces the text beside the bar."""
        if note is not None:
            self._note = note
        if self._task is not None:
            self._bars.update(self._task, advance=units, note=self._note)

    def say(self, text: str) -> None:
        """A line above the bars."""
        self._console.print(text, highlight=False, markup=False)

    def _end_stage(self, failed: bool = False) -> None:
        if self._task is None:
            return
        seconds = time.monotonic() - self._started
        self.stages[self._name] = self.stages.get(self._name, 0.0) + seconds
        task = self._bars.tasks[self._bars.task_ids.index(self._task)]
        if not failed:
            self._bars.update(
                self._task, total=task.total or max(1, task.completed), completed=task.total or max(1, task.completed)
            )
        self._bars.stop_task(self._task)
        if not self._console.is_terminal:
            note = f"  {self._note}" if self._note else ""
            self.say(f"{self._name:<22} {'failed after ' if failed else ''}{seconds:6.1f} s{note}")
        self._task = None

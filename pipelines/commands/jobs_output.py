"""What the commands about jobs print: tables for people, facts for machines."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.job_log import JobEnd
from cluster.jobs import Job
from operators.errors import ResourceError
from pipelines.commands.failures import INTERRUPTED_EXIT_CODE
from pipelines.commands.output import WIDE


def exit_code(end: JobEnd) -> int:
    """What a command that followed the job exits with: the code of the job's own command, where it left one."""
    if end.job.state == "SUCCEEDED":
        return 0
    if end.job.state == "STOPPED":
        return INTERRUPTED_EXIT_CODE
    code = end.job.exit_code
    if code is None:
        return ResourceError.exit_code
    return code if code >= 0 else 128 - code


def job_facts(job: Job) -> dict[str, Any]:
    """What `--json` prints of a job."""
    ended = job.ended_at or time.time()
    return {
        "submission_id": job.submission_id,
        "command": job.command,
        "root": job.root,
        "state": job.state,
        "started_at": _clock(job.started_at),
        "seconds": round(ended - job.started_at, 1) if job.started_at else None,
        "exit_code": job.exit_code,
        "message": _message(job),
        "submitted_by": job.submitted_by,
    }


def _message(job: Job) -> str:
    """What is worth telling of Ray's message: the command's last line when it failed."""
    if job.state == "FAILED":
        lines = [line.strip() for line in job.message.splitlines() if line.strip()]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return (errors or lines or [""])[-1]
    return "" if job.state in ("SUCCEEDED", "RUNNING") else " ".join(job.message.split())


def _clock(seconds: float | None) -> str | None:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds)) if seconds else None


def show_jobs(found: list[Job]) -> None:
    """A line a job, and below them why those that failed did."""
    console = Console(highlight=False, soft_wrap=True, width=max(WIDE, Console().width))
    if not found:
        console.print("no jobs")
        return
    table = Table(box=None, pad_edge=False)
    for name in ("id", "command", "root", "state", "started", "duration"):
        table.add_column(name, justify="right" if name == "duration" else "left", no_wrap=True)
    for job in found:
        facts = job_facts(job)
        state = f"FAILED ({job.exit_code})" if job.state == "FAILED" and job.exit_code is not None else job.state
        style = {"SUCCEEDED": "green", "FAILED": "red"}.get(job.state, "")
        duration = _duration(facts["seconds"]) if facts["seconds"] is not None else ""
        cells = [job.submission_id, job.command.split(" ")[0], job.root, state, facts["started_at"] or "", duration]
        table.add_row(*cells, style=style)
    console.print(table)
    for job in found:
        if message := _message(job):
            console.print(Text(f"  - {job.submission_id}: {message}", style="red" if job.state == "FAILED" else ""))


def _duration(seconds: float) -> str:
    """`2:03:04`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"

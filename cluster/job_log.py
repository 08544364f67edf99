"""Following a job: its log as it grows, and how it ended. Survives a head node that is out of reach for a while."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.jobs import ContactLostError, Job, Jobs
from operators.errors import ResourceError

POLL_S = 1.0
SILENCE_S = 30.0  # without a line for so long, the head is asked whether the job still runs
LOST_TIMEOUT_S = 300.0
GOODBYE_S = 2.0
# What Ray itself writes before the command's own lines.
RAYS_LINES = ("Runtime env is setting up.", "Running entrypoint for job ")
ERROR = "error: "


@dataclass(frozen=True)
class JobEnd:
    """How a job ended. `error` is the command's own error line or, when it left none, what Ray says."""

    job: Job
    error: str | None
    result: dict[str, Any] | None  # what the command printed with --json


class LogReader:
    """Passes a job's log on line by line; keeps back its result (the JSON of --json) and its error line."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._rest = ""
        self._held: list[str] = []
        self.error: str | None = None
        self.result: dict[str, Any] | None = None
        self.last_line = ""
        self.num_read = 0  # characters of the log: where a new stream, which begins anew, goes on

    def feed(self, text: str) -> None:
        """The next characters of the log."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._line(line)

    def end(self) -> None:
        """The log is complete."""
        if self._rest:
            self._line(self._rest)
            self._rest = ""
        self._release()

    def _line(self, line: str) -> None:
        if any(mark in line for mark in RAYS_LINES):
            return
        if line.startswith(ERROR):
            self._flush_error()
            self.error = line.removeprefix(ERROR)
            return
        if line.startswith('{"error": ') and self.error is not None:  # what --json adds to the error line
            return
        if line == "{" and not self._held:
            self._held.append(line)
            return
        if self._held:
            self._held.append(line)
            if line == "}":
                self._take_result()
            return
        self._flush_error()
        self.last_line = line or self.last_line
        self._write(line)

    def _take_result(self) -> None:
        try:
            self.result = json.loads("\n".join(self._held))
            self._held = []
        except ValueError:
            self._release()

    def _release(self) -> None:
        """What was held back was not a result after all."""
        for line in self._held:
            self._write(line)
        self._held = []

    def _flush_error(self) -> None:
        """Only the last error line is the command's: one that others follow is passed on."""
        if self.error is not None:
            self._write(f"{ERROR}{self.error}")
            self.error = None


def follow(jobs: Jobs, submission_id: str, write: Callable[[str], None], say: Callable[[str], None]) -> JobEnd:
    """Pass the log on until the job has ended. `write` gets lines of the log, `say` remarks about the waiting.

    Raises ResourceError when the head does not answer for LOST_TIMEOUT_S: the job may be going on then.
    """
    reader = LogReader(write)
    lost_since: float | None = None
    said_pending = False
    while True:
        try:
            job = jobs.get(submission_id)
            if lost_since is not None:
                say("the cluster answers again")
                lost_since = None
            if job.state == "PENDING":
                if not said_pending:
                    say(f"{submission_id} waits for its driver to start")
                    said_pending = True
                time.sleep(POLL_S)
                continue
            asyncio.run(_tail(jobs, submission_id, reader))
            job = jobs.get(submission_id)
            if job.has_ended:
                reader.end()
                return JobEnd(job, _error_of(job, reader), reader.result)
            time.sleep(POLL_S)
        except ContactLostError as error:
            now = time.monotonic()
            if lost_since is None:
                lost_since = now
                say(f"lost contact with the cluster, trying again for {LOST_TIMEOUT_S:.0f} s: {error}")
            elif now - lost_since > LOST_TIMEOUT_S:
                raise ResourceError(
                    f"lost contact with the cluster for {LOST_TIMEOUT_S:.0f} s: {error}. Job {submission_id} may be going on:"
                    f" vectormill logs {submission_id} --follow"
                ) from None
            time.sleep(5 * POLL_S)


async def _tail(jobs: Jobs, submission_id: str, reader: LogReader) -> None:
    """Feed the reader with what follows the characters that it had from earlier streams, until this one ends."""
    import aiohttp

    stream = jobs.tail(submission_id)
    passed = 0  # of this stream
    waiting: asyncio.Future[str] | None = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(anext(stream))
            done, _ = await asyncio.wait({waiting}, timeout=SILENCE_S)
            if not done:
                if jobs.get(submission_id).has_ended:
                    return
                continue
            text = waiting.result()
            waiting = None
            reader.feed(text[max(0, reader.num_read - passed) :])
            passed += len(text)
            reader.num_read = max(reader.num_read, passed)
    except StopAsyncIteration:
        pass
    except (aiohttp.ClientError, RuntimeError, OSError):
        pass  # the next look at the job tells whether the head is gone
    finally:
        if waiting is not None:
            waiting.cancel()
            # It says goodbye to the head, which may take long to answer; after a Ctrl-C nobody waits for that.
            await asyncio.wait({waiting}, timeout=GOODBYE_S)


def _error_of(job: Job, reader: LogReader) -> str | None:
    """None for a job that did what it should."""
    if job.state == "SUCCEEDED":
        return None
    if reader.error is not None:
        return reader.error
    if job.state == "STOPPED":
        return "the job was stopped; what was committed is kept: submit the same command again to resume"
    if "ModuleNotFoundError" in reader.last_line or "No module named" in reader.last_line:
        return (
            f"the cluster's Python lacks what vectormill needs ({reader.last_line.strip()}): use an image that has it, or"
            " --requirements pinned"
        )
    if job.exit_code is not None and (job.exit_code < 0 or job.exit_code > 128):
        number = -job.exit_code if job.exit_code < 0 else job.exit_code - 128
        return (
            f"the driver was ended by signal {number} (9: mostly for lack of memory); what was committed is kept, submit the"
            " same command again to resume"
        )
    if job.exit_code is not None:
        return f"the command ended with exit code {job.exit_code}: {reader.last_line.strip()}"
    told = " ".join(job.message.split())
    return (
        f"the driver was lost or never started: {told[:500]}; what was committed is kept, submit the same command again"
    )

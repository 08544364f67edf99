"""When the encoders of a build were ready and busy, noted by the encoders themselves.

The encoder stage of the streaming job is replaced by a subclass that does the same and appends lines of
`ready <time>` and `piece <begin> <end>` to a file of its own beside the index root (a local folder). Times are of
CLOCK_MONOTONIC, which all processes of a machine share.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pyarrow as pa

from cluster import stream
from operators.storage.store import open_store


@dataclass(frozen=True)
class EncoderTimes:
    """One encoder: when its model was loaded, and begin and end of each piece, in order."""

    ready: float
    pieces: list[tuple[float, float]]

    @property
    def busy_s(self) -> float:
        """Seconds in forward passes and what belongs to them."""
        return sum(end - begin for begin, end in self.pieces)


class TimedEncodeStage(stream.EncodeStage):
    """An encoder that notes its times."""

    def __init__(self, job: stream.StreamJob) -> None:
        super().__init__(job)
        folder = _folder(job.store_url)
        folder.mkdir(parents=True, exist_ok=True)
        self._notes = folder / str(os.getpid())
        self._note("ready")

    def __call__(self, batch: pa.Table, job: stream.StreamJob) -> pa.Table:
        begin = time.monotonic()
        encoded = super().__call__(batch, job)
        self._note("piece", begin)
        return encoded

    def _note(self, *words: object) -> None:
        with self._notes.open("a") as file:
            print(*words, time.monotonic(), file=file)


@contextmanager
def clocked_encoders() -> Iterator[None]:
    """Builds of this process inside the block have encoders that note their times."""
    with mock.patch.object(stream, "EncodeStage", TimedEncodeStage):
        yield


def take_times(root: Path) -> list[EncoderTimes]:
    """The times of the encoders of the build at `root`; forgotten afterwards."""
    encoders = []
    for notes in sorted(_folder(str(root)).iterdir()):
        lines = [line.split() for line in notes.read_text().splitlines()]
        ready = next(float(line[1]) for line in lines if line[0] == "ready")
        encoders.append(EncoderTimes(ready, [(float(line[1]), float(line[2])) for line in lines if line[0] == "piece"]))
    shutil.rmtree(_folder(str(root)))
    return encoders


def _folder(root: str) -> Path:
    path = open_store(root).local_path("")
    assert path is not None, "the clock needs a root on this machine"
    return path.with_name(f"{path.name}.encoder-times")

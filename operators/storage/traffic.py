"""What this process has asked of storage since it began: bytes both ways, requests, and how many of them were repeated.

Counted where the bytes pass: the stores, the files of source objects, and every S3 request. A piece's or a task's share is
the difference of two looks (`traffic() - before`), exact as long as the process does one thing at a time.
"""

from __future__ import annotations

import io
import threading
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Traffic:
    """Counts. `requests` and `retries` are those to S3; a retry is a request that was repeated, or a block read again."""

    bytes_read: int = 0
    bytes_written: int = 0
    requests: int = 0
    retries: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    def to_json(self) -> dict[str, int]:
        """Plain JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


_lock = threading.Lock()
_counted = [0, 0, 0, 0]


def count(bytes_read: int = 0, bytes_written: int = 0, requests: int = 0, retries: int = 0) -> None:
    """Add to what this process has done. From any thread."""
    with _lock:
        _counted[0] += bytes_read
        _counted[1] += bytes_written
        _counted[2] += requests
        _counted[3] += retries


def traffic() -> Traffic:
    """All that was counted in this process so far."""
    with _lock:
        return Traffic(*_counted)


class CountedFile(io.FileIO):
    """A local file, unbuffered, whose reads are counted."""

    def readinto(self, buffer: object) -> int:
        found = super().readinto(buffer)  # type: ignore[arg-type]
        count(bytes_read=found or 0)
        return found

    def readall(self) -> bytes:
        data = super().readall()
        count(bytes_read=len(data or b""))
        return data


def open_counted(path: str) -> io.BufferedReader:
    """The local file for reading, counted."""
    return io.BufferedReader(CountedFile(path, "rb"))

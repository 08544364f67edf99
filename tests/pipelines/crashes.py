"""Ends a command at one of its crash points, in this process and without its tidying up being able to help."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from operators import crash_points


class Killed(BaseException):
    """In place of SIGKILL: nothing in the code under test catches it."""


@contextmanager
def killed_at(point: int | str | None) -> Iterator[list[str]]:
    """Raise Killed where a crash point is passed: the `point`-th of all, or the first one of that name.

    Gives the names of those that were passed.
    """
    passed: list[str] = []

    def is_due(variable: str, name: str) -> bool:
        if variable == crash_points.VARIABLE:
            passed.append(name)
            if point in (len(passed), name):
                raise Killed(name)
        return False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crash_points, "_is_due", is_due)
        yield passed

"""Places where a fault test may end the run with SIGKILL. Without VECTORMILL_CRASH_AT every call does nothing.

VECTORMILL_CRASH_AT=`name:count` kills the driver (VECTORMILL_CRASH_DRIVER, set by the session) and the calling process
when the place `name` is passed for the `count`-th time in that process. SIGKILL cannot be caught, so nothing is tidied
up: what a resumed run finds is what a power cut would leave.
"""

from __future__ import annotations

import contextlib
import os
import signal

VARIABLE = "VECTORMILL_CRASH_AT"
DRIVER_VARIABLE = "VECTORMILL_CRASH_DRIVER"
_passed: dict[str, int] = {}


def crash_point(name: str) -> None:
    """Die here if the environment says so."""
    setting = os.environ.get(VARIABLE)
    if not setting:
        return
    wanted, _, count = setting.rpartition(":")
    if wanted != name:
        return
    _passed[name] = _passed.get(name, 0) + 1
    if _passed[name] == int(count):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(os.environ.get(DRIVER_VARIABLE, os.getpid())), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

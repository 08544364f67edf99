"""Places where a fault test may end the run with SIGKILL, or halt it. Without the variables below every call does nothing.

VECTORMILL_CRASH_AT=`name:count` kills the driver (VECTORMILL_CRASH_DRIVER, set by the session) and the calling process
when the place `name` is passed for the `count`-th time in that process. SIGKILL cannot be caught, so nothing is tidied
up: what a resumed run finds is what a power cut would leave.
VECTORMILL_STOP_AT=`name:count` stops the calling process there (SIGSTOP) until somebody sends it SIGCONT: a machine that
was suspended and comes back.
"""

from __future__ import annotations

import contextlib
import os
import signal

VARIABLE = "VECTORMILL_CRASH_AT"
STOP_VARIABLE = "VECTORMILL_STOP_AT"
DRIVER_VARIABLE = "VECTORMILL_CRASH_DRIVER"
_passed: dict[tuple[str, str], int] = {}


def crash_point(name: str) -> None:
    """Die or halt here if the environment says so."""
    if _is_due(VARIABLE, name):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(os.environ.get(DRIVER_VARIABLE, os.getpid())), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    if _is_due(STOP_VARIABLE, name):
        os.kill(os.getpid(), signal.SIGSTOP)


def _is_due(variable: str, name: str) -> bool:
    setting = os.environ.get(variable)
    if not setting:
        return False
    wanted, _, count = setting.rpartition(":")
    if wanted != name:
        return False
    _passed[variable, name] = _passed.get((variable, name), 0) + 1
    return _passed[variable, name] == int(count)

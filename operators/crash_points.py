"""Places where a fault test may end the run with SIGKILL. Without VECTORMILL_CRASH_AT every call does nothing.

VECTORMILL_CRASH_AT=`name:count:pid` kills the process `pid` (the driver; 0 for none) and then the calling process when
the place `name` is passed for the `count`-th time in that process. SIGKILL cannot be caught, so nothing is tidied up:
what a resumed run finds is what a power cut would leave.
"""

from __future__ import annotations

import contextlib
import os
import signal

VARIABLE = "VECTORMILL_CRASH_AT"
_passed: dict[str, int] = {}


def crash_point(name: str) -> None:
    """Die here if the environment says so."""
    setting = os.environ.get(VARIABLE)
    if not setting:
        return
    wanted, count, driver_pid = setting.split(":")
    if wanted != name:
        return
    _passed[name] = _passed.get(name, 0) + 1
    if _passed[name] == int(count):
        with contextlib.suppress(ProcessLookupError):
            if int(driver_pid):
                os.kill(int(driver_pid), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

"""The file that `plan --calibrate --out` writes and `plan --calibration` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from operators.errors import ConfigError


def read_calibration(path: str) -> dict[str, float]:
    """Coefficients by name. Raises ConfigError for a file that is not one of these."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return {str(name): float(value) for name, value in content["coefficients"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--calibration takes a file that `vectormill plan --calibrate --out FILE` wrote, got {path!r}: {error}"
        ) from None


def write_calibration(path: str, report: dict[str, Any]) -> None:
    """Raises ConfigError when it cannot be written there."""
    try:
        Path(path).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the calibration could not be written to {path!r} (--out): {error}") from None

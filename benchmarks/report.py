"""Results of benchmarks as JSON: what was measured, with the commit, versions, hardware and date that it belongs to."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "ray", "pyarrow", "numpy", "faiss-cpu", "tokenizers", "sentence-transformers")


def environment() -> dict[str, Any]:
    """Commit, versions, hardware and date of this process. No names or paths of this machine."""
    import torch

    return {
        "commit": commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {"python": platform.python_version(), **installed(PACKAGES)},
        "hardware": {
            "cpu": _field("/proc/cpuinfo", "model name") or platform.machine(),
            "cores": os.cpu_count(),
            "memory_kb": int((_field("/proc/meminfo", "MemTotal") or "0").split()[0]),
            "bfloat16": bool(torch.cpu.get_capabilities().get("avx512_bf16", False)),
            "system": platform.system(),
        },
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def installed(names: Sequence[str]) -> dict[str, str]:
    """Versions of those of the packages that are there."""
    found = {}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def commit() -> str:
    """Commit of this checkout, with `+changes` when files differ from it; `unknown` outside of one."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--", "kernels", "operators", "cluster", "pipelines", "benchmarks")
        return git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _field(file: str, name: str) -> str | None:
    """Value of the first `name: value` line of a file of /proc; None where there is no such file or line."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)


def write_report(report: dict[str, Any], out: str | None) -> None:
    """The report as a JSON file at `out`, if that is given."""
    if out is not None:
        path = Path(out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def spread(values: list[float], digits: int = 4) -> dict[str, float]:
    """Median, least and greatest of the rounds."""
    ordered = sorted(values)
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return {
        "median": round(middle, digits),
        "min": round(ordered[0], digits),
        "max": round(ordered[-1], digits),
    }

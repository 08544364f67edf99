"""What commands print with: JSON for machines, and the words, tables and units that several of them use for people."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDE = 150  # columns of a table of which nothing is cut where the output is a pipe
CHANGED = ("added", "edited", "deleted", "revived")


@contextmanager
def clean_stdout() -> Iterator[None]:
    """Send what libraries print to standard error for the block: Ray reports its workers' troubles by print()."""
    with redirect_stdout(sys.stderr):
        yield


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False), flush=True)


def show_next(commands: Sequence[str]) -> None:
    """Commands to copy, one a line."""
    console = Console(highlight=False, soft_wrap=True)
    console.print("try next:")
    for command in commands:
        console.print(Text(f"  {command}", style="cyan"))


def program() -> str:
    """How this program can be called from here: its name if it is on the PATH, else its path."""
    beside = Path(sys.executable).with_name("vectormill")
    if shutil.which("vectormill") or not beside.exists():
        return "vectormill"
    here = Path.cwd()
    return shlex.quote(str(beside.relative_to(here) if beside.is_relative_to(here) else beside))


def rows_text(rows: dict[str, Any]) -> str:
    """`10 rows read, 2 rejected (null_text 2), 1 dropped (no_text 1)`."""
    parts = [f"{rows['read']:,} rows read"]
    for outcome in ("rejected", "dropped"):
        reasons = rows[outcome]
        if reasons:
            named = ", ".join(f"{reason} {count:,}" for reason, count in reasons.items())
            parts.append(f"{sum(reasons.values()):,} {outcome} ({named})")
    return ", ".join(parts)


def changes_text(changes: dict[str, Any]) -> str:
    """`167 added, 166 edited, 167 deleted`: the documents that an update changed, in its counts."""
    documents = changes.get("documents", {})
    named = [f"{documents[what]:,} {what}" for what in CHANGED if documents.get(what)]
    return ", ".join(named) or "no documents"


def seconds_text(seconds: dict[str, float]) -> str:
    stages = sorted(seconds.items(), key=lambda stage: -stage[1])
    named = ", ".join(f"{name} {took:.1f}" for name, took in stages if took >= 0.05)
    return f"{math.fsum(seconds.values()):.1f}" + (f" ({named})" if named else "")


def bytes_text(size_bytes: float) -> str:
    """`5.2 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.1f} {unit}" if unit != "bytes" else f"{size_bytes:.0f} bytes"
        size_bytes /= 1000
    return f"{size_bytes:.1f} TB"


def pairs() -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table

"""A small corpus of real text and a way to run builds as a user does: the command line in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

# Small pieces, shards and parts, so that a small corpus takes every path of a large one.
SMALL_UNITS = (
    "read.piece_rows=20",
    "index.shard_rows=40",
    "index.part_bytes=20000",
    "index.merge_buffer_bytes=8000",
    "index.checkpoint_s=0",
)
IN_PROCESS = "cluster.where=process"


def write_corpus(path: Path, documents: list[tuple[str, str, str]], row_group_size: int = 40) -> Path:
    """Parquet of (id, title, text)."""
    columns = [pa.array(list(column)) for column in zip(*documents, strict=True)]
    pq.write_table(pa.table(columns, names=["id", "title", "text"]), path, row_group_size=row_group_size)
    return path


def run_cli(*arguments: str, ray_address: str = "", crash_at: str = "") -> subprocess.CompletedProcess[str]:
    """`vectormill ...` in a new process, joined to the cluster; without an address, all stages in that one process.

    `crash_at` is VECTORMILL_CRASH_AT.
    """
    variables = {**os.environ}
    if ray_address:
        variables["RAY_ADDRESS"] = ray_address
    elif arguments[0] in ("build", "update"):
        arguments = (*arguments, "--set", IN_PROCESS)
    if crash_at:
        variables["VECTORMILL_CRASH_AT"] = crash_at
    command = [sys.executable, "-m", "pipelines.cli", *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)


def build_arguments(sources: list[str], root: str, *settings: str, workers: int = 2) -> list[str]:
    """Arguments of a build with small units."""
    chosen = [argument for setting in (*SMALL_UNITS, *settings) for argument in ("--set", setting)]
    return ["build", *sources, "--out", root, "--workers", str(workers), "--json", *chosen]


def build_json(
    sources: list[str], root: str, *settings: str, ray_address: str = "", workers: int = 2
) -> dict[str, Any]:
    """What a successful build prints with --json."""
    done = run_cli(*build_arguments(sources, root, *settings, workers=workers), ray_address=ray_address)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))

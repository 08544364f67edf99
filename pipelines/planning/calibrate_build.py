"""A tiny build in a process of its own, watched: what a build takes beside its work, and the memory of its processes.

python -m pipelines.planning.calibrate_build SOURCE ROOT CONFIG_JSON STARTED_AT     prints one JSON object
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.capacity.objects import EXACT_ENTRY, EXACT_KEPT
from cluster.process_memory import DRIVER, TASK, ProcessSampler
from operators.artifact.index import Index
from operators.artifact.manifest import manifest_key
from operators.errors import ResourceError
from operators.piece_store import read_table
from operators.storage.checked import ObjectEntry
from operators.storage.store import open_store
from pipelines.build import build
from pipelines.config import RunConfig, load_config
from pipelines.planning.calibrate_stages import least_s
from pipelines.telemetry.progress import RunProgress

MARKER = "VECTORMILL_CALIBRATION"
ENCODE = "encode pieces"
REPOSITORY = Path(__file__).resolve().parents[1]


class WatchedStages(RunProgress):
    """Progress that tells a sampler the stage, and notes when each unit of the encoding stage was done."""

    def __init__(self, sampler: ProcessSampler) -> None:
        super().__init__(quiet=True)
        self._sampler = sampler
        self.first_stage_at = 0.0
        self.encode_began = 0.0
        self.done: list[tuple[float, float]] = []  # monotonic seconds, CPU seconds of this process

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None:
        super().stage(name, total, done)
        self._sampler.stage = name
        self.first_stage_at = self.first_stage_at or time.time()
        if name == ENCODE:
            self.encode_began = time.monotonic()

    def advance(self, units: int = 1, note: str | None = None) -> None:
        super().advance(units, note)
        if self._sampler.stage == ENCODE:
            self.done.append((time.monotonic(), time.process_time()))


def watched_build(source: str, root: str, assignments: Sequence[str], started_at: float) -> dict[str, Any]:
    """Build and say what was seen: seconds of stages, of the stream from its first piece to its last, and bytes."""
    with ProcessSampler(os.getpid(), f"{MARKER}={os.environ[MARKER]}") as sampler:
        progress = WatchedStages(sampler)
        result = build([source], root, load_config(None, assignments), progress=progress)
    first, last = progress.done[0], progress.done[-1]
    manifest, store = result.manifest, open_store(root)
    exact = ObjectEntry.from_json(manifest.exact or {})
    return {
        "search_s_per_code_byte": _search_s(Index(store, manifest)),
        "process_start_s": progress.first_stage_at - started_at,
        "stages": result.seconds,
        "first_piece_s": first[0] - progress.encode_began,
        "stream_s": last[0] - first[0],
        "stream_driver_cpu_s": last[1] - first[1],
        "driver_bytes": sampler.peak(DRIVER),
        "task_worker_bytes": sampler.peak(TASK, "check encoder", ENCODE, "number rows"),
        "ray_bytes": sampler.system_bytes,
        "manifest_bytes": store.size_bytes(manifest_key(manifest.version)),
        "exact_bytes": exact.size_bytes - EXACT_ENTRY * EXACT_KEPT * manifest.quality["queries"],
    }


def _search_s(index: Index) -> float:
    """Seconds of one core in which a query is compared with a byte of a code."""
    import faiss

    faiss.omp_set_num_threads(1)
    manifest = index.manifest
    table = read_table(index.store, ObjectEntry.from_json(manifest.queries), ["vector"])
    queries = np.array(table.column("vector").to_pylist(), np.float32)
    times = {}
    for nprobe in (1, manifest.nlist):
        search = partial(index.search, queries, 10, nprobe=nprobe, refine_factor=0)
        times[nprobe] = least_s(lambda _, search=search: search())  # type: ignore[misc]
    codes = len(queries) * manifest.ntotal * (1 - 1 / manifest.nlist)
    return max(0.0, times[manifest.nlist] - times[1]) / codes / index.quantizer.code_size


def tiny_build(place: str, texts: Sequence[str], piece_rows: int, config: RunConfig, workers: int) -> dict[str, Any]:
    """What `watched_build` saw of a build of the texts in pieces of so many rows; place: a folder, or an s3:// prefix."""
    table = pa.table({"id": [f"d{n:015d}" for n in range(len(texts))], "text": list(texts)})
    data = pa.BufferOutputStream()
    pq.write_table(table, data, row_group_size=piece_rows)
    open_store(place).put("tiny.parquet", data.getvalue().to_pybytes())
    encode, cluster = config.encode, config.cluster
    assignments = [
        f"read.piece_rows={piece_rows}",
        "index.min_recall=0",
        "cluster.where=ray",
        f"cluster.address={cluster.address}",
        f"encode.workers={workers}",
        *(
            f"encode.{name}={getattr(encode, name)}"
            for name in ("model", "precision", "device", "batch_tokens", "threads_per_worker", "num_layers")
        ),
    ]
    command = [sys.executable, "-m", "pipelines.planning.calibrate_build", f"{place}/tiny.parquet", f"{place}/tiny"]
    surroundings = {**os.environ, MARKER: os.urandom(8).hex()}
    # The last argument is the moment of the start, so that the time to the first stage is known.
    done = subprocess.run(
        [*command, json.dumps(assignments), str(time.time())],
        cwd=REPOSITORY,
        env=surroundings,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ResourceError(f"the calibration's tiny build failed: {done.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    print(json.dumps(watched_build(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), float(sys.argv[4]))))

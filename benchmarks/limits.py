"""Shows that the bookkeeping holds at its limits: many pieces, many rows, many deltas, with time and memory flat.

Shows (ingest) a build of 2,000,000 tiny rows in 10,000 pieces: time a piece in the first tenth of the stream against the
last (by the clock, and of the CPU, which other work on the machine disturbs less), the memory meanwhile, and the peak
of each stage. Shows (updates) 100 updates in turn, each a delta: time an update in the first tenth against the last, and
the latency of a search as the deltas grow; then a compaction. Counts are checked before anything is reported.

Vectors come from benchmarks/hashed_vectors.py in place of a model; all else is real and runs in this one process, so that
its memory is that of driver and workers together. With --ray the ingest runs on a Ray of this machine, with a tiny model,
and the memory is the driver's. Floor: CPU time of a piece at most 1.5 times as long in the last tenth, and memory grown by
at most 10 bytes for each row of the stream. An update grows by what 100 more segments cost to name, open and check.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.hashed_vectors import hashed_vectors
from benchmarks.made_models import make_model
from benchmarks.report import environment, write_report
from operators.artifact.index import Index
from operators.artifact.manifest import Manifest
from operators.errors import IntegrityError
from operators.piece_store import read_table
from operators.storage.checked import ObjectEntry
from operators.storage.store import open_store
from pipelines.build import build
from pipelines.compact import compact
from pipelines.config import RunConfig, load_config
from pipelines.telemetry.progress import RunProgress
from pipelines.update import UpdateOptions, UpdateResult, update

STREAM = "encode pieces"
LENIENT = ("encode.precision=float32", "index.min_recall=0", "index.target_recall=0.9")
IN_PROCESS = (*LENIENT, "cluster.where=process", "encode.truncate_dim=32")
GROUPS_OF_OBJECT = 500
WORDS = ("red", "green", "blue", "north", "south", "river", "stone", "paper", "glass", "iron", "summer", "winter")


class WatchedProgress(RunProgress):
    """Notes when each piece ended, and the memory of this process then and at its peak in each stage."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.pieces: list[tuple[float, float, int]] = []  # monotonic seconds, CPU seconds, resident bytes
        self.peaks: dict[str, int] = {}
        self._ended = threading.Event()
        threading.Thread(target=self._sample, daemon=True, name="memory").start()

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None:
        super().stage(name, total, done)
        if name == STREAM:
            self.pieces.append((time.monotonic(), time.process_time(), resident_bytes()))

    def advance(self, units: int = 1, note: str | None = None) -> None:
        super().advance(units, note)
        if self._name == STREAM:
            self.pieces.append((time.monotonic(), time.process_time(), resident_bytes()))

    def close(self) -> None:
        """No more samples."""
        self._ended.set()

    def _sample(self) -> None:
        while not self._ended.wait(0.02):
            self.peaks[self._name] = max(self.peaks.get(self._name, 0), resident_bytes())


def resident_bytes() -> int:
    """Memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def text_of(number: int, round_number: int = 0) -> str:
    """A tiny text, another one for each number and round."""
    words = [WORDS[number // 12**place % 12] for place in range(3)]
    return f"{' '.join(words)} {number} {round_number}"


def write_rows(path: Path, numbers: Sequence[int], round_number: int = 0, group_rows: int = 1024) -> None:
    """A Parquet object of the numbered rows."""
    columns = [[f"doc-{n}" for n in numbers], [text_of(n, round_number) for n in numbers]]
    pq.write_table(pa.table([pa.array(c) for c in columns], names=["id", "text"]), path, row_group_size=group_rows)


def tenths(values: Sequence[float]) -> dict[str, float]:
    """Medians of the first and of the last tenth, and their ratio."""
    size = max(1, len(values) // 10)
    first, last = float(np.median(values[:size])), float(np.median(values[-size:]))
    return {"first_tenth": round(first, 5), "last_tenth": round(last, 5), "ratio": round(last / first, 3)}


def ingest(folder: Path, num_rows: int, num_pieces: int, settings: Sequence[str] = IN_PROCESS) -> dict[str, Any]:
    """A build of `num_rows` rows in `num_pieces` pieces, watched."""
    piece_rows = -(-num_rows // num_pieces)
    source = folder / "rows"
    source.mkdir()
    per_object = piece_rows * GROUPS_OF_OBJECT
    for number, begin in enumerate(range(0, num_rows, per_object)):
        rows = range(begin, min(begin + per_object, num_rows))
        write_rows(source / f"rows-{number:05d}.parquet", rows, group_rows=piece_rows)
    config = load_config(None, [*settings, f"read.piece_rows={piece_rows}"])
    progress = WatchedProgress()
    before = resident_bytes()
    began = time.monotonic()
    result = build([str(source)], str(folder / "root"), config, progress=progress)
    whole_s = time.monotonic() - began
    progress.close()
    manifest = result.manifest
    if (result.pieces_encoded, manifest.ntotal) != (num_pieces, num_rows):
        raise IntegrityError(
            f"{num_pieces} pieces with {num_rows} rows went in, {result.pieces_encoded} with {manifest.ntotal} came out"
        )
    ends, cpu, resident = zip(*progress.pieces, strict=True)
    after_first = resident[len(resident) // 10]
    return {
        "rows": num_rows,
        "pieces": num_pieces,
        "seconds": round(whole_s, 1),
        "piece_s": tenths(np.diff(ends).tolist()),
        "piece_cpu_s": tenths(np.diff(cpu).tolist()),
        "stream_memory": {
            "before_mb": before >> 20,
            "after_first_tenth_mb": after_first >> 20,
            "end_mb": resident[-1] >> 20,
            "bytes_a_row": round((resident[-1] - after_first) / (0.9 * num_rows), 1),
        },
        "stage_s": {name: round(value, 1) for name, value in result.seconds.items()},
        "stage_peak_mb": {name: value >> 20 for name, value in progress.peaks.items() if name},
        "recall@10": manifest.quality["recall@10"],
    }


def deltas(folder: Path, num_updates: int, num_rows: int, changed: int) -> dict[str, Any]:
    """So many updates of `changed` rows each on a base of `num_rows`, then a compaction."""
    source, root = folder / "changing", str(folder / "updated")
    source.mkdir()
    objects = [list(range(begin, min(begin + changed, num_rows))) for begin in range(0, num_rows, changed)]
    for number, rows in enumerate(objects):
        write_rows(source / f"rows-{number:05d}.parquet", rows)
    build([str(source)], root, load_config(None, IN_PROCESS))
    update_s, update_cpu_s, latency, resident, last = [], [], [], [], None
    for number in range(1, num_updates + 1):
        chosen = number * 7 % len(objects)
        write_rows(source / f"rows-{chosen:05d}.parquet", objects[chosen], number)
        began, cpu_began = time.monotonic(), time.process_time()
        last = update([str(source)], root, in_this_process, UpdateOptions(min_recall=0))
        update_s.append(time.monotonic() - began)
        update_cpu_s.append(time.process_time() - cpu_began)
        _check(last, number, num_rows, len(objects[chosen]))
        resident.append(resident_bytes())
        if number in (1, num_updates // 2, num_updates):
            latency.append({"deltas": number, **search_latency(root)})
    assert last is not None
    deltas_before = len(last.manifest.segments) - 1
    began = time.monotonic()
    compacted = compact(root, in_this_process).manifest
    compact_s = time.monotonic() - began
    if len(compacted.segments) != 1 or compacted.ntotal != num_rows:
        raise IntegrityError(f"a compaction of {num_rows} live rows left {compacted.ntotal}")
    return {
        "updates": num_updates,
        "rows": num_rows,
        "rows_changed_each": changed,
        "deltas": deltas_before,
        "update_s": tenths(update_s),
        "update_cpu_s": tenths(update_cpu_s),
        "last_update_stage_s": {name: round(value, 3) for name, value in last.seconds.items()},
        "memory_mb": {"first": resident[0] >> 20, "last": resident[-1] >> 20},
        "search": latency,
        "compact_s": round(compact_s, 2),
        "search_compacted": search_latency(root),
    }


def in_this_process(base: RunConfig) -> RunConfig:
    """The version's settings, run here."""
    return load_config(None, ["cluster.where=process", "index.min_recall=0"], base=base)


def _check(result: UpdateResult, number: int, num_rows: int, changed: int) -> None:
    manifest: Manifest = result.manifest
    if not result.published or manifest.ntotal != num_rows or result.texts_encoded != changed:
        raise IntegrityError(
            f"update {number} must encode {changed} texts and leave {num_rows} live rows, it encoded {result.texts_encoded}"
            f" and left {manifest.ntotal}"
        )


def search_latency(root: str, rounds: int = 20) -> dict[str, float]:
    """Milliseconds to open the index and of a query, alone and in a batch of all stored ones (median)."""
    store = open_store(root)
    began = time.monotonic()
    index = Index.open(store)
    open_ms = 1e3 * (time.monotonic() - began)
    table = read_table(store, ObjectEntry.from_json(index.manifest.queries), ["vector"])
    queries_QD = np.array(table.column("vector").to_pylist(), np.float32)
    nprobe = index.manifest.quality["nprobe"]

    def median_ms(vectors_QD: np.ndarray) -> float:
        times = []
        for _ in range(rounds):
            began = time.monotonic()
            index.search(vectors_QD, 10, nprobe=nprobe)
            times.append(time.monotonic() - began)
        return 1e3 * float(np.median(times))

    one, batch = median_ms(queries_QD[:1]), median_ms(queries_QD) / len(queries_QD)
    return {"open_ms": round(open_ms, 1), "query_ms": round(one, 3), "batched_query_ms": round(batch, 4)}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The report of both cases."""
    report: dict[str, Any] = {"environment": environment()}
    with tempfile.TemporaryDirectory(prefix="vectormill-limits-") as name:
        folder = Path(name)
        if arguments.ray:
            model = make_model("tiny", folder / "model")
            settings = [*LENIENT, "cluster.where=ray", f"encode.model={model}"]
            report["ingest on Ray"] = ingest(folder, arguments.rows, arguments.pieces, settings)
            return report
        with hashed_vectors():
            if arguments.pieces:
                report["ingest"] = ingest(folder, arguments.rows, arguments.pieces)
            if arguments.updates:
                report["updates"] = deltas(folder, arguments.updates, arguments.base_rows, arguments.changed)
    return report


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000, help="rows of the ingest case")
    parser.add_argument("--pieces", type=int, default=10_000, help="pieces of the ingest case; 0: leave it out")
    parser.add_argument(
        "--ray", action="store_true", help="only the ingest case, on Ray, with a tiny model of random weights"
    )
    parser.add_argument("--updates", type=int, default=100, help="updates in turn; 0: leave the case out")
    parser.add_argument("--base-rows", type=int, default=20_000, help="rows of the base of the updates")
    parser.add_argument("--changed", type=int, default=50, help="rows that an update changes")
    parser.add_argument("--json", action="store_true", help="print the report on one line")
    parser.add_argument("--out", help="also write the report to this file")
    return parser.parse_args(arguments)


def main() -> None:
    """Run and print."""
    arguments = parse()
    report = measure(arguments)
    print(json.dumps(report, indent=None if arguments.json else 1))
    write_report(report, arguments.out)


if __name__ == "__main__":
    main()

"""Shows that the memory of a build is bounded by pieces in flight: peak memory for N and for 10 N documents.

Both builds run in a process of their own, with fresh roots, the same texts (in turn, under distinct ids), and pieces so
small that both fill the pieces in flight. Memory of the driver and of all processes that Ray started is sampled every
0.2 s as PSS: what processes share, the object store included, is counted once. Training, shards, merge and verification
count too. Ray's own processes are part of the sum but hardly grow, so growth is also given in bytes and by kind of
process. Floor: the larger build's peak is within 20% of the smaller one's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from benchmarks.memory_sampler import KINDS, MemorySampler, Sample
from benchmarks.report import REPOSITORY, environment, write_report
from benchmarks.texts import short_texts, write_corpus
from operators.artifact.manifest import open_current
from operators.errors import ConfigError, IntegrityError
from operators.storage.store import open_store
from pipelines.build import build
from pipelines.config import load_config
from pipelines.telemetry.progress import RunProgress

LIMIT = 1.2
MARKER = "VECTORMILL_BENCHMARK"
BEFORE = "start"  # until the first stage begins
STREAM_STAGES = ("start Ray", "cut into pieces", "encode pieces")


class StageLog(RunProgress):
    """Progress that writes a line `<CLOCK_MONOTONIC> <stage>` when a stage begins."""

    def __init__(self, file: TextIO) -> None:
        super().__init__(quiet=True)
        self._file = file

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None:
        super().stage(name, total, done)
        print(time.monotonic(), name, file=self._file, flush=True)


def run_build(source: str, root: str, stages: str, assignments: Sequence[str]) -> None:
    """What the measured process does."""
    with open(stages, "w") as file:
        build([source], root, load_config(None, assignments), progress=StageLog(file))


@dataclasses.dataclass(frozen=True)
class MeasuredBuild:
    """Samples of one build, and when its stages began."""

    samples: list[Sample]
    stages: list[tuple[float, str]]
    seconds: float
    pss: bool

    def stage_of(self, sample: Sample) -> str:
        """The stage that ran when the sample was taken."""
        return next((name for began, name in reversed(self.stages) if began <= sample.time), BEFORE)


def measure_build(source: Path, folder: Path, num_documents: int, assignments: Sequence[str]) -> MeasuredBuild:
    """Build a fresh index in a process of its own under observation. Raises IntegrityError if it is not complete."""
    root, stages = folder / "root", folder / "stages"
    token = secrets.token_hex(8)
    program = "import sys; from benchmarks.build_memory import run_build; run_build(*sys.argv[1:4], sys.argv[4:])"
    command = [sys.executable, "-c", program, str(source), str(root), str(stages), *assignments]
    surroundings = {**os.environ, MARKER: token}
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=REPOSITORY, env=surroundings)
    sampler = MemorySampler(process.pid, f"{MARKER}={token}".encode())
    sampler.start()
    code = process.wait()
    seconds = time.monotonic() - began
    samples = sampler.stop()
    if code:
        raise RuntimeError(f"the build of {num_documents} documents ended with exit status {code}")
    found = open_current(open_store(str(root))).num_docs
    if found != num_documents:
        raise IntegrityError(f"the index must hold {num_documents} documents, it holds {found}")
    lines = [line.split(" ", 1) for line in stages.read_text().splitlines()]
    return MeasuredBuild(samples, [(float(when), name) for when, name in lines], seconds, sampler.pss)


def summary(run: MeasuredBuild) -> dict[str, Any]:
    """Peaks of one build in MB (10^6 bytes): of the sum, by kind of process, by part of the build."""
    peak = max(run.samples, key=lambda sample: sample.total)
    by_stage: dict[str, int] = {}
    for sample in run.samples:
        stage = run.stage_of(sample)
        by_stage[stage] = max(by_stage.get(stage, 0), sample.total)
    streaming = [value for name, value in by_stage.items() if name in STREAM_STAGES]
    indexing = [value for name, value in by_stage.items() if name not in (*STREAM_STAGES, BEFORE, "list sources")]
    return {
        "peak_mb": _mb(peak.total),
        "peak_stage": run.stage_of(peak),
        "at_peak_mb": {kind: _mb(peak.by_kind[kind]) for kind in KINDS},
        "peak_by_kind_mb": {kind: _mb(max(sample.by_kind[kind] for sample in run.samples)) for kind in KINDS},
        "peak_shared_memory_mb": _mb(max(sample.shared for sample in run.samples)),  # the object store, within the sum
        "peak_streaming_mb": _mb(max(streaming, default=0)),
        "peak_indexing_mb": _mb(max(indexing, default=0)),
        "peak_by_stage_mb": {name: _mb(value) for name, value in by_stage.items()},
        "max_processes": max(sample.num_processes for sample in run.samples),
        "samples": len(run.samples),
        "seconds": round(run.seconds, 1),
    }


def _mb(size: int) -> float:
    return round(size / 1e6, 1)


def measure(num_documents: int, factor: int, piece_rows: int, assignments: Sequence[str]) -> dict[str, Any]:
    """The report of both builds."""
    if not Path("/proc/self/status").exists():
        raise ConfigError("this benchmark reads /proc and needs Linux, found none")
    config = load_config(None, assignments)
    surroundings = environment()
    found = {}
    pss = True
    with tempfile.TemporaryDirectory(prefix="vectormill-memory-") as name:
        folder = Path(name)
        texts = short_texts(min(num_documents, 20_000), config.encode.model)
        for size in (num_documents, factor * num_documents):
            here = folder / str(size)
            source = here / "corpus.parquet"
            write_corpus(source, texts, size, piece_rows)
            run = measure_build(source, here, size, assignments)
            found[size] = summary(run)
            pss = pss and run.pss
            print(f"{size} documents: {found[size]['peak_mb']} MB, {run.seconds:.0f} s", file=sys.stderr, flush=True)
    small, large = found.values()
    ratio = large["peak_mb"] / small["peak_mb"]
    return {
        "benchmark": "build_memory",
        "claim": f"peak memory of a build of {factor} times the documents is at most {LIMIT} times as much",
        "ratio": round(ratio, 4),
        "limit": LIMIT,
        "holds": ratio <= LIMIT,
        "growth_mb": round(large["peak_mb"] - small["peak_mb"], 1),
        "ratio_by_kind": {
            kind: round(large["peak_by_kind_mb"][kind] / max(0.1, small["peak_by_kind_mb"][kind]), 4) for kind in KINDS
        },
        "ratio_streaming": round(large["peak_streaming_mb"] / small["peak_streaming_mb"], 4),
        "ratio_indexing": round(large["peak_indexing_mb"] / small["peak_indexing_mb"], 4),
        "memory": "PSS" if pss else "RssAnon, shared memory once",
        "documents": {str(size): one for size, one in found.items()},
        "pieces": {str(size): -(-size // piece_rows) for size in found},
        "environment": surroundings,
        "config": config.to_json(),
    }


def readable(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = []
    for size, one in report["documents"].items():
        kinds = ", ".join(f"{kind} {value:.0f}" for kind, value in one["peak_by_kind_mb"].items())
        lines.append(
            f"{size:>8} documents: peak {one['peak_mb']:.0f} MB in '{one['peak_stage']}' ({one['seconds']:.0f} s);"
            f" peaks by kind: {kinds}; streaming {one['peak_streaming_mb']:.0f}, indexing {one['peak_indexing_mb']:.0f}"
        )
    verdict = "holds" if report["holds"] else "MISSED"
    lines.append(f"ratio {report['ratio']:.3f} (+{report['growth_mb']} MB), limit {LIMIT}: {verdict}")
    lines.append(f"ratio by kind {report['ratio_by_kind']}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 if the measurement was made, whatever it shows."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.build_memory", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=5_000, help="documents of the smaller build (default 5000)")
    parser.add_argument("--factor", type=int, default=10, help="how much larger the other is (default 10)")
    parser.add_argument("--piece-rows", type=int, default=512, help="rows of a piece (default 512)")
    parser.add_argument("--max-tokens", type=int, default=16, help="tokens that a text is cut to (default 16)")
    parser.add_argument("--workers", type=int, default=0, help="encoders; 0: as many as fit (default)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="other settings of the build")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--out", help="also write the report to this file")
    given = parser.parse_args(arguments)
    own = [f"read.piece_rows={given.piece_rows}", f"encode.workers={given.workers}", "encode.device=cpu"]
    own += ["chunk.mode=truncate", f"chunk.max_tokens={given.max_tokens}"]
    report = measure(given.documents, given.factor, given.piece_rows, [*own, *given.set])
    write_report(report, given.out)
    print(json.dumps(report, indent=1) if given.json else readable(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Shows what the pipeline costs: documents/s of a whole build against the bare encoder, same texts, same threads, same run.

Bare encoder: texts in memory in, vectors out, by the same tokenizer and encoder classes, model, precision, batch budget and
pieces, in as many processes of as many threads as the build's pool; loading the model is not timed. Build: everything from listing the sources to the
published version (reading, tokenizing, encoding, commits, training, shards, merge, verification, measuring recall),
with a fresh root each time. Start-up is reported apart and is not in the steady state: start and end of Ray, and from the
beginning of the encoding stage to the first encoder with a loaded model. All are in `ratio_whole`.

Bare encoder and build take turns. Before any number is printed, every build must hold all documents, and all its
vectors must be the bare encoder's, bit for bit. CPU only. Floor: a steady-state ratio of 0.85, of the fastest rounds.
`ratio_streaming` is that of the encoding stage alone, which is what counts for a corpus so large that the index stages
vanish beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.bare_encoder import BareRun, bare_vectors, run_bare, write_pieces
from benchmarks.encoder_clock import EncoderTimes, clocked_encoders, take_times
from benchmarks.report import environment, spread, write_report
from benchmarks.texts import short_texts, write_corpus
from cluster.session import ClusterConfig, Session, connect
from operators.artifact.index import Index
from operators.encoding.encode_config import resolve_precision
from operators.errors import IntegrityError
from operators.storage.store import open_store
from pipelines import run_context
from pipelines.build import build
from pipelines.config import RunConfig, load_config
from pipelines.telemetry.progress import RunProgress

FLOOR = 0.85
# Rounds of the bare encoder that differ by more say that the machine did other work too.
QUIET_SPREAD = 1.1
ENCODE_STAGE = "encode pieces"


class StageClock(RunProgress):
    """Progress that also keeps when each stage began, CLOCK_MONOTONIC."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.began: dict[str, float] = {}

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None:
        super().stage(name, total, done)
        self.began.setdefault(name, time.monotonic())


@dataclass
class RayTimes:
    """Seconds that one build waited for Ray to start and to end."""

    start_s: float = 0.0
    stop_s: float = 0.0


@contextmanager
def clocked_ray() -> Iterator[RayTimes]:
    """The build inside the block notes how long Ray's start and end take."""
    times = RayTimes()

    @contextmanager
    def timed(config: ClusterConfig) -> Iterator[Session]:
        began = time.monotonic()
        with connect(config) as session:
            times.start_s = time.monotonic() - began
            yield session
            began = time.monotonic()
        times.stop_s = time.monotonic() - began

    with mock.patch.object(run_context, "connect", timed):
        yield times


@dataclass(frozen=True)
class BuildRun:
    """One timed build."""

    whole_s: float
    ray: RayTimes
    first_encoder_s: float  # from the beginning of the encoding stage to the first loaded model
    stages: dict[str, float]
    encoders: list[EncoderTimes] = field(repr=False)
    encode_stage: tuple[float, float] = (0.0, 0.0)

    @property
    def steady_s(self) -> float:
        """Seconds without start-up."""
        return self.whole_s - self.ray.start_s - self.ray.stop_s - self.first_encoder_s

    @property
    def streaming_s(self) -> float:
        """Seconds of the encoding stage from the first loaded model on."""
        return self.encode_stage[1] - self.encode_stage[0] - self.first_encoder_s

    @property
    def busy_s(self) -> float:
        """Seconds of all encoders together in their pieces."""
        return sum(encoder.busy_s for encoder in self.encoders)


def run_build(source: str, root: Path, config: RunConfig) -> BuildRun:
    """Build a fresh index at `root` and time it."""
    progress = StageClock()
    with clocked_encoders(), clocked_ray() as ray_times:
        began = time.monotonic()
        result = build([source], str(root), config, progress=progress)
        whole_s = time.monotonic() - began
    encoders = take_times(root)
    start = progress.began[ENCODE_STAGE]
    ready = min(encoder.ready for encoder in encoders)
    end = start + result.seconds[ENCODE_STAGE]
    return BuildRun(whole_s, ray_times, ready - start, dict(result.seconds), encoders, (start, end))


def check_build(root: Path, num_documents: int, expected: dict[tuple[str, int], bytes]) -> None:
    """Raise IntegrityError unless the published index holds all documents with the bare encoder's bits."""
    index = Index.open(open_store(str(root)))
    if index.manifest.num_docs != num_documents or index.manifest.ntotal != len(expected):
        raise IntegrityError(
            f"the index must hold {num_documents} documents in {len(expected)} chunks,"
            f" it holds {index.manifest.num_docs} in {index.manifest.ntotal}"
        )
    for part in index.parts:
        rows = part.read_rows(0, part.facts["num_entries"], ["doc_id", "chunk_no"]).to_pylist()
        for row, vector in zip(rows, part.read_vectors(0, len(rows)), strict=True):
            if expected[row["doc_id"], row["chunk_no"]] != vector.tobytes():
                raise IntegrityError(f"the vector of {row} is not the bare encoder's, bit for bit")


def measure(
    num_documents: int, workers: int, threads: int, rounds: int, piece_rows: int, changes: Sequence[str] = ()
) -> dict[str, Any]:
    """The report of a whole run."""
    own = {"read.piece_rows": piece_rows, "encode.workers": workers, "encode.threads_per_worker": threads}
    options: dict[str, tuple[Any, str]] = {key: (value, "option") for key, value in own.items()}
    config = load_config(None, changes, {**options, "encode.device": ("cpu", "benchmark")})
    surroundings = environment()
    bare: list[BareRun] = []
    builds: list[BuildRun] = []
    with tempfile.TemporaryDirectory(prefix="vectormill-throughput-") as folder:
        source, root = Path(folder) / "corpus.parquet", Path(folder) / "root"
        texts = short_texts(num_documents, config.encode.model)
        write_corpus(source, texts, num_documents, piece_rows)
        files = write_pieces(str(source), Path(folder) / "pieces", config.read)
        for number in range(rounds):
            bare.append(run_bare(files, config.chunk, config.encode, workers))
            builds.append(run_build(str(source), root, config))
            check_build(root, num_documents, bare_vectors(files))
            shutil.rmtree(root)
            _say(
                f"round {number + 1}: bare {bare[-1].seconds:.1f} s, build {builds[-1].steady_s:.1f} s in steady state"
            )
    # What else the machine does only adds time: the fastest round of each is the nearest to a quiet machine.
    best = min(run.seconds for run in bare) / min(run.steady_s for run in builds)
    ratios = [one.seconds / other.steady_s for one, other in zip(bare, builds, strict=True)]
    whole = [one.seconds / other.whole_s for one, other in zip(bare, builds, strict=True)]
    streaming = [one.seconds / other.streaming_s for one, other in zip(bare, builds, strict=True)]
    return {
        "benchmark": "build_throughput",
        "claim": f"steady-state documents/s of build are at least {FLOOR} of the bare encoder's",
        "ratio": round(best, 4),  # of the fastest rounds
        "ratio_by_round": spread(ratios),
        "floor": FLOOR,
        "holds": best >= FLOOR,
        "quiet": max(run.seconds for run in bare) <= QUIET_SPREAD * min(run.seconds for run in bare),
        "ratio_streaming": spread(streaming),
        "ratio_whole": spread(whole),
        "build_docs_per_s": spread([num_documents / run.steady_s for run in builds], 1),
        "bare_docs_per_s": spread([num_documents / run.seconds for run in bare], 1),
        "documents": num_documents,
        "pieces": len(files),
        "rounds": [_round(one, other) for one, other in zip(bare, builds, strict=True)],
        "environment": surroundings,
        "config": {**config.to_json(), "encode_precision": resolve_precision(config.encode)},
    }


def _round(bare: BareRun, build: BuildRun) -> dict[str, Any]:
    """One round's seconds, and where those of the build went."""
    start, end = build.encode_stage
    begins = [encoder.pieces[0][0] for encoder in build.encoders if encoder.pieces]
    ends = [encoder.pieces[-1][1] for encoder in build.encoders if encoder.pieces]
    share = build.busy_s / (len(build.encoders) * (max(ends) - min(begins)))
    seconds = {name: value for name, value in build.stages.items() if name != ENCODE_STAGE}
    # The session begins within the stage `start Ray` and ends after the version is published, within `publish`.
    steady = {"encode pieces, from the first encoder on": build.streaming_s, **seconds}
    steady["start Ray"] -= build.ray.start_s
    steady["publish"] -= build.ray.stop_s
    steady["rest"] = build.steady_s - sum(steady.values())
    return {
        "bare_s": round(bare.seconds, 3),
        "bare_busy_s": round(bare.busy_s, 3),
        "build_whole_s": round(build.whole_s, 3),
        "build_steady_s": round(build.steady_s, 3),
        "apart": {
            "start_ray_s": round(build.ray.start_s, 3),
            "first_encoder_ready_s": round(build.first_encoder_s, 3),
            "stop_ray_s": round(build.ray.stop_s, 3),
        },
        "steady_stages": {
            name: {"seconds": round(value, 3), "share": round(value / build.steady_s, 4)}
            for name, value in steady.items()
        },
        "encode_stage": {
            "all_encoders_ready_s": round(max(e.ready for e in build.encoders) - start, 3),
            "first_piece_begins_s": round(min(begins) - start, 3),
            "last_piece_ends_s": round(max(ends) - start, 3),
            "stage_ends_s": round(end - start, 3),
            "busy_s": round(build.busy_s, 3),
            "busy_share": round(share, 4),  # between the first piece's begin and the last one's end
            "slower_than_bare": round(build.busy_s / bare.busy_s, 4),  # the same pieces; what else uses the cores
        },
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def readable(report: dict[str, Any]) -> str:
    """The report for people."""
    rounds, others = report["ratio_by_round"], (report["ratio_streaming"]["median"], report["ratio_whole"]["median"])
    last = report["rounds"][-1]
    lines = [
        f"{report['documents']} documents in {report['pieces']} pieces",
        f"bare encoder      {report['bare_docs_per_s']['median']:8.1f} documents/s",
        f"build             {report['build_docs_per_s']['median']:8.1f} documents/s (steady state)",
        f"ratio             {report['ratio']:8.3f} (rounds {rounds['min']:.3f} to {rounds['max']:.3f}), floor {FLOOR}:"
        f" {'holds' if report['holds'] else 'MISSED'}; encoding stage alone {others[0]:.3f}, with start-up {others[1]:.3f}",
        *(
            []
            if report["quiet"]
            else ["The machine was not quiet: rounds of the bare encoder differ by more than 10%."]
        ),
        "last round, seconds of the build:",
        *(f"  {name:<42} {value:7.2f}  (apart)" for name, value in last["apart"].items()),
        *(f"  {name:<42} {v['seconds']:7.2f}  {v['share']:6.1%}" for name, v in last["steady_stages"].items()),
        f"encoders: {last['encode_stage']}",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 if the measurement was made, whatever it shows."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.build_throughput", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=20_000, help="distinct short texts (default 20000)")
    parser.add_argument("--workers", type=int, default=0, help="encoders; 0: cores / threads (default)")
    parser.add_argument("--threads-per-worker", type=int, default=1, help="threads of an encoder (default 1)")
    parser.add_argument("--rounds", type=int, default=2, help="turns of bare encoder and build (default 2)")
    parser.add_argument("--piece-rows", type=int, default=1024, help="rows of a piece and row group (default 1024)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="other settings of the build")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--out", help="also write the report to this file")
    given = parser.parse_args(arguments)
    threads = given.threads_per_worker
    workers = given.workers or max(1, (os.cpu_count() or 1) // threads)
    report = measure(given.documents, workers, threads, given.rounds, given.piece_rows, given.set)
    write_report(report, given.out)
    print(json.dumps(report, indent=1) if given.json else readable(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())

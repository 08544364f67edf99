"""One point of the scaling benchmark: the streaming job with so many simulated accelerators, and where the CPU went."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.cpu_clock import CpuClock
from benchmarks.stage_clock import CPU_S, SimulatedEncodeStage, SimulatedJob, clocked_stages
from benchmarks.texts import write_corpus
from cluster.parcels import PieceResult
from cluster.preflight import plan_stream
from cluster.session import ClusterConfig, connect
from cluster.stream import pieces_per_task, stream_pieces
from cluster.telemetry import Span
from operators.chunker import ChunkConfig
from operators.encoding.encode_config import EncodeConfig
from operators.sources.listing import list_sources
from operators.sources.pieces import plan_pieces
from operators.sources.read_config import ReadConfig

STALL_TIMEOUT_S = 300.0
STAGES = ("read", "chunk", "encode", "commit")
# CPU slots beside those of the encoders. Ray Data keeps up to half of them for commits, so two are for reading, as many as the
# machine that this was written on has cores.
TASK_SLOTS = 4


@dataclass(frozen=True)
class Point:
    """A pool of simulated accelerators."""

    workers: int
    tokens_per_s: float  # of one of them

    @property
    def demand(self) -> float:
        """Tokens/s of all accelerators if they never wait."""
        return self.workers * self.tokens_per_s


def run_point(point: Point, texts: Sequence[str], num_pieces: int, piece_rows: int) -> dict[str, Any]:
    """What the pool did, in steady state: the second half of each worker's pieces.

    By then the workers have all started, and what was read ahead while they did is used up.
    """
    with tempfile.TemporaryDirectory(prefix="vectormill-scaling-") as folder:
        source = Path(folder) / "in" / "corpus.parquet"
        write_corpus(source, texts, piece_rows * num_pieces, piece_rows)
        read = ReadConfig(piece_rows=piece_rows)
        pieces = plan_pieces(list_sources([str(source)]).objects, read).pieces({})
        root = str(Path(folder) / "root")
        job = SimulatedJob(
            root, "runs/x", "i", "f", read, ChunkConfig(), EncodeConfig(), tokens_per_s=point.tokens_per_s
        )
        with _logical_gpus(point.workers), connect(ClusterConfig(where="ray")) as session, CpuClock() as clock:
            plan = plan_stream(session, workers=point.workers, threads_per_worker=1, use_gpu=True, pieces_in_flight=0)
            began = time.time()
            with clocked_stages(SimulatedEncodeStage):
                stream = stream_pieces(job, pieces, plan, piece_bytes=read.piece_bytes, stall_timeout_s=STALL_TIMEOUT_S)
                results = list(stream)
    failed = [result.error for result in results if result.error is not None]
    if failed or len(results) != len(pieces):
        raise RuntimeError(f"{len(pieces)} pieces went in, {len(results)} came out, {len(failed)} failed: {failed[:1]}")
    return {
        "workers": point.workers,
        "tokens_per_s_of_one": point.tokens_per_s,
        "demand_tokens_per_s": point.demand,
        "pieces": len(pieces),
        "pieces_per_task": pieces_per_task(plan, len(pieces), read.piece_bytes),
        **_account(point, results, clock, began),
    }


@contextmanager
def _logical_gpus(workers: int) -> Iterator[None]:
    """A Ray that is started in the block believes that its machine has so many GPUs, each with a CPU, and TASK_SLOTS more."""
    resources = json.dumps({"GPU": workers, "CPU": workers + TASK_SLOTS})
    with mock.patch.dict(os.environ, {"RAY_OVERRIDE_RESOURCES": resources}):
        yield


def _account(point: Point, results: list[PieceResult], clock: CpuClock, began: float) -> dict[str, Any]:
    spans = {stage: [span_of(result, stage) for result in results] for stage in STAGES}
    encode, commit = spans["encode"], spans["commit"]
    tokens = np.array([result.facts["num_tokens"] for result in results])
    by_worker: dict[str, list[int]] = {}
    for number in np.argsort([span.begin for span in encode]).tolist():
        by_worker.setdefault(encode[number].worker, []).append(number)
    steady = [numbers[len(numbers) // 2 :] for numbers in by_worker.values()]
    ends = [(encode[numbers[0]].begin, encode[numbers[-1]].end) for numbers in steady]
    slept = [tokens[numbers].sum() / point.tokens_per_s for numbers in steady]
    busy = [seconds / (last - first) for seconds, (first, last) in zip(slept, ends, strict=True)]
    gaps = [encode[b].begin - encode[a].end for numbers in steady for a, b in itertools.pairwise(numbers)]
    begins = sorted(span.begin for span in encode)
    begin, end = begins[len(begins) // 2], begins[-1]
    to_monotonic = time.monotonic() - time.time()
    used = clock.between(begin + to_monotonic, end + to_monotonic)
    encoded = sum(n * overlap(span, begin, end) for n, span in zip(tokens, encode, strict=True))
    return {
        "busy_share": round(float(np.mean(busy)), 4),
        "busy_share_least": round(min(busy), 4),
        "tokens_per_s": round(encoded / (end - begin)),
        "cpu_share": round(sum(used.values()) / (end - begin) / (os.cpu_count() or 1), 4),
        "cores_used": {kind: round(value / (end - begin), 4) for kind, value in used.items()},
        "queue_depth": round(_mean_depth(spans, begin, end), 1),
        "gap_ms": {"median": _ms(float(np.median(gaps))), "p90": _ms(float(np.percentile(gaps, 90)))} if gaps else {},
        "window_s": round(end - begin, 1),
        "first_worker_s": round(min(span.begin for span in encode) - began, 1),
        "last_worker_s": round(max(encode[numbers[0]].begin for numbers in by_worker.values()) - began, 1),
        "workers_used": len(by_worker),
        "tokens_per_piece": round(float(tokens.mean())),
        "stage_cpu_s_per_mtoken": _stage_cpu(results),
        "ray_cpu_ms_per_block": {
            **{
                kind: _ms(sum(used[name] for name in names) / max(1, _blocks(results, commit, begin, end)))
                for kind, names in {"driver": ("driver",), "raylet and others": ("raylet", "gcs", "other")}.items()
            },
            "in encoders": _ms(_beside_stages(results, ("encode",))),
            "in tasks": _ms(_beside_stages(results, ("read", "chunk", "commit"))),
        },
    }


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 2)


def _stage_cpu(results: list[PieceResult]) -> dict[str, float]:
    """CPU seconds of each stage itself, without each process's first call, which loads what the stage needs."""
    mtokens = sum(result.facts["num_tokens"] for result in results) / 1e6
    blocks = [result for result in results if CPU_S in result.facts]
    found = {}
    for stage in STAGES:
        calls: dict[str, list[tuple[float, float]]] = {}
        for result in blocks:
            if (
                stage not in result.facts[CPU_S]
            ):  # the last block is smaller: encoders may get it with a part of another
                continue
            own, so_far = result.facts[CPU_S][stage]
            calls.setdefault(span_of(result, stage).worker, []).append((so_far, own))
        later = [own for entries in calls.values() for _, own in sorted(entries)[1:]]
        found[stage] = round(sum(later) / max(1, len(later)) * len(blocks) / mtokens, 4)
    return found


def _blocks(results: list[PieceResult], commit: list[Span], begin: float, end: float) -> int:
    """Blocks that were committed from `begin` to `end`."""
    return sum(CPU_S in r.facts and begin <= span.end <= end for r, span in zip(results, commit, strict=True))


def _beside_stages(results: list[PieceResult], stages: Sequence[str]) -> float:
    """CPU seconds a block of the processes that run these stages, beside the stages: Ray's, and what starts and idles there.

    From the first block that a process saw to its last one.
    """
    calls: dict[str, list[tuple[float, float, str]]] = {}
    for result in results:
        for stage in stages if CPU_S in result.facts else ():
            if stage not in result.facts[CPU_S]:
                continue
            own, so_far = result.facts[CPU_S][stage]
            calls.setdefault(span_of(result, stage).worker, []).append((so_far, own, stage))
    seconds, share = 0.0, 0.0
    for entries in calls.values():
        entries.sort()
        seconds += entries[-1][0] - entries[0][0] - sum(own for _, own, _ in entries[1:])
        share += len(entries) - 1
    total = sum(len(entries) for entries in calls.values())
    blocks = total / len(stages)
    return seconds / blocks * total / max(1.0, share)


def span_of(result: PieceResult, stage: str) -> Span:
    return next(span for span in result.spans if span.stage == stage)


def overlap(span: Span, begin: float, end: float) -> float:
    return max(0.0, min(span.end, end) - max(span.begin, begin)) / max(span.seconds, 1e-9)


def _mean_depth(spans: dict[str, list[Span]], begin: float, end: float) -> float:
    """Pieces that wait for an encoder, on average over [begin, end)."""
    waits = zip(spans["chunk"], spans["encode"], strict=True)
    waited = [max(0.0, min(after.begin, end) - max(before.end, begin)) for before, after in waits]
    return sum(waited) / (end - begin)

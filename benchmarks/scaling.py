"""Shows that encoders scale: more of them do as much more, and the pipeline around them keeps them busy.

Shows (threads) one encoder of 2 threads against two of 1, real model, real texts, through the real stream: tokens/s from the
moment when all encoders have begun to the moment when the first has no more work, so neither start-up nor the end counts.
Shows (accelerators) 1, 4, 16 and 64 encoders whose device is simulated: it sleeps as long as one of so many tokens/s
would take. All else is real: reading, cleaning, tokenizing, vectors' bytes, Ray, commits. Busy share: time asleep over the time
from the first to the last piece of a worker, over the second half of its pieces. `knee` is what the pipeline around
the encoders costs: CPU seconds for a million tokens of each stage, and of Ray for a block; from the point that asks for most.

Floor: throughput of two encoders at least 0.95 of one's; busy share at least 0.95 wherever the demand is at most 0.85 of what
this machine's cores can feed (`knee.machine_tokens_per_s`). With --out, points that the file has from before are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.report import environment, spread, write_report
from benchmarks.simulated_pool import Point, overlap, run_point, span_of
from benchmarks.texts import short_texts, texts_of_lengths, write_corpus
from cluster.preflight import plan_stream
from cluster.session import ClusterConfig, Session, connect
from cluster.stream import StreamJob, stream_pieces
from operators.chunker import ChunkConfig
from operators.encoding.encode_config import EncodeConfig, configured_model, resolve_precision
from operators.sources.listing import list_sources
from operators.sources.pieces import Piece, plan_pieces
from operators.sources.read_config import ReadConfig

FLOOR = 0.95
MODEL = "all-MiniLM-L6-v2"
TOKENS_OF_TEXT = (40, 160)  # of the simulated accelerators' texts
KEPT_SHARE = 0.85  # of the knee: the demand up to which the floor holds
PIECES_PER_WORKER = 6


def measure_threads(num_documents: int, rounds: int, piece_rows: int = 256) -> dict[str, Any]:
    """One encoder of 2 threads and two of 1, in turns."""
    read = ReadConfig(piece_rows=piece_rows)
    encode = EncodeConfig(device="cpu")
    encode = replace(encode, precision=resolve_precision(encode))
    rates: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory(prefix="vectormill-scaling-") as name:
        folder = Path(name)
        write_corpus(folder / "in" / "corpus.parquet", short_texts(num_documents, MODEL), num_documents, piece_rows)
        pieces = plan_pieces(list_sources([str(folder / "in")]).objects, read).pieces({})
        with connect(ClusterConfig(where="ray")) as session:
            for number in range(rounds):
                for workers in (1, 2) if number % 2 == 0 else (2, 1):
                    config = replace(encode, workers=workers, threads_per_worker=2 // workers)
                    fingerprint = configured_model(config).fingerprint
                    root = str(folder / f"root-{number}-{workers}")
                    job = StreamJob(root, "runs/x", "i", fingerprint, read, ChunkConfig(), config)
                    rates[workers].append(_tokens_per_s(job, pieces, session))
                    _say(f"round {number + 1}: {workers} x {2 // workers} threads, {rates[workers][-1]:,.0f} tokens/s")
    ratios = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
    ratio = spread(rates[2], 1)["median"] / spread(rates[1], 1)["median"]
    return {
        "one_worker_two_threads_tokens_per_s": spread(rates[1], 1),
        "two_workers_one_thread_tokens_per_s": spread(rates[2], 1),
        "ratio": round(ratio, 4),  # of the medians
        "ratio_by_round": spread(ratios),
        "floor": FLOOR,
        "holds": ratio >= FLOOR,
        "rounds": rounds,
        "documents": num_documents,
        "pieces": len(pieces),
        "precision": encode.precision,
    }


def _tokens_per_s(job: StreamJob, pieces: Sequence[Piece], session: Session) -> float:
    """Of all encoders together, while all of them have work."""
    encode = job.encode
    plan = plan_stream(
        session,
        workers=encode.workers,
        threads_per_worker=encode.threads_per_worker,
        use_gpu=False,
        pieces_in_flight=0,
    )
    results = list(stream_pieces(job, pieces, plan, piece_bytes=job.read.piece_bytes, stall_timeout_s=300))
    failed = [result.error for result in results if result.error]
    if failed or len(results) != len(pieces):
        raise RuntimeError(f"{len(pieces)} pieces went in, {len(results)} came out, {len(failed)} failed: {failed[:1]}")
    spans = [span_of(result, "encode") for result in results]
    workers = {span.worker for span in spans}
    begin = max(min(span.begin for span in spans if span.worker == worker) for worker in workers)
    end = min(max(span.end for span in spans if span.worker == worker) for worker in workers)
    if len(workers) != encode.workers or end <= begin:
        raise RuntimeError(f"{len(workers)} of {encode.workers} encoders had work; take more documents (--documents)")
    shares = [overlap(span, begin, end) for span in spans]
    tokens = sum(r.facts["num_tokens"] * share for r, share in zip(results, shares, strict=True))
    return float(tokens / (end - begin))


def measure_points(points: Sequence[Point], seconds: float, piece_rows: int, num_texts: int) -> list[dict[str, Any]]:
    """What each pool of simulated accelerators did."""
    texts = texts_of_lengths(num_texts, MODEL, *TOKENS_OF_TEXT)
    tokens_per_piece = piece_rows * sum(TOKENS_OF_TEXT) / 2
    found = []
    for point in points:
        least = PIECES_PER_WORKER * point.workers
        num_pieces = max(least, round(seconds * point.demand / tokens_per_piece))
        found.append(run_point(point, texts, num_pieces, piece_rows))
        _say(
            f"{point.workers} x {point.tokens_per_s:,.0f} tokens/s: busy {found[-1]['busy_share']:.3f},"
            f" {found[-1]['tokens_per_s']:,} tokens/s, cores in use {found[-1]['cpu_share']:.0%}"
        )
    return found


def knee(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the pipeline around the encoders takes of the CPU, from the point that asked for most."""
    most = max(points, key=lambda point: float(point["demand_tokens_per_s"]))
    mtokens_of_block = most["tokens_per_piece"] * most["pieces_per_task"] / 1e6
    of_ray = sum(most["ray_cpu_ms_per_block"].values()) / 1e3 / mtokens_of_block
    per_mtoken = sum(most["stage_cpu_s_per_mtoken"].values()) + of_ray
    one_core = 1e6 / per_mtoken
    return {
        "from": {
            name: most[name] for name in ("workers", "tokens_per_s_of_one", "tokens_per_piece", "pieces_per_task")
        },
        "stage_cpu_s_per_mtoken": most["stage_cpu_s_per_mtoken"],
        "ray_cpu_ms_per_block": most["ray_cpu_ms_per_block"],
        "ray_cpu_s_per_mtoken": round(of_ray, 4),
        "core_tokens_per_s": round(one_core),
        "machine_tokens_per_s": round(one_core * (os.cpu_count() or 1)),
        "measured_tokens_per_s": most["tokens_per_s"],
    }


def assemble(report: dict[str, Any]) -> dict[str, Any]:
    """The report with what follows from its points."""
    points = sorted(report.get("points", []), key=lambda p: (p["workers"], p["demand_tokens_per_s"]))
    if points:
        report["points"], report["knee"] = points, knee(points)
        limit = KEPT_SHARE * report["knee"]["machine_tokens_per_s"]
        fed = [point for point in points if point["demand_tokens_per_s"] <= limit]
        report["least_busy_share"] = min((point["busy_share"] for point in fed), default=None)
        report["busy_up_to_tokens_per_s"] = max((point["demand_tokens_per_s"] for point in fed), default=None)
        report["busy_holds"] = all(point["busy_share"] >= FLOOR for point in fed)
    return report


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The report: what was measured now, and what the file has."""
    kept: dict[str, Any] = {}
    if arguments.out and Path(arguments.out).exists():
        kept = json.loads(Path(arguments.out).read_text(encoding="utf-8"))
    report: dict[str, Any] = {
        "benchmark": "scaling",
        "claim": f"two encoders do at least {FLOOR} of one with their threads; the pipeline keeps accelerators {FLOOR} busy",
        "environment": environment(),
        "config": {"seconds": arguments.seconds, "piece_rows": arguments.piece_rows, "texts": arguments.texts},
        "floor": FLOOR,
        **{name: kept[name] for name in ("threads", "points") if name in kept},
    }
    if arguments.rounds:
        report["threads"] = measure_threads(arguments.documents, arguments.rounds)
    points = [Point(w, demand / w) for w in arguments.workers for demand in arguments.demand]
    if points:
        found = measure_points(points, arguments.seconds, arguments.piece_rows, arguments.texts)
        names = {(one["workers"], one["demand_tokens_per_s"]) for one in found}
        others = [p for p in report.get("points", []) if (p["workers"], p["demand_tokens_per_s"]) not in names]
        report["points"] = others + found
    return assemble(report)


def readable(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = []
    if "threads" in report:
        found = report["threads"]
        one, two = (found[f"{name}_tokens_per_s"] for name in ("one_worker_two_threads", "two_workers_one_thread"))
        lines += [
            f"one encoder of 2 threads  {one['median']:10,.0f} tokens/s ({one['min']:,.0f} to {one['max']:,.0f})",
            f"two encoders of 1 thread  {two['median']:10,.0f} tokens/s ({two['min']:,.0f} to {two['max']:,.0f})",
            f"ratio {found['ratio']:.3f}, floor {FLOOR}: {'holds' if found['holds'] else 'MISSED'}",
        ]
    if report.get("points"):
        lines.append("accelerators      tokens/s   asked for   busy  (least)   cores  queue  gap ms")
        lines += [
            f"{p['workers']:>12} {p['tokens_per_s']:>13,} {p['demand_tokens_per_s']:>11,.0f}  {p['busy_share']:.3f}"
            f"  ({p['busy_share_least']:.3f})  {p['cpu_share']:5.0%} {p['queue_depth']:>6} {p['gap_ms'].get('median', 0):>7}"
            for p in report["points"]
        ]
        found = report["knee"]
        lines += [
            f"a core feeds {found['core_tokens_per_s']:,} tokens/s, this machine {found['machine_tokens_per_s']:,};"
            f" busy up to {KEPT_SHARE:.0%} of it: {'holds' if report['busy_holds'] else 'MISSED'}",
            f"CPU seconds for a million tokens: {found['stage_cpu_s_per_mtoken']}, Ray {found['ray_cpu_s_per_mtoken']}",
            f"Ray's CPU ms for a block: {found['ray_cpu_ms_per_block']}",
        ]
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 if the measurement was made, whatever it shows."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the threads part; 0: leave it out (default 3)")
    parser.add_argument("--documents", type=int, default=10_240, help="short texts of a round (default 10240)")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 4, 16, 64], help="accelerators; none: leave out")
    parser.add_argument(
        "--demand",
        type=float,
        nargs="+",
        default=[100_000, 200_000, 1_000_000],
        help="tokens/s of all accelerators together (default 100000 200000 1000000)",
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="of a point, about, at the least (default 20)")
    parser.add_argument(
        "--piece-rows", type=int, default=256, help="texts of a piece of the accelerators (default 256)"
    )
    parser.add_argument("--texts", type=int, default=16_000, help="distinct texts of the accelerators (default 16000)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--out", help="also write the report to this file")
    given = parser.parse_args(arguments)
    report = measure(given)
    write_report(report, given.out)
    print(json.dumps(report, indent=1) if given.json else readable(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Shows what telemetry costs: seconds of measuring, telling Ray's metrics and counting in the driver, over those of the work.

The work is whole pieces of the default size through all stages in this process (read, chunk, encode with one thread,
commit). The telemetry is what those pieces cause, by the same functions, in a Ray session so that its metrics are recorded:
four spans, their way with the piece, and all that the driver does when a piece ends. Each is timed by itself, since the
difference of two whole runs is less than their noise. Limit: 1%.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import environment, write_report
from benchmarks.texts import short_texts, write_corpus
from cluster import parcels, stream
from cluster.session import ClusterConfig, connect
from cluster.telemetry import METRICS, Stopwatch, load_spans
from operators.chunker import ChunkConfig
from operators.encoding.encode_config import EncodeConfig, configured_model
from operators.sources.listing import list_sources
from operators.sources.pieces import Piece, plan_pieces
from operators.sources.read_config import ReadConfig
from pipelines.telemetry.progress import RunProgress

LIMIT = 0.01
STAGES = ("read", "chunk", "encode", "commit")


def telemetry_of(piece: Piece, done: parcels.PieceResult, progress: RunProgress) -> None:
    """Everything that a piece's telemetry does, in all workers and in the driver."""
    line = parcels.envelope(parcels.Parcel(piece, None, None, done.facts))
    for stage in STAGES:
        watch = Stopwatch()
        spans = load_spans(line.column("spans")[0].as_py())
        line = parcels.with_spans(line, spans, watch.span(stage))
    progress.piece_done(parcels.result_of(line.to_pylist()[0]))


def measure(num_pieces: int, repeats: int) -> dict[str, Any]:
    """The report of a whole run."""
    surroundings = environment()
    read, encode = ReadConfig(), EncodeConfig(device="cpu")
    spec = configured_model(encode)
    with tempfile.TemporaryDirectory(prefix="vectormill-telemetry-") as folder:
        source = Path(folder) / "corpus.parquet"
        count = (num_pieces + 1) * read.piece_rows
        write_corpus(source, short_texts(count, encode.model), count, read.piece_rows)
        pieces = plan_pieces(list_sources([str(source)]).objects, read).pieces({})
        job = stream.StreamJob(f"{folder}/root", "runs/x", "i", spec.fingerprint, read, ChunkConfig(), encode)
        stage = stream.EncodeStage(job)
        stream.run_piece(job, pieces[0], stage)  # loads and compiles
        began = time.perf_counter()
        done = [stream.run_piece(job, piece, stage) for piece in pieces[1:]]
        piece_s = (time.perf_counter() - began) / len(done)
        assert not [result.error for result in done if result.error]
        with connect(ClusterConfig(where="ray", num_cpus=1)):
            progress = RunProgress(quiet=True)
            progress.stage("encode pieces", total=repeats)
            progress.expect_pieces(pieces, pieces, 1, False)
            telemetry_of(pieces[1], done[0], progress)
            began = time.perf_counter()
            for number in range(repeats):
                telemetry_of(pieces[1], done[number % len(done)], progress)
            telemetry_s = (time.perf_counter() - began) / repeats
            METRICS.forget()
    share = telemetry_s / piece_s
    return {
        "benchmark": "telemetry_cost",
        "claim": f"telemetry takes less than {LIMIT:.0%} of a piece's time",
        "share": round(share, 6),
        "limit": LIMIT,
        "holds": share < LIMIT,
        "telemetry_us_per_piece": round(1e6 * telemetry_s, 1),
        "piece_ms": round(1e3 * piece_s, 1),
        "piece_rows": read.piece_rows,
        "tokens_per_piece": round(sum(result.facts["num_tokens"] for result in done) / len(done)),
        "pieces": num_pieces,
        "repeats": repeats,
        "environment": surroundings,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 if the measurement was made, whatever it shows."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.telemetry_cost", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pieces", type=int, default=8, help="of default size, really worked on (default 8)")
    parser.add_argument("--repeats", type=int, default=2000, help="of a piece's telemetry (default 2000)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--out", help="also write the report to this file")
    given = parser.parse_args(arguments)
    report = measure(given.pieces, given.repeats)
    write_report(report, given.out)
    if given.json:
        print(json.dumps(report, indent=1))
    else:
        print(
            f"telemetry {report['telemetry_us_per_piece']:.0f} us of a piece's {report['piece_ms']:.0f} ms"
            f" ({report['piece_rows']} rows, {report['tokens_per_piece']} tokens): {report['share']:.3%},"
            f" limit {LIMIT:.0%}: {'holds' if report['holds'] else 'MISSED'}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

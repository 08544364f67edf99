"""How many inverted lists `measure recall` scans of a query, all its searches together, at several sizes of the index.

Builds indices of short texts with the real model and the default settings, and reads from each what its build measured:
the searches that found the nprobe for `index.target_recall`. `plan` counts with the largest share of the index that any of
them searched (cluster/capacity/stages.py). Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import environment, write_report
from benchmarks.texts import texts_of_lengths, write_corpus
from pipelines.build import build
from pipelines.config import load_config
from pipelines.telemetry.progress import RunProgress

MODEL = "all-MiniLM-L6-v2"
SIZES = (1_500, 6_000, 68_000)  # texts; 32, 128 and 1,024 lists
MIN_TOKENS, MAX_TOKENS = 8, 26


def measure(sizes: list[int], folder: Path) -> dict[str, Any]:
    """What the builds of so many texts each searched."""
    texts = texts_of_lengths(max(sizes), MODEL, MIN_TOKENS, MAX_TOKENS)
    rows = []
    for size in sizes:
        corpus = folder / f"{size}.parquet"
        write_corpus(corpus, texts[:size], size, 10_000)
        settings = load_config(None, ["cluster.where=process"])
        manifest = build([str(corpus)], str(folder / f"index-{size}"), settings, progress=RunProgress()).manifest
        quality = manifest.quality
        lists = sum(search["nprobe"] for search in quality["curve"])
        rows.append(
            {
                "vectors": manifest.ntotal,
                "nlist": manifest.nlist,
                "queries": quality["queries"],
                "recall@10": quality["recall@10"],
                "nprobe": quality["nprobe"],
                "refine_factor": quality["refine_factor"],
                "searches": len(quality["curve"]),
                "searched_lists": lists,
                "searched_share": round(lists / manifest.nlist, 3),
            }
        )
    return {"sizes": rows, "target_recall": settings.index.target_recall, "environment": environment()}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.searched_lists", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--texts", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--json", action="store_true", help="one line of JSON and nothing else")
    parser.add_argument("--out", help="also write the report to this file")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vectormill-lists-") as name:
        report = measure(given.texts, Path(name))
    write_report(report, given.out)
    print(json.dumps(report) if given.json else json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

"""`demo`: an index over the docstrings of the installed Python packages, and three questions to it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from operators.errors import ConfigError
from pipelines.build import BuildResult, build
from pipelines.config import load_config
from pipelines.demo_corpus import write_demo_corpus
from pipelines.search import search
from pipelines.telemetry.progress import RunProgress

QUESTIONS = (
    "how do I compute the singular value decomposition of a matrix",
    "run a function in parallel in a pool of worker processes",
    "parse command line arguments",
)
HITS_PER_QUESTION = 3
# Small pieces, so that all encoders have work and an interrupted demo loses little.
PIECE_ROWS = 200


@dataclass(frozen=True)
class Demo:
    """What the demo made: the corpus and the index below one folder, and the answers."""

    corpus: str
    root: str
    built: BuildResult
    results: list[dict[str, Any]]


def demo(folder: str = "demo", documents: int = 4000, progress: RunProgress | None = None) -> Demo:
    """Write the corpus, build its index, ask three questions. Run again, it encodes nothing again.

    Raises ConfigError for a number of documents below 1, and what `build` and `search` raise.
    """
    if documents < 1:
        raise ConfigError(f"the demo needs at least 1 document, got {documents} (--documents)")
    corpus, root = Path(folder) / "corpus.parquet", str(Path(folder) / "index")
    with progress or RunProgress(quiet=True) as shown:
        shown.stage("collect docstrings", total=1)
        write_corpus(corpus, documents)
        # A docstring says first what its object is for: one chunk each answers better, in half the time.
        config = load_config(options={"read.piece_rows": (PIECE_ROWS, "demo"), "chunk.mode": ("truncate", "demo")})
        built = build([str(corpus)], root, config, progress=shown)
    results = search(root, QUESTIONS, k=HITS_PER_QUESTION)
    return Demo(str(corpus), root, built, results)


def write_corpus(path: Path, documents: int) -> None:
    """The demo's corpus at `path`. A file that holds it already stays as it is: a new one would be a changed source."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_demo_corpus(temporary, documents)
        table = pq.read_table(temporary)
        pq.write_table(table, temporary, row_group_size=PIECE_ROWS, compression="zstd")
        if not path.exists() or path.read_bytes() != temporary.read_bytes():
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

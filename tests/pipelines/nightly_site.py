"""A corpus of a few objects, an index of it with a tiny model, and nightly commands on it, in this process."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from operators.artifact.index import Index
from operators.artifact.manifest import Manifest, open_current
from operators.storage.store import open_store
from pipelines.build import BuildResult, build
from pipelines.config import RunConfig, load_config
from pipelines.update import UpdateOptions, UpdateResult, update
from tests.pipelines.plain_corpus import Doc, write_object

# Small pieces, shards and parts, so that a few documents take every path of many.
OVERLAP_TOKENS = 8  # the tiny model takes 48 tokens
UNITS = (
    "read.piece_rows=3",
    "read.piece_bytes=150",
    "index.part_bytes=3000",
    "index.nlist=4",
    "index.query_sample=8",
    "encode.precision=float32",
    f"chunk.overlap_tokens={OVERLAP_TOKENS}",
)
HERE = ("cluster.where=process", "read.max_reject_fraction=1", "index.shard_rows=6", "index.merge_buffer_bytes=2000")

A = [(f"a-{number}", f"the wing of plane {number} and its flow") for number in range(8)]
B = [(f"b-{number}", f"heat in the nozzle number {number}") for number in range(8)]
C = [(f"c-{number}", f"shock and wake, case {number}") for number in range(8)]


def configured(base: RunConfig) -> RunConfig:
    """The settings of a version, to be run in this process in small units."""
    return load_config(None, HERE, {}, base)


class Site:
    """`folder` with the corpus (docs/) and the index (root, or another place)."""

    def __init__(self, folder: Path, model: Path, root: str = "") -> None:
        self.model = model
        self.docs = folder / "docs"
        self.docs.mkdir(parents=True, exist_ok=True)
        self.root = root or str(folder / "root")
        self._stamp = 0

    def put(self, name: str, docs: Sequence[Doc]) -> str:
        """Write an object, at a time of its own; its path."""
        self._stamp += 1
        write_object(self.docs, name, docs, self._stamp)
        return str(self.docs / name)

    def put_three(self) -> None:
        """Objects of different kinds with the documents of A, B and C."""
        self.put("a.jsonl", A)
        self.put("b.parquet", B)
        self.put("c.csv.gz", C)

    def change(self) -> None:
        """Two objects change, one goes and one comes: 7 texts to encode."""
        self.put("a.jsonl", [("a-0", "an edited text"), *A[2:], *[(f"n-{i}", f"new text {i}") for i in range(5)]])
        self.put("d.csv.gz", [("d-0", "in a new object"), *B[:1]])
        (self.docs / "c.csv.gz").unlink()

    def copied(self, root: Path) -> Site:
        """Another index of the same corpus."""
        shutil.copytree(self.root, root)
        return Site(self.docs.parent, self.model, root=str(root))

    def build(self, *settings: str, source: str = "") -> BuildResult:
        """The first version, of docs/ or of another place."""
        chosen = [*UNITS, f"encode.model={self.model}", *HERE, *settings]
        return build([source or str(self.docs)], self.root, load_config(None, chosen))

    def update(
        self, *sources: str, min_recall: float = 0.0, settings: Sequence[str] = (), **options: object
    ) -> UpdateResult:
        """An update to all of docs/, or to `sources`."""
        chosen = UpdateOptions(min_recall=min_recall, **options)  # type: ignore[arg-type]
        given = list(sources) if sources or chosen.append else [str(self.docs)]
        return update(given, self.root, lambda base: load_config(None, [*HERE, *settings], {}, base), chosen)

    @property
    def current(self) -> Manifest:
        """The published version."""
        return open_current(open_store(self.root))

    def live(self, version: Manifest | None = None) -> dict[str, str]:
        """Text by id of what the index holds (documents of one chunk)."""
        index = Index(open_store(self.root), version or self.current)
        everything = index.exact_search(np.ones((1, index.manifest.d), np.float32), index.manifest.ntotal)
        rows = index.rows_of(everything.entries_Qk[0])
        found = {row["doc_id"]: row["text"] for row in rows}
        assert len(found) == len(rows) == index.manifest.num_docs
        return found

    def files(self) -> dict[str, tuple[int, int]]:
        """Everything below a local root: name to size and time of change."""
        below = [path for path in Path(self.root).rglob("*") if path.is_file()]
        return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in below}

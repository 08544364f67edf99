"""What a version that was updated must answer like: an index built anew of the same documents with the same quantizer."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from operators.artifact.exact_neighbours import read_exact
from operators.artifact.index import Index
from operators.artifact.manifest import Segment
from operators.artifact.quantizer import read_quantizer
from operators.piece_store import read_table
from operators.shard_builder import PieceOfShard, build_shard
from operators.storage.checked import ObjectEntry
from operators.storage.store import open_store
from tests.artifact_maker import commit_table, encoded_table, merge_parts


def check_against_one_from_scratch(index: Index, winners: Sequence[str], queries_Qd: np.ndarray, folder: Path) -> None:
    """AssertionError unless the same entries come with the same scores from the same lists. winners: ids in corpus order."""
    manifest = index.manifest
    entries = index.exact_search(queries_Qd[:1], manifest.ntotal).entries_Qk[0]
    rows = index.rows_of(entries)
    order = sorted(range(len(rows)), key=lambda i: (winners.index(rows[i]["doc_id"]), rows[i]["chunk_no"]))
    doc_ids, chunk_no, texts = ([rows[i][name] for i in order] for name in ("doc_id", "chunk_no", "text"))
    table = encoded_table(doc_ids, chunk_no, texts, index.vectors_of(entries[order]))
    with tempfile.TemporaryDirectory(dir=folder) as root:
        store = open_store(root)
        quantizer = read_quantizer(index.store, manifest.quantizer_entry, manifest.list_assignment)
        piece = PieceOfShard(commit_table(store, "0000", table), 0, table.num_rows, [])
        shard = build_shard(store, "runs/test/shard", [piece], quantizer, "inputs")
        segment = Segment("s1", 0, table.num_rows, merge_parts(store, [shard], quantizer))
        entry = quantizer.write(store).to_json()
        scratch = Index(store, dataclasses.replace(manifest, segments=[segment], quantizer=entry))
        for nprobe, refine in ((1, 1), (2, 0), (manifest.nlist, 1)):
            found = [scored(one, queries_Qd, nprobe, refine) for one in (index, scratch)]
            assert found[0] == found[1]


def check_exact_neighbours(index: Index) -> None:
    """AssertionError unless those that are stored for the query sample are what a scan of all live rows finds."""
    manifest, store = index.manifest, index.store
    assert manifest.exact is not None
    exact = read_exact(store, ObjectEntry.from_json(manifest.exact))
    sample = read_table(store, ObjectEntry.from_json(manifest.queries), ["vector"])
    queries_Qd = np.array(sample.column("vector").to_pylist(), np.float32)
    found = index.exact_search(queries_Qd, manifest.ntotal)
    for row_ids, scores, all_rows, all_scores in zip(
        exact.row_ids, exact.scores, found.row_ids_Qk, found.scores_Qk, strict=True
    ):
        assert len(row_ids) >= min(10, manifest.ntotal)
        score_of = dict(zip(all_rows.tolist(), all_scores.tolist(), strict=True))
        best = all_scores[: len(row_ids)]
        np.testing.assert_allclose(scores, best, rtol=0, atol=1e-5)  # float32 sums in another order
        np.testing.assert_allclose([score_of[row] for row in row_ids.tolist()], best, rtol=0, atol=1e-5)


def scored(index: Index, queries_Qd: np.ndarray, nprobe: int, refine_factor: int) -> list[set[tuple[str, int, float]]]:
    """Of each query all entries of the probed lists, with their scores; equal scores have no order."""
    found = index.search(queries_Qd, index.manifest.ntotal, nprobe=nprobe, refine_factor=refine_factor)
    answers = []
    for scores, entries in zip(found.scores_Qk, found.entries_Qk, strict=True):
        rows = index.rows_of(entries[entries >= 0])
        answers.append({(row["doc_id"], row["chunk_no"], float(s)) for row, s in zip(rows, scores, strict=False)})
    return answers

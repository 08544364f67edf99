"""`eval`: how well a published version ranks documents, on judged queries in BEIR columns.

Measured three ways on the same query vectors: through the index, by exact search over the stored vectors, and the one
against the other. k hits (chunks).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from operators.artifact.index import Index, Neighbours
from operators.artifact.manifest import Manifest
from operators.errors import ConfigError
from operators.storage.store import open_store
from pipelines.recall import intersection_recall
from pipelines.search import check_search_settings, encode_queries, read_columns, search_in_batches
from pipelines.telemetry.progress import RunProgress
from pipelines.versions import open_version

NDCG_DEPTH = 10
RECALL_DEPTH = 100
INDEX_RECALL_K = 10
MAX_FIRST_FACTOR = 8

Judgements = Mapping[str, float]  # doc_id -> score


def evaluate(
    root: str,
    queries_path: str,
    qrels_path: str,
    nprobe: int | None = None,
    refine_factor: int | None = None,
    model: str | None = None,
    limit: int | None = None,
    progress: RunProgress | None = None,
    version: str | None = None,
) -> dict[str, Any]:
    """nDCG@10 and recall@100 of documents, the same by exact search, and recall@10 of the index's chunks against exact.

    A document scores as its best chunk. Queries count when at least one of their judgements is above 0; `limit` takes
    the first of them. index_recall@10 is of a search for 10 chunks, as a user's is. Deterministic: ties go to the
    document that comes first in the corpus.
    Raises ConfigError for files or columns that are missing and for judgements of other queries; else as `search`.
    """
    started = time.monotonic()
    with progress or RunProgress(quiet=True) as shown:
        store = open_store(root)
        manifest = open_version(store, version)
        check_search_settings(manifest, INDEX_RECALL_K, nprobe, refine_factor)
        if not manifest.ntotal:
            raise ConfigError(f"a version must hold rows to be measured, every row of {manifest.version} is deleted")
        queries, qrels = read_judged(queries_path, qrels_path, limit)
        nprobe = manifest.quality["nprobe"] if nprobe is None else nprobe
        refine_factor = manifest.quality["refine_factor"] if refine_factor is None else refine_factor
        shown.stage("encode queries", total=1)
        vectors_Qd = encode_queries(manifest, list(queries.values()), model)
        index = Index(store, manifest)

        def through_index(queries_Qd: npt.NDArray[np.float32], k: int) -> Neighbours:
            return search_in_batches(index, queries_Qd, k, nprobe, refine_factor)

        shown.stage("search the index", total=1)
        top = through_index(vectors_Qd, INDEX_RECALL_K)
        ranked = rank_documents(index, vectors_Qd, through_index)
        shown.stage("search exactly", total=1)
        exact_top = index.exact_search(vectors_Qd, INDEX_RECALL_K)
        exact_ranked = rank_documents(index, vectors_Qd, index.exact_search)
    judgements = [qrels[query_id] for query_id in queries]
    return {
        "ndcg@10": _mean(ndcg, ranked, judgements, NDCG_DEPTH),
        "recall@100": _mean(recall, ranked, judgements, RECALL_DEPTH),
        "exact_ndcg@10": _mean(ndcg, exact_ranked, judgements, NDCG_DEPTH),
        "exact_recall@100": _mean(recall, exact_ranked, judgements, RECALL_DEPTH),
        "index_recall@10": intersection_recall(top.entries_Qk, exact_top.entries_Qk),
        "nprobe": nprobe,
        "refine_factor": refine_factor,
        "queries": len(queries),
        "version": manifest.version,
        "seconds": time.monotonic() - started,
    }


def _mean(
    metric: Callable[[Sequence[str], Judgements, int], float],
    rankings: Sequence[Sequence[str]],
    judgements: Sequence[Judgements],
    depth: int,
) -> float:
    return math.fsum(metric(r, j, depth) for r, j in zip(rankings, judgements, strict=True)) / len(rankings)


def ndcg(ranking: Sequence[str], judgements: Judgements, depth: int = NDCG_DEPTH) -> float:
    """nDCG at `depth` as trec_eval's ndcg_cut: gain score / log2(rank + 1), scores below 0 count as 0; 0 without any."""
    gains = [max(0.0, judgements.get(doc_id, 0.0)) for doc_id in ranking[:depth]]
    ideal = _dcg(sorted((max(0.0, score) for score in judgements.values()), reverse=True)[:depth])
    return _dcg(gains) / ideal if ideal else 0.0


def _dcg(gains: Sequence[float]) -> float:
    return math.fsum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, 1))


def recall(ranking: Sequence[str], judgements: Judgements, depth: int = RECALL_DEPTH) -> float:
    """Share of the documents judged above 0 that are among the first `depth`; 0 without any."""
    relevant = {doc_id for doc_id, score in judgements.items() if score > 0}
    return len(relevant.intersection(ranking[:depth])) / len(relevant) if relevant else 0.0


def documents_of_hits(
    scores_k: npt.NDArray[np.float32], row_ids_k: npt.NDArray[np.int64], doc_ids_k: Sequence[str]
) -> list[str]:
    """Documents by their best chunk, best first; ties go to the lower row id (the order of the corpus)."""
    order = np.lexsort((row_ids_k, -scores_k))
    return list(dict.fromkeys(doc_ids_k[number] for number in order.tolist()))


def first_k(manifest: Manifest, depth: int = RECALL_DEPTH) -> int:
    """Chunks to ask for so that most queries find `depth` documents: more where documents have more chunks."""
    factor = min(MAX_FIRST_FACTOR, math.ceil(manifest.ntotal / max(1, manifest.num_docs)) + 1)
    return min(depth * factor, manifest.ntotal)


def rank_documents(
    index: Index,
    queries_Qd: npt.NDArray[np.float32],
    find: Callable[[npt.NDArray[np.float32], int], Neighbours],
    depth: int = RECALL_DEPTH,
) -> list[list[str]]:
    """At least the `depth` best documents of each query, or all that `find` (queries, k) can reach.

    Queries whose k best chunks belong to fewer documents are asked again with twice the k.
    """
    rankings: list[list[str]] = [[] for _ in range(len(queries_Qd))]
    left = np.arange(len(queries_Qd))
    k = first_k(index.manifest, depth)
    while len(left):
        found = find(queries_Qd[left], k)
        there = found.entries_Qk >= 0
        names = np.full(there.shape, "", dtype=object)
        names[there] = index.doc_ids_of(found.entries_Qk[there])
        short = []
        for place, query in enumerate(left.tolist()):
            hits = there[place]
            rankings[query] = documents_of_hits(
                found.scores_Qk[place][hits], found.row_ids_Qk[place][hits], names[place][hits]
            )
            if len(rankings[query]) < depth and hits.sum() == k:  # fewer than k: the probed lists are exhausted
                short.append(query)
        if k >= index.manifest.ntotal:
            break
        left = np.array(short, dtype=np.int64)
        k = min(2 * k, index.manifest.ntotal)
    return rankings


def read_judged(
    queries_path: str, qrels_path: str, limit: int | None = None
) -> tuple[dict[str, str], dict[str, dict[str, float]]]:
    """Queries (id -> text) that have a judgement above 0, in the file's order, and all judgements of each.

    Raises ConfigError for missing files, columns, and values, for an id given twice, and when no query is judged.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, got {limit} (--limit)")
    columns = read_columns(queries_path, ("_id", "text"), (), "--queries")
    texts: dict[str, str] = {}
    for number, (query_id, text) in enumerate(zip(map(str, columns["_id"]), map(str, columns["text"]), strict=True), 1):
        if query_id in texts:
            raise ConfigError(
                f"_id must be unique in {queries_path!r}, got {query_id!r} again in row {number} (--queries)"
            )
        texts[query_id] = text
    qrels = _read_qrels(qrels_path)
    judged = {query_id: text for query_id, text in texts.items() if max(qrels.get(query_id, {"": 0.0}).values()) > 0}
    if not judged:
        raise ConfigError(
            f"no query of {queries_path!r} (_id such as {_examples(texts)}) has a judgement above 0 in {qrels_path!r}"
            f" (query_id such as {_examples(qrels)}); give the judgements of these queries (--qrels)"
        )
    for query_id, text in judged.items():
        if not text.strip():
            raise ConfigError(
                f"a query must have text, got {text!r} for _id {query_id!r} in {queries_path!r} (--queries)"
            )
    return dict(list(judged.items())[:limit]), qrels


def _read_qrels(path: str) -> dict[str, dict[str, float]]:
    columns = read_columns(path, ("query_id", "doc_id", "score"), (), "--qrels")
    qrels: dict[str, dict[str, float]] = {}
    rows = zip(columns["query_id"], columns["doc_id"], columns["score"], strict=True)
    for number, (query_id, doc_id, score) in enumerate(rows, 1):
        try:
            value = float(score)
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise ConfigError(f"score must be a number in {path!r}, got {score!r} in row {number} (--qrels)")
        judgements = qrels.setdefault(str(query_id), {})
        if judgements.setdefault(str(doc_id), value) != value:
            raise ConfigError(
                f"{path!r} judges document {doc_id!r} twice for query {query_id!r}, with scores {judgements[str(doc_id)]:g}"
                f" and {value:g} (row {number}, --qrels); leave one of them out"
            )
    return qrels


def _examples(ids: Mapping[str, Any]) -> str:
    return ", ".join(repr(query_id) for query_id in list(ids)[:3]) or "none"

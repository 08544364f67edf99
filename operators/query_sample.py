"""Queries drawn from the corpus: they measure the index's recall and set its nprobe.

Each piece contributes a few excerpts of its chunks, about as long as questions, drawn where it is chunked and encoded by the
same actors as the corpus, while the model is loaded. From all of them the ones of lowest hash are kept, so the sample is the same on any cluster.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from operators import schemas
from operators.artifact.list_run import splitmix64
from operators.piece_store import doc_hashes, read_table
from operators.storage.commits import CommitRecord
from operators.storage.store import Store

QUERIES_PER_PIECE = 32  # 450 tokens: about 1% of a piece of short texts
QUERY_WORDS = 12
_SALT = np.uint64(0x51A7E5)


def draw_queries(chunks: pa.Table) -> pa.Table:
    """schemas.DRAWN_QUERIES: excerpts of the (at most) QUERIES_PER_PIECE chunks of lowest hash of (doc_id, chunk_no)."""
    chunk_no = chunks.column("chunk_no").to_numpy().astype(np.uint64)
    hashes = doc_hashes(chunks.column("doc_id").to_pylist())
    order = splitmix64(splitmix64(hashes ^ splitmix64(chunk_no)) ^ _SALT)
    lowest = np.argsort(order, kind="stable")[:QUERIES_PER_PIECE]
    texts = chunks.column("text").take(pa.array(lowest)).to_pylist()
    excerpts = [excerpt(text, int(seed)) for text, seed in zip(texts, order[lowest].tolist(), strict=True)]
    kept = [i for i, text in enumerate(excerpts) if text]
    columns = [pa.array(order[lowest][kept], pa.uint64()), pa.array([excerpts[i] for i in kept], pa.large_string())]
    return pa.table(columns, schema=schemas.DRAWN_QUERIES)


def excerpt(text: str, seed: int) -> str:
    """About as long as a question: QUERY_WORDS words of `text` from a place that `seed` decides."""
    words = text.split()
    if len(words) <= QUERY_WORDS:
        return " ".join(words)
    start = seed % (len(words) - QUERY_WORDS + 1)
    return " ".join(words[start : start + QUERY_WORDS])


def query_table(order: np.ndarray, texts: list[str], vectors_Qd: np.ndarray) -> pa.Table:
    """schemas.QUERIES from hashes uint64 [Q], texts and vectors float32 [Q, d]."""
    vectors = pa.array(list(vectors_Qd.astype(np.float32)), pa.list_(pa.float32()))
    columns = [pa.array(order, pa.uint64()), pa.array(texts, pa.large_string()), vectors]
    return pa.table(columns, schema=schemas.QUERIES)


def lowest_queries(store: Store, records: Sequence[CommitRecord], count: int) -> pa.Table:
    """The `count` queries of lowest hash (schemas.QUERIES) that the records (pieces, or samples of groups) hold."""
    kept = schemas.QUERIES.empty_table()
    for record in records:
        if "queries" in record.objects:
            kept = pa.concat_tables([kept, read_table(store, record.objects["queries"])])
            if kept.num_rows > 4 * count:
                kept = _lowest(kept, count)
    return _lowest(kept, count)


def _lowest(queries: pa.Table, count: int) -> pa.Table:
    order = np.lexsort((np.array(queries.column("text").to_pylist(), object), queries.column("order").to_numpy()))
    return queries.take(pa.array(order[:count])).combine_chunks()

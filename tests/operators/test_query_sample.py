"""The query sample: drawn by hash, the same however pieces are grouped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from operators.piece_store import write_table
from operators.query_sample import QUERIES_PER_PIECE, draw_queries, lowest_queries, query_table
from operators.storage.commits import CommitRecord
from operators.storage.store import open_store


def chunks(count: int, text: str = "some words of document number {}") -> pa.Table:
    columns = {"doc_id": [f"doc-{i}" for i in range(count)], "text": [text.format(i) for i in range(count)]}
    return pa.table({**columns, "chunk_no": pa.array([0] * count, pa.int32())})


def test_a_piece_gives_its_chunks_of_lowest_hash_whatever_their_order() -> None:
    table = chunks(200)
    drawn = draw_queries(table)
    order = drawn.column("order").to_numpy()
    assert drawn.num_rows == QUERIES_PER_PIECE
    assert (order[1:] > order[:-1]).all()
    assert draw_queries(table.take(pa.array(np.random.default_rng(0).permutation(200)))).equals(drawn)


def test_blank_chunks_and_empty_pieces_give_no_query() -> None:
    assert draw_queries(chunks(3, text=" \n ")).num_rows == 0
    assert draw_queries(chunks(0)).num_rows == 0


def test_the_sample_does_not_depend_on_how_it_was_grouped(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    rng = np.random.default_rng(1)
    tables = [
        query_table(
            rng.integers(0, 2**63, 32).astype(np.uint64), [f"{n}-{i}" for i in range(32)], rng.normal(size=(32, 4))
        )
        for n in range(20)
    ]

    def record(name: str, table: pa.Table) -> CommitRecord:
        return CommitRecord(name, "inputs", name, {"queries": write_table(store, f"{name}.parquet", table)})

    pieces = [record(f"piece-{n}", table) for n, table in enumerate(tables)] + [CommitRecord("piece empty", "i", "a")]
    whole = lowest_queries(store, pieces, 50)
    groups = [record(f"group-{n}", lowest_queries(store, pieces[n::3], 50)) for n in range(3)]
    assert lowest_queries(store, groups[::-1], 50).equals(whole)
    expected = np.sort(np.concatenate([table.column("order").to_numpy() for table in tables]))[:50]
    assert np.array_equal(whole.column("order").to_numpy(), expected)

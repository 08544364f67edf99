"""What an index must hold, in plain Python: a corpus of small objects, the rule of who wins, and exhaustive search.

Nothing here is shared with the code under test but the chunker and the encoder, which have tests of their own.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from operators import schemas
from operators.artifact.index import Index
from operators.chunker import ChunkConfig, Chunker
from operators.cleaner import text_hashes
from operators.encoding.encode_config import EncodeConfig, configured_model
from operators.encoding.text_encoder import TextEncoder

NO_TOKENS = "\x01\u200b\x02"  # characters that the tokenizer drops
BAD = None  # in place of a text: a row that is rejected when it is read
# Stored vectors are float16: a rounding that falls the other way moves one of the 32 components of a unit vector by at most
# 2^-11, and a score by at most sqrt(32) * 2^-11.
SCORE_TOLERANCE = 3e-3

Doc = tuple[str, str | None]  # id and text


@dataclass(frozen=True)
class Placed:
    """A source object in a state of the corpus: its documents, and by which time stamp it is known."""

    name: str
    stamp: int
    docs: tuple[Doc, ...]


@dataclass(frozen=True)
class State:
    """What a version was made of: objects in corpus order, what was deleted by request, and what has rows.

    deleted: (object, id, text). encoded: places (object, number of the document) whose rows the version knows.
    """

    objects: tuple[Placed, ...]
    deleted: frozenset[tuple[str, str, str]] = frozenset()
    encoded: frozenset[tuple[str, int]] = frozenset()


@dataclass
class Outcome:
    """Who wins, and what becomes of all other rows."""

    winners: dict[str, str] = field(default_factory=dict)  # id -> text
    places: dict[str, tuple[str, int]] = field(default_factory=dict)  # id -> object and number of the document
    left_out: Counter[str] = field(default_factory=Counter)  # by reason
    num_rows: int = 0


def outcome_of(state: State, duplicates: str) -> Outcome:
    """The rule: the first with an id wins, and with `drop` the first with a text among those."""
    found = Outcome()
    ids: set[str] = set()
    texts: set[str] = set()
    for placed in state.objects:
        for number, (doc_id, text) in enumerate(placed.docs):
            found.num_rows += 1
            if text is None:
                found.left_out["bad"] += 1
            elif text == NO_TOKENS:
                found.left_out["no_tokens"] += 1
            elif (placed.name, doc_id, text) in state.deleted:
                found.left_out["deleted_by_request"] += 1
            elif doc_id in ids:
                found.left_out["duplicate_id"] += 1
            else:
                ids.add(doc_id)
                if duplicates == "drop" and text in texts:
                    found.left_out["duplicate_text"] += 1
                    continue
                texts.add(text)
                found.winners[doc_id] = text
                found.places[doc_id] = (placed.name, number)
    return found


@dataclass
class Step:
    """What an update to a new listing leads to."""

    state: State
    num_to_encode: int
    newly_deleted: set[tuple[str, str, str]]  # by this request


def next_state(before: State, objects: Sequence[Placed], deletes: Sequence[str], duplicates: str) -> Step:
    """The state after an update to `objects` that is asked to delete the ids `deletes`.

    What was deleted stays so as long as its object holds it; when that is gone, wherever it is read.
    """
    there = {(o.name, doc_id, text) for o in objects for doc_id, text in o.docs if text not in (None, NO_TOKENS)}
    unread = {o.name for o in objects if o in before.objects}
    gone = {(doc_id, text) for name, doc_id, text in before.deleted if name not in {o.name for o in objects}}
    moved = {place for place in there if place[1:] in gone and place[0] not in unread}
    deleted = (before.deleted & there) | moved
    asked = {place for place in there if place[1] in deletes}
    state = State(tuple(objects), frozenset(deleted | asked))
    known = {(o.name, o.stamp): o for o in before.objects}
    kept = {(o.name, n) for o in objects if (o.name, o.stamp) in known for n in range(len(o.docs))} & before.encoded
    had_rows = {o.docs[n] for o in before.objects for n in range(len(o.docs)) if (o.name, n) in before.encoded}
    found = outcome_of(state, duplicates)
    places = set(found.places.values())
    docs = {(o.name, n): doc for o in objects for n, doc in enumerate(o.docs)}
    to_encode = [place for place in places if place not in kept and docs[place] not in had_rows]
    return Step(State(state.objects, state.deleted, frozenset(kept | places)), len(to_encode), asked - deleted)


def write_object(folder: Path, name: str, docs: Sequence[Doc], stamp: int) -> None:
    """The object as a file of the kind that its name ends in; its time of change is `stamp` seconds."""
    path = folder / name
    if name.endswith(".parquet"):
        table = pa.table({"id": [d for d, _ in docs], "text": pa.array([t for _, t in docs], pa.string())})
        pq.write_table(table, path, row_group_size=3)
    elif name.endswith(".csv.gz"):
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["id", "text"])
        writer.writerows([d, t or ""] for d, t in docs)
        path.write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))
    else:
        lines = [json.dumps({"id": d, "text": t}) if t is not None else "no JSON" for d, t in docs]
        path.write_text("".join(line + "\n" for line in lines))
    os.utime(path, (stamp, stamp))


class Exhaustive:
    """All chunks of a set of documents, scored one by one with the model's own encoder."""

    def __init__(self, model: Path, queries: Sequence[str], overlap_tokens: int, **settings: Any) -> None:
        config = EncodeConfig(model=str(model), **settings)
        spec = configured_model(config)
        self._chunker = Chunker(ChunkConfig(overlap_tokens=overlap_tokens), spec)
        self._encoder = TextEncoder(config, spec)
        self._chunks: dict[str, list[tuple[str, npt.NDArray[np.float32]]]] = {}
        self.queries_Qd = self._encoder.encode_queries(list(queries))

    def chunks_of(self, text: str) -> list[tuple[str, npt.NDArray[np.float32]]]:
        """Text and stored vector of each chunk."""
        if text not in self._chunks:
            hashed = text_hashes(pa.array([text], pa.large_string()))
            row = [pa.array(["x"]), pa.array([text], pa.large_string()), pa.array(["x"]), pa.array([0]), hashed]
            table, _, _ = self._chunker(pa.table(row, schema=schemas.CLEANED))
            texts = table.column("text").to_pylist()
            vectors = self._encoder.encode_texts(texts).astype(np.float16).astype(np.float32)
            self._chunks[text] = list(zip(texts, vectors, strict=True))
        return self._chunks[text]

    def check(self, index: Index, winners: dict[str, str]) -> None:
        """AssertionError unless the index holds just these documents and ranks their chunks as exhaustive search does."""
        expected = {
            (doc_id, number): chunk
            for doc_id, text in winners.items()
            for number, chunk in enumerate(self.chunks_of(text))
        }
        manifest = index.manifest
        assert (manifest.num_docs, manifest.ntotal) == (len(winners), len(expected))
        found = index.search(self.queries_Qd, manifest.ntotal, nprobe=manifest.nlist, refine_factor=1)
        for query_d, scores, entries in zip(self.queries_Qd, found.scores_Qk, found.entries_Qk, strict=True):
            rows = index.rows_of(entries)
            keys = [(row["doc_id"], row["chunk_no"]) for row in rows]
            assert sorted(keys) == sorted(expected)
            assert [row["text"] for row in rows] == [expected[key][0] for key in keys]
            exact = np.array([expected[key][1] @ query_d for key in keys])
            np.testing.assert_allclose(scores, exact, rtol=0, atol=SCORE_TOLERANCE)
            # The same order as of the exact scores, but for those that are nearer than rounding tells apart.
            assert (np.diff(scores) <= 0).all()

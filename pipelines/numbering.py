"""Row ids of a build: one task where the hashes of all documents fit in one, else two rounds of tasks.

The first round reads every piece once and writes its documents' hashes by pass; in the second each task finds what is
repeated in one pass. Texts are compared when it is known which ids are: that is a third round, over what the first wrote.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from operators.hash_runs import HashRun, read_pass, write_hash_run
from operators.row_ids import (
    WORDS,
    Repeated,
    RowIds,
    assign_row_ids,
    numbered,
    read_hashes,
    repeated_ids,
    repeated_texts,
)
from operators.storage.checked import ObjectEntry
from operators.storage.commits import CommitRecord, new_attempt
from operators.storage.packed_entries import PackedEntries
from operators.storage.store import open_store
from pipelines.run_context import RunContext

# Words of 8 bytes that a task compares at once, one for an id, two for a text. They take some 50 bytes each, together no more than
# a shard of the default size: there may be one such task on every CPU slot.
HASHES_PER_PASS = 10_000_000
DOCUMENTS_PER_RUN = 1_000_000


def number_rows(
    context: RunContext,
    pieces: Sequence[CommitRecord],
    *,
    hashes_per_pass: int = HASHES_PER_PASS,
    documents_per_run: int = DOCUMENTS_PER_RUN,
) -> RowIds:
    """Row ids and duplicates of the whole corpus (operators/row_ids.py). The same however many tasks it takes."""
    store, tasks = context.store, context.tasks
    drop_equal_texts = context.config.clean.duplicates == "drop"
    columns = ["doc_hash", "text_hash"] if drop_equal_texts else ["doc_hash"]
    num_docs = sum(record.facts["num_docs"] for record in pieces)
    passes = [-(-WORDS[name] * num_docs // hashes_per_pass) for name in columns]
    if max(passes) <= 1:
        context.progress.stage("number rows", total=1)
        row_ids: RowIds = tasks(number_in_one_task, [(store.url, pieces, drop_equal_texts)])[0]
        return row_ids
    groups = consecutive(pieces, documents_per_run)
    context.progress.stage("number rows", total=len(groups) + sum(passes))
    prefix = f"{context.run.prefix}/hashes-{new_attempt()}"
    encoded = [record.objects["encoded"] for record in pieces]
    calls = [(f"{prefix}/{group[0]:08d}", [encoded[i] for i in group], group[0]) for group in groups]
    runs: list[list[HashRun]] = tasks(write_hashes, calls, shared=(store.url, columns, passes))
    of_ids = [one[0] for one in runs]
    shared = (store.url, PackedEntries(encoded), of_ids)
    by_id: list[Repeated] = tasks(find_repeated_ids, [(number,) for number in range(passes[0])], shared=shared)
    by_text: list[Repeated] = []
    if drop_equal_texts:
        left_out = np.sort(np.concatenate([one.place_F for one in by_id]))
        calls_of_texts = [(number,) for number in range(passes[1])]
        by_text = tasks(find_repeated_texts, calls_of_texts, shared=(store.url, [one[1] for one in runs], left_out))
    store.delete_tree(prefix)
    return numbered(pieces, by_id, by_text)


def consecutive(pieces: Sequence[CommitRecord], most_docs: int) -> list[list[int]]:
    """Numbers of consecutive pieces of together at most so many documents (or one larger piece)."""
    groups: list[list[int]] = []
    held = 0
    for number, record in enumerate(pieces):
        if not groups or held + record.facts["num_docs"] > most_docs:
            groups.append([])
            held = 0
        groups[-1].append(number)
        held += record.facts["num_docs"]
    return groups


def number_in_one_task(store_url: str, pieces: Sequence[CommitRecord], drop_equal_texts: bool) -> RowIds:
    """Row ids and duplicates of the whole corpus."""
    return assign_row_ids(open_store(store_url), pieces, drop_equal_texts=drop_equal_texts)


def write_hashes(
    store_url: str,
    columns: Sequence[str],
    passes: Sequence[int],
    key_prefix: str,
    encoded: Sequence[ObjectEntry],
    first_piece: int,
) -> list[HashRun]:
    """Write the hashes of a group of pieces, a run for each column."""
    store = open_store(store_url)
    found = read_hashes(store, encoded, columns, first_piece)
    return [
        write_hash_run(store, f"{key_prefix}-{new_attempt()}.{name}", hashes, count)
        for name, hashes, count in zip(columns, found, passes, strict=True)
    ]


def find_repeated_ids(store_url: str, encoded: PackedEntries, runs: Sequence[HashRun], number: int) -> Repeated:
    """What is repeated in one pass over ids. encoded: of all pieces, to compare ids whose hashes are equal."""
    store = open_store(store_url)
    return repeated_ids(store, encoded, read_pass(store, runs, number))


def find_repeated_texts(
    store_url: str, runs: Sequence[HashRun], left_out_F: npt.NDArray[np.int64], number: int
) -> Repeated:
    """What is repeated in one pass over texts, without the documents at the places left out, ascending."""
    return repeated_texts(read_pass(open_store(store_url), runs, number), left_out_F)

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators import schemas
from operators.artifact.list_run import (
    ROW_GROUP_ROWS,
    FinishedRun,
    RunReader,
    RunSlice,
    concat_sorted,
    row_id_checksum,
    splitmix64,
    write_run,
)
from operators.errors import IntegrityError
from operators.storage.checked import verify_object
from operators.storage.store import Store, open_store
from tests.artifact_maker import flip_bit, truncate

D, CODE_SIZE, FIRST_LIST = 12, 3, 5
ROLES = ["lists", "vectors", "rows"]


def entries_of(sizes: list[int], seed: int = 0) -> RunSlice:
    """Random entries of lists FIRST_LIST..., ids in random order over the lists but rising in each."""
    rng = np.random.default_rng(seed)
    n = sum(sizes)
    list_no = np.repeat(np.arange(FIRST_LIST, FIRST_LIST + len(sizes), dtype=np.int32), sizes)
    row_ids = rng.permutation(10 * n)[:n].astype(np.int64)
    row_ids = row_ids[np.lexsort((row_ids, list_no))]
    texts = ["text " * int(rng.integers(0, 40)) + str(i) for i in range(n)]
    columns = {
        "row_id": row_ids,
        "list_no": list_no,
        "doc_id": [f"d{i}" for i in row_ids.tolist()],
        "chunk_no": [0] * n,
        "start": [0] * n,
        "end": [len(text) for text in texts],
        "text": texts,
        "source": [f"s{i % 3}" for i in range(n)],
        "row": list(range(n)),
        "text_hash": [bytes(16)] * n,
    }
    rows = pa.table(
        [pa.array(columns[f.name], f.type) for f in schemas.ROW_STORE], schema=schemas.ROW_STORE
    )  # fmt: skip
    codes = rng.integers(0, 256, (n, CODE_SIZE)).astype(np.uint8)
    return RunSlice(list_no, row_ids, codes, rng.standard_normal((n, D)).astype(np.float16), rows)


def part_of(entries: RunSlice, lo: int, hi: int) -> RunSlice:
    return RunSlice(
        entries.list_no[lo:hi],
        entries.row_ids[lo:hi],
        entries.codes[lo:hi],
        entries.vectors[lo:hi],
        entries.rows.slice(lo, hi - lo),
    )


def write(store: Store, sizes: list[int], entries: RunSlice, cuts: list[int], key: str = "x/run") -> FinishedRun:
    """Write lists [FIRST_LIST, ...) in the pieces that end before the list numbers `cuts` (relative)."""
    starts = np.concatenate([[0], np.cumsum(sizes)])
    with write_run(
        store, key, list_sizes_L=np.array(sizes), first_list=FIRST_LIST, code_size=CODE_SIZE, d=D
    ) as (writer, finished):  # fmt: skip
        position = 0
        for cut in [*cuts, len(sizes)]:
            writer.append(part_of(entries, starts[position], starts[cut]), FIRST_LIST + cut)
            position = cut
    return finished


def reader_of(store: Store, run: FinishedRun) -> RunReader:
    return RunReader(store, "the run", run.objects, run.facts)


def assert_same(found: RunSlice, expected: RunSlice) -> None:
    assert np.array_equal(found.list_no, expected.list_no)
    assert np.array_equal(found.row_ids, expected.row_ids)
    assert np.array_equal(found.codes, expected.codes)
    assert np.array_equal(found.vectors.view(np.uint16), expected.vectors.view(np.uint16))
    assert found.rows.equals(expected.rows)


sizes_of_lists = st.lists(st.sampled_from([0, 0, 1, 2, 7, 90, 600]), min_size=1, max_size=12)


@settings(max_examples=30)
@given(sizes=sizes_of_lists, data=st.data())
def test_what_is_written_is_read_and_its_bytes_do_not_depend_on_the_cut(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], data: st.DataObject
) -> None:
    store = open_store(str(tmp_path_factory.mktemp("run")))
    entries = entries_of(sizes)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sizes)), max_size=5)))
    whole, cut = write(store, sizes, entries, []), write(store, sizes, entries, cuts, "x/cut")
    assert {r: e.sha256 for r, e in whole.objects.items()} == {r: e.sha256 for r, e in cut.objects.items()}
    assert whole.facts == cut.facts
    reader = reader_of(store, cut)
    assert reader.list_sizes_L.tolist() == sizes
    assert_same(reader.read_lists(FIRST_LIST, FIRST_LIST + len(sizes)), entries)
    first, end = sorted(data.draw(st.tuples(st.integers(0, len(sizes)), st.integers(0, len(sizes)))))
    starts = np.concatenate([[0], np.cumsum(sizes)])
    expected = part_of(entries, starts[first], starts[end])
    assert_same(reader.read_lists(FIRST_LIST + first, FIRST_LIST + end), expected)


def test_row_groups_hold_512_rows_but_the_last(tmp_path: Path) -> None:
    store, sizes = open_store(str(tmp_path)), [300, 0, 700, 1, 299]
    run = write(store, sizes, entries_of(sizes), [1, 3])
    metadata = pq.ParquetFile(store.local_path(run.objects["rows"].key)).metadata
    assert ROW_GROUP_ROWS == 512
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [512, 512, 276]
    assert reader_of(store, run).row_group_starts.tolist() == [0, 512, 1024, 1300]


def test_vectors_are_an_ordinary_npy_and_gathered_in_any_order(tmp_path: Path) -> None:
    store, sizes = open_store(str(tmp_path)), [40, 2]
    entries = entries_of(sizes)
    run = write(store, sizes, entries, [])
    assert np.array_equal(np.load(str(store.local_path(run.objects["vectors"].key)), mmap_mode="r"), entries.vectors)
    places = np.array([41, 0, 7, 7, 40])
    assert np.array_equal(reader_of(store, run).gather_vectors(places), entries.vectors[places])


def test_a_run_without_entries_reads_as_empty_lists(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    reader = reader_of(store, write(store, [0, 0], entries_of([0, 0]), [1]))
    found = reader.read_lists(FIRST_LIST, FIRST_LIST + 2)
    assert len(found.row_ids) == 0
    assert found.vectors.shape == (0, D)
    assert found.rows.schema == schemas.ROW_STORE


@pytest.mark.parametrize("role", ROLES)
def test_a_flipped_bit_anywhere_is_found_on_read_and_by_verify(tmp_path: Path, role: str) -> None:
    store, sizes = open_store(str(tmp_path)), [700, 1, 0, 900, 1500, 1100]
    run = write(store, sizes, entries_of(sizes), [])
    entry = run.objects[role]
    rng = np.random.default_rng(7)
    ends = [0, 4, 9, 25, 60, 130, entry.size_bytes - 1, entry.size_bytes - 5, entry.size_bytes - 9]
    for position in [*ends, *rng.integers(0, entry.size_bytes, 32).tolist()]:
        bit = int(rng.integers(0, 8))
        flip_bit(store, entry.key, position, bit)
        with pytest.raises(IntegrityError, match=entry.key):
            reader_of(store, run).read_lists(FIRST_LIST, FIRST_LIST + len(sizes))
        with pytest.raises(IntegrityError, match=entry.key):
            verify_object(store, entry)
        flip_bit(store, entry.key, position, bit)
    reader_of(store, run).read_lists(FIRST_LIST, FIRST_LIST + len(sizes))
    verify_object(store, entry)


@pytest.mark.parametrize("role", ROLES)
def test_a_truncated_or_missing_object_is_named(tmp_path: Path, role: str) -> None:
    store, sizes = open_store(str(tmp_path)), [30, 5]
    run = write(store, sizes, entries_of(sizes), [])
    key = run.objects[role].key
    truncate(store, key, run.objects[role].size_bytes - 1)
    with pytest.raises(IntegrityError, match=rf"{key} must hold \d+ bytes, found \d+"):
        reader_of(store, run)
    store.delete(key)
    with pytest.raises(IntegrityError, match=f"{key} is missing"):
        reader_of(store, run)


def test_rows_of_another_run_are_refused(tmp_path: Path) -> None:
    store, sizes = open_store(str(tmp_path)), [30, 5]
    run, other = write(store, sizes, entries_of(sizes), []), write(store, sizes, entries_of(sizes, 1), [], "x/other")
    run.objects["rows"] = other.objects["rows"]
    with pytest.raises(IntegrityError, match=r"the run: row ids of lists 5\.\.6 differ"):
        reader_of(store, run).read_lists(FIRST_LIST, FIRST_LIST + 2)


@pytest.mark.parametrize(
    ("fact", "value", "message"),
    [("code_size", 4, "lists object has header"), ("num_lists", 3, "header"), ("num_entries", 34, "add up to 35")],
)
def test_facts_that_do_not_fit_the_objects_are_refused(tmp_path: Path, fact: str, value: int, message: str) -> None:
    store, sizes = open_store(str(tmp_path)), [30, 5]
    run = write(store, sizes, entries_of(sizes), [])
    run.facts[fact] = value
    with pytest.raises(IntegrityError, match=message):
        reader_of(store, run)


def _too_few(entries: RunSlice) -> RunSlice:
    return part_of(entries, 0, len(entries.row_ids) - 1)


def _of_a_list_beyond(entries: RunSlice) -> RunSlice:
    entries.list_no[-1] = FIRST_LIST + 2
    return entries


def _of_a_list_before(entries: RunSlice) -> RunSlice:
    entries.list_no[0] = FIRST_LIST - 1
    return entries


def _in_another_order(entries: RunSlice) -> RunSlice:
    entries.list_no = entries.list_no[::-1].copy()
    return entries


def _fewer_codes(entries: RunSlice) -> RunSlice:
    entries.codes = entries.codes[1:]
    return entries


def _fewer_rows(entries: RunSlice) -> RunSlice:
    entries.rows = entries.rows.slice(1)
    return entries


@pytest.mark.parametrize(
    "spoil", [_too_few, _of_a_list_beyond, _of_a_list_before, _in_another_order, _fewer_codes, _fewer_rows]
)
def test_entries_that_do_not_fit_their_lists_are_refused_and_leave_nothing(
    tmp_path: Path, spoil: Callable[[RunSlice], RunSlice]
) -> None:
    store, sizes = open_store(str(tmp_path)), [600, 600]
    with pytest.raises(IntegrityError, match=r"lists 5\.\.6"):
        write(store, sizes, spoil(entries_of(sizes)), [])
    assert store.list_keys("x") == []
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_lists_that_were_announced_must_come(tmp_path: Path) -> None:
    store, sizes = open_store(str(tmp_path)), [600, 7]
    entries = entries_of(sizes)
    with (
        pytest.raises(IntegrityError, match="announced 607 entries and got 600"),
        write_run(
            store, "x/run", list_sizes_L=np.array(sizes), first_list=FIRST_LIST, code_size=CODE_SIZE, d=D
        ) as (writer, finished),
    ):  # fmt: skip
        writer.append(part_of(entries, 0, 600), FIRST_LIST + 1)
    assert finished.objects == {}
    assert store.list_keys("x") == []


def test_slices_are_joined_in_list_and_row_order() -> None:
    entries = entries_of([5, 0, 9, 3])
    order = np.random.default_rng(3).permutation(17)
    halves = []
    for part in (np.sort(order[:8]), np.sort(order[8:])):
        halves.append(
            RunSlice(
                entries.list_no[part],
                entries.row_ids[part],
                entries.codes[part],
                entries.vectors[part],
                entries.rows.take(pa.array(part)),
            )
        )
    assert_same(concat_sorted(halves), entries)


@given(ids=st.lists(st.integers(0, 2**40), unique=True, max_size=40), cut=st.integers(0, 40))
def test_checksums_of_row_ids_add_up_and_tell_sets_apart(ids: list[int], cut: int) -> None:
    rows = np.array(ids, np.int64)
    assert row_id_checksum(rows[::-1]) == row_id_checksum(rows)
    assert (row_id_checksum(rows[:cut]) + row_id_checksum(rows[cut:])) % 2**64 == row_id_checksum(rows)
    if ids:
        assert row_id_checksum(np.append(rows[1:], rows[0] + 1)) != row_id_checksum(rows)


def test_splitmix64_gives_the_published_sequence() -> None:
    # First outputs of the reference implementation (Vigna, splitmix64.c) with state 1234567: its state grows by the
    # increment before each output, our argument is the state.
    increment = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + i * increment) % 2**64 for i in range(3)], np.uint64)
    assert splitmix64(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]

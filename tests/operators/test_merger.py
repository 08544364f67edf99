from __future__ import annotations

import dataclasses
import itertools
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from operators import schemas
from operators.artifact.deletions import write_deleted
from operators.artifact.index import Index
from operators.artifact.list_run import RunReader, RunSlice, write_run
from operators.artifact.manifest import PartRef, Segment, part_ref
from operators.artifact.quantizer import Quantizer
from operators.errors import IntegrityError
from operators.merger import list_bytes, merge_range, open_runs, split_lists
from operators.renumbering import Renumbering
from operators.row_ids import RowIds, assign_row_ids
from operators.storage.commits import CommitRecord, check_inputs, read_record
from operators.storage.store import Store, open_store
from tests.artifact_maker import (
    commit_corpus,
    faiss_index,
    flip_bit,
    make_corpus,
    make_quantizer,
    make_shards,
    make_version,
    merge_parts,
    truncate,
)

ROLES = ["lists", "vectors", "rows"]


@pytest.mark.parametrize(("metric", "nbits", "M"), [("ip", 8, 8), ("ip", 4, 16), ("l2", 8, 8), ("l2", 4, 15)])
def test_merged_shards_search_like_one_index(tmp_path: Path, metric: str, nbits: int, M: int) -> None:
    d = 2 * M
    made = make_version(tmp_path, metric=metric, nbits=nbits, d=d, M=M, num_shards=4, num_pieces=7)
    assert len(made.manifest.segments[0].parts) > 2
    one = faiss_index(made.quantizer, made.corpus.vectors_Nd)
    index = Index.open(made.store)
    for nprobe in (1, 5, made.quantizer.nlist):
        one.nprobe = nprobe
        distances, ids = one.search(made.corpus.queries_Qd, 20)
        found = index.search(made.corpus.queries_Qd, 20, nprobe=nprobe, refine_factor=0)
        assert np.array_equal(found.row_ids_Qk, ids)
        present = ids >= 0
        assert np.array_equal(found.scores_Qk[present], (distances if metric == "ip" else -distances)[present])


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, list[CommitRecord], RowIds, Quantizer]:
    store = open_store(str(tmp_path_factory.mktemp("merge")))
    corpus = make_corpus(500)
    records = commit_corpus(store, corpus, 7)
    return store, records, assign_row_ids(store, records), make_quantizer(corpus.vectors_Nd, 16, 8, 4, "ip")


def contents(refs: list[PartRef]) -> list[Any]:
    return [(ref.first_list, ref.num_lists, ref.num_entries, ref.content) for ref in refs]


def waves(store: Store, runs: list[CommitRecord], quantizer: Quantizer, fan_in: int, name: str) -> list[CommitRecord]:
    """One wave of intermediate runs."""
    return [
        merge_range(
            store,
            f"runs/{name}/wave1-{i:05d}",
            runs[i : i + fan_in],
            (0, quantizer.nlist),
            quantizer_digest=quantizer.digest,
            buffer_bytes=7_000,
            inputs="w",
        )
        for i in range(0, len(runs), fan_in)
    ]


def test_the_bytes_of_parts_do_not_depend_on_shards_buffers_or_waves(
    pieces: tuple[Store, list[CommitRecord], RowIds, Quantizer],
) -> None:
    store, records, rows, quantizer = pieces
    one_shard = make_shards(store, records, rows, quantizer, 1)
    seven = make_shards(store, records, rows, quantizer, 7)
    expected = contents(merge_parts(store, one_shard, quantizer, segment="segments/a", buffer_bytes=10**9))
    assert len(expected) >= 4
    for number, buffer_bytes in enumerate((1, 5_000, 10**9)):
        found = merge_parts(store, seven, quantizer, segment=f"segments/b{number}", buffer_bytes=buffer_bytes)
        assert contents(found) == expected
    two_waves = waves(store, waves(store, seven, quantizer, 2, "w1"), quantizer, 3, "w2")
    assert len(two_waves) == 2
    assert contents(merge_parts(store, two_waves, quantizer, segment="segments/c")) == expected


def test_lists_that_no_shard_fills_are_merged_as_empty(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    corpus = make_corpus(6)
    records = commit_corpus(store, corpus, 3)
    rows = assign_row_ids(store, records)
    quantizer = make_quantizer(make_corpus(300, seed=4).vectors_Nd, 64, 4, 4, "l2")
    shards = make_shards(store, records, rows, quantizer, 3)
    refs = merge_parts(store, shards, quantizer, part_rows=5)
    assert sum(ref.num_lists for ref in refs) == 64
    assert sum(ref.num_entries for ref in refs) == 12


def committed_run(store: Store, name: str, num_lists: int, list_size: int, d: int) -> CommitRecord:
    """A run with `list_size` entries in each list."""
    rng = np.random.default_rng(len(name))
    n = num_lists * list_size
    list_no = np.repeat(np.arange(num_lists, dtype=np.int32), list_size)
    row_ids = np.arange(n, dtype=np.int64) + (n if name.endswith("1") else 0)
    texts = [f"{i} some words that a document may well consist of" for i in range(n)]
    columns = [row_ids, list_no, texts, [0] * n, [0] * n, [len(t) for t in texts], texts, ["a.csv"] * n, row_ids]
    columns.append([bytes(16)] * n)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schemas.ROW_STORE, strict=True)]
    vectors = rng.standard_normal((n, d)).astype(np.float16)
    codes = rng.integers(0, 256, (n, 32)).astype(np.uint8)
    with write_run(store, name, list_sizes_L=np.full(num_lists, list_size), first_list=0, code_size=32, d=d) as (
        writer,
        finished,
    ):
        writer.append(RunSlice(list_no, row_ids, codes, vectors, pa.table(arrays, schema=schemas.ROW_STORE)), num_lists)
    return CommitRecord(f"shard {name}", "i", "a", finished.objects, {**finished.facts, "quantizer": "q"})


def peak_bytes(
    store: Store, runs: list[CommitRecord], key: str, buffer_bytes: int, renumbering: Renumbering | None = None
) -> int:
    """Peak of what NumPy, Python and Arrow hold while all lists are merged into one part."""
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        lists = (0, runs[0].facts["num_lists"])
        bounds: dict[str, Any] = {"buffer_bytes": buffer_bytes, "renumbering": renumbering}
        merge_range(store, key, runs, lists, quantizer_digest="q", inputs="i", **bounds)
        return tracemalloc.get_traced_memory()[1] + pool.max_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)


def halves_deleted(store: Store, num_rows: int) -> list[Segment]:
    """Two segments of `num_rows` rows; every second row of the first is deleted."""
    deleted_N = np.arange(num_rows) % 2 == 0
    entry = write_deleted(store, f"segments/deleted-{num_rows}", deleted_N).to_json()
    return [Segment("a", 0, num_rows, [], entry, int(deleted_N.sum())), Segment("b", num_rows, num_rows, [])]


@pytest.mark.parametrize("with_deleted", [False, True])
def test_memory_of_a_merge_is_bounded_by_its_buffer_not_by_the_index(tmp_path: Path, with_deleted: bool) -> None:
    store, buffer_bytes = open_store(str(tmp_path)), 400_000
    peaks, sizes = [], []
    for num_lists in (60, 240):
        runs = [committed_run(store, f"runs/{num_lists}/shard-{i}", num_lists, 64, 256) for i in range(2)]
        sizes.append(sum(run.size_bytes for run in runs))
        renumbering = Renumbering(store, halves_deleted(store, num_lists * 64)) if with_deleted else None
        peaks.append(peak_bytes(store, runs, f"segments/{num_lists}/part-00000", buffer_bytes, renumbering))
    assert sizes[1] > 40 * buffer_bytes
    assert peaks[1] < sizes[1] / 4
    assert peaks[1] < 1.2 * peaks[0]


@pytest.fixture(scope="module")
def shards(
    pieces: tuple[Store, list[CommitRecord], RowIds, Quantizer],
) -> tuple[Store, list[CommitRecord], Quantizer]:
    store, records, rows, quantizer = pieces
    return store, make_shards(store, records, rows, quantizer, 3, prefix="runs/damaged"), quantizer


def merge_all(store: Store, runs: list[CommitRecord], quantizer: Quantizer, attempt: str) -> CommitRecord:
    return merge_range(
        store,
        f"segments/{attempt}/part-00000",
        runs,
        (0, quantizer.nlist),
        quantizer_digest=quantizer.digest,
        buffer_bytes=10_000,
        inputs="i",
    )


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_a_damaged_shard_is_refused_by_name(
    shards: tuple[Store, list[CommitRecord], Quantizer], role: str, damage: str
) -> None:
    store, runs, quantizer = shards
    key = runs[1].objects[role].key
    path = store.local_path(key)
    assert path is not None
    good = path.read_bytes()
    try:
        if damage == "missing":
            store.delete(key)
        elif damage == "truncated":
            truncate(store, key, len(good) - 100)
        else:
            flip_bit(store, key, len(good) // 2)
        with pytest.raises(IntegrityError, match=f"object .*{key}"):
            merge_all(store, runs, quantizer, f"{role}-{damage}")
    finally:
        path.write_bytes(good)
    assert store.list_keys(f"segments/{role}-{damage}") == []


def test_a_shard_of_another_codebook_is_refused_by_name(shards: tuple[Store, list[CommitRecord], Quantizer]) -> None:
    store, runs, quantizer = shards
    foreign = dataclasses.replace(runs[2], facts={**runs[2].facts, "quantizer": "f" * 64})
    with pytest.raises(IntegrityError, match=r"shard shard-00002 was encoded with quantizer ffff.*delete its record"):
        merge_all(store, [*runs[:2], foreign], quantizer, "foreign")


def test_a_shard_of_other_inputs_is_refused_by_name(shards: tuple[Store, list[CommitRecord], Quantizer]) -> None:
    _, runs, _ = shards
    check_inputs(runs, ["inputs-0", "inputs-1", "inputs-2"])
    with pytest.raises(IntegrityError, match=r"shard shard-00001 was made from other inputs \(inputs-1\)"):
        check_inputs(runs, ["inputs-0", "another", "inputs-2"])


def test_a_damaged_record_is_refused_by_name(shards: tuple[Store, list[CommitRecord], Quantizer]) -> None:
    store, _, _ = shards
    key = "runs/damaged/shards-3/shard-00001.json"
    rng = np.random.default_rng(0)
    size = store.size_bytes(key)
    assert size is not None
    for position in rng.integers(0, size, 40).tolist():
        bit = int(rng.integers(0, 8))
        flip_bit(store, key, position, bit)
        with pytest.raises(IntegrityError, match=f"{key} is damaged"):
            read_record(store, key)
        flip_bit(store, key, position, bit)


def test_a_run_over_other_lists_is_refused_by_name(shards: tuple[Store, list[CommitRecord], Quantizer]) -> None:
    store, runs, quantizer = shards
    half = merge_range(
        store,
        "runs/half/wave1-00000",
        runs,
        (0, 8),
        quantizer_digest=quantizer.digest,
        buffer_bytes=10_000,
        inputs="i",
    )
    with pytest.raises(IntegrityError, match=r"wave1 00000 covers lists 0\.\.7, expected 0\.\.15"):
        list_bytes(open_runs(store, [*runs, half], quantizer.digest), 16)


@given(
    sizes=st.lists(st.one_of(st.just(0.0), st.floats(0.1, 1e6)), min_size=1, max_size=60),
    first=st.integers(0, 9),
    target=st.floats(0.1, 2e6),
)
def test_ranges_of_lists_are_contiguous_complete_and_bounded(sizes: list[float], first: int, target: float) -> None:
    ranges = split_lists(np.array(sizes), first, target)
    assert ranges[0][0] == first
    assert ranges[-1][1] == first + len(sizes)
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(ranges))
    for lo, hi in ranges:
        assert lo < hi
        held = [size for size in sizes[lo - first : hi - first] if size]
        assert len(held) <= 1 or sum(held) <= target * (1 + 1e-9)


def test_a_part_reads_back_what_the_shards_hold(tmp_path: Path) -> None:
    made = make_version(tmp_path, publish=False)
    readers = open_runs(made.store, made.shards, made.quantizer.digest)
    part = made.manifest.segments[0].parts[1]
    record = read_record(made.store, part.record_key)
    assert record is not None
    assert part_ref(made.store, part.record_key) == part
    reader = RunReader(made.store, "part", record.objects, record.facts)
    for number in range(part.first_list, part.first_list + part.num_lists):
        expected = np.concatenate([r.read_codes(number, number + 1)[1] for r in readers])
        assert reader.read_codes(number, number + 1)[1].tolist() == sorted(expected.tolist())

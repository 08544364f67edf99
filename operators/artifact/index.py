"""A published version, open for search: inverted lists memory-mapped by faiss, vectors and texts by checked ranged reads.

A version is a base and deltas with one quantizer. A query is assigned to lists once; the probed lists of the base and of
each large delta are scanned in their files, those of all small deltas together in memory, and the best of all are scored
again with the stored vectors. Deleted rows are never among them.
Q queries, d dimensions, k hits, C candidates.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kernels.topk import exact_search, rescore
from operators.artifact.joined_segments import (
    JOINED_BYTES,
    JoinedSegments,
    LoadedSegment,
    load_segment,
    segments_to_join,
)
from operators.artifact.list_run import RunReader
from operators.artifact.list_scanner import ListScanner
from operators.artifact.manifest import Manifest, PartRef, open_current, read_current, read_part_records
from operators.artifact.mapped_segment import MappedSegment
from operators.artifact.open_files import OpenFiles
from operators.artifact.quantizer import read_quantizer
from operators.errors import ConfigError, IndexNotFoundError, IntegrityError
from operators.storage.commits import CommitRecord
from operators.storage.store import Store

EXACT_BLOCK_ROWS = 65_536
_CACHED_ROW_GROUPS = 256
OPENED_AT_ONCE = 16
CACHE_BYTES = 256 << 20  # verified blocks that an open index keeps, over all parts

Ints = npt.NDArray[np.int64]


@dataclass
class Neighbours:
    """Hits of Q queries, best first: scores float32 [Q, k], row_ids int64 [Q, k] (-1: fewer hits), and their places."""

    scores_Qk: np.ndarray
    row_ids_Qk: np.ndarray
    entries_Qk: np.ndarray  # entry number in the version: segment by segment in list order; -1 where there is no hit


class Index:
    """One version of an index. Not thread-safe (faiss itself uses all of its threads).

    It answers from its version as long as it lives, whatever is published, rolled back or deleted meanwhile: on a local
    disk its files stay open; of a remote root the lists are in the cache, and what else gc has deleted gives an
    IntegrityError that says so. Whatever a search reads is checked against its checksums, at the latest before its first
    use; damage raises IntegrityError naming the object.

    A server holds one, and between two requests moves on: `index = index.reopened()`.
    """

    def __init__(self, store: Store, manifest: Manifest, *, joined_bytes: int = JOINED_BYTES) -> None:
        """Open the version. joined_bytes: how much of small deltas is read into memory now, to be searched together."""
        self.store = store
        self.manifest = manifest
        self.quantizer = read_quantizer(store, manifest.quantizer_entry, manifest.list_assignment)
        refs = [ref for segment in manifest.segments for ref in segment.parts]
        records = read_part_records(store, refs)
        joined = segments_to_join(manifest, self.quantizer.code_size, joined_bytes)
        first_part = np.cumsum([0, *(len(segment.parts) for segment in manifest.segments)]).tolist()
        in_memory = {part for number in joined for part in range(first_part[number], first_part[number + 1])}
        kept = [record.objects["rows"].key for record in records]
        kept += [record.objects["vectors"].key for part, record in enumerate(records) if part not in in_memory]
        files = OpenFiles(store, kept)
        cache_bytes = CACHE_BYTES // (3 * max(1, len(refs)))

        def open_part(ref: PartRef, record: CommitRecord) -> RunReader:
            return RunReader(files, ref.record_key, record.objects, record.facts, cache_bytes)

        def open_segment(number: int) -> MappedSegment | LoadedSegment:
            parts = slice(first_part[number], first_part[number + 1])
            self._check_lists(number, self.parts[parts])
            segment, first_entry = manifest.segments[number], int(self._part_starts[parts.start])
            if number in joined:
                return load_segment(store, segment, self.parts[parts], first_entry)
            entries = [record.objects["lists"] for record in records[parts]]
            return MappedSegment(store, segment, self.parts[parts], entries, first_entry)

        with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:  # of a remote root each takes several requests
            self.parts = list(pool.map(open_part, refs, records))
            self._part_starts = np.cumsum([0, *(part.facts["num_entries"] for part in self.parts)])
            segments = list(pool.map(open_segment, range(len(manifest.segments))))
        self._mapped = [segment for segment in segments if isinstance(segment, MappedSegment)]
        loaded = [segment for segment in segments if isinstance(segment, LoadedSegment)]
        self._joined = JoinedSegments(loaded, manifest.nlist, self.quantizer.code_size) if loaded else None
        self._scanner = ListScanner(self.quantizer, self._mapped, self._joined)
        self._row_groups: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()

    def _check_lists(self, number: int, readers: list[RunReader]) -> None:
        """Raise IntegrityError unless the parts cover all lists in order and hold the segment's rows."""
        segment, end = self.manifest.segments[number], 0
        for reader in readers:
            if reader.first_list != end:
                raise IntegrityError(f"part {reader.name} begins at list {reader.first_list}, expected {end}")
            end = reader.end_list
        held = sum(reader.facts["num_entries"] for reader in readers)
        if (end, held) != (self.manifest.nlist, segment.num_rows):
            raise IntegrityError(
                f"the parts of segment {segment.name} of version {self.manifest.version} hold {end} lists and {held} entries,"
                f" expected {self.manifest.nlist} and {segment.num_rows}"
            )

    @staticmethod
    def open(store: Store) -> Index:
        """The published version. Raises IndexNotFoundError, IntegrityError."""
        while True:
            manifest = open_current(store)
            try:
                return Index(store, manifest)
            except IntegrityError:
                if open_current(store).content_digest == manifest.content_digest:
                    raise
                # Another version was published, and gc deleted the one that was being opened.

    def is_current(self) -> bool:
        """Whether this version still is the published one. Reads CURRENT: cheap enough for every request on a disk."""
        found = read_current(self.store)
        if found is None:
            raise IndexNotFoundError(f"no index is published at {self.store.url} any more (no object CURRENT there)")
        return (found[0]["version"], found[0]["content_digest"]) == (
            self.manifest.version,
            self.manifest.content_digest,
        )

    def reopened(self) -> Index:
        """The published version: itself while that is this one, else a new Index, while this one goes on to answer.

        Raises IndexNotFoundError, IntegrityError; this one can be used then, too.
        """
        return self if self.is_current() else Index.open(self.store)

    def search(
        self, queries_Qd: np.ndarray, k: int, *, nprobe: int | None = None, refine_factor: int | None = None
    ) -> Neighbours:
        """The k best live entries of each query float32 [Q, d]; None takes what the manifest stores.

        refine_factor 0 gives the order of the codes alone, as plain faiss does; otherwise k * refine_factor candidates
        are scored again with the stored float16 vectors. Scores: inner product, or negative squared distance.
        """
        queries = self._checked_queries(queries_Qd)
        nprobe = self.manifest.quality["nprobe"] if nprobe is None else nprobe
        refine_factor = self.manifest.quality["refine_factor"] if refine_factor is None else refine_factor
        if not 1 <= nprobe <= self.manifest.nlist:
            raise ConfigError(f"nprobe must be in 1..nlist ({self.manifest.nlist}), got {nprobe}")
        if k < 1:
            raise ConfigError(f"k must be at least 1, got {k}")
        wanted = min(k * max(1, refine_factor), self.manifest.ntotal)
        scores, entries = self._scanner.best(queries, nprobe, wanted)
        if refine_factor:
            scores, entries = self._refine(queries, entries, k)
        found = Neighbours(scores[:, :k], np.full((len(queries), min(k, wanted)), -1, np.int64), entries[:, :k])
        found.row_ids_Qk = self.row_ids_of(found.entries_Qk)
        return found

    def _checked_queries(self, queries_Qd: np.ndarray) -> np.ndarray:
        queries = np.ascontiguousarray(queries_Qd, dtype=np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.manifest.d:
            raise ConfigError(f"queries must have shape [Q, d] with d = {self.manifest.d}, got {list(queries.shape)}")
        return queries

    def _refine(self, queries: np.ndarray, entries_QC: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        unique, inverse = np.unique(entries_QC, return_inverse=True)
        vectors = np.zeros((len(unique), self.manifest.d), np.float32)
        present = unique >= 0
        vectors[present] = self.vectors_of(unique[present])
        scores = np.empty(entries_QC.shape, np.float32)
        inverse = inverse.reshape(entries_QC.shape)
        for q in range(len(queries)):  # one query's candidates at a time: C x d floats
            scores[q] = rescore(queries[q : q + 1], vectors[inverse[q]][None], metric=self.manifest.metric)[0]
        scores[entries_QC < 0] = -np.inf
        order = np.lexsort((entries_QC, -scores), axis=-1)[:, :k]
        return np.take_along_axis(scores, order, 1), np.take_along_axis(entries_QC, order, 1)

    def _by_part(self, entries: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(part number, places in `entries`, entry numbers within the part) for entry numbers int64 [n]."""
        part_no = np.searchsorted(self._part_starts, entries, side="right") - 1
        for number in np.unique(part_no).tolist():
            places = np.flatnonzero(part_no == number)
            yield number, places, entries[places] - self._part_starts[number]

    def _in_memory(self, entries_n: Ints) -> Ints:
        """Places of the entries int64 [n] among the joined ones, -1 for those of mapped segments."""
        return np.full(len(entries_n), -1, np.int64) if self._joined is None else self._joined.places_of(entries_n)

    def vectors_of(self, entries: np.ndarray) -> np.ndarray:
        """Stored vectors of the entries int64 [n], float16 [n, d]."""
        out = np.empty((len(entries), self.manifest.d), np.float16)
        place = self._in_memory(entries)
        elsewhere = np.flatnonzero(place < 0)
        if self._joined is not None:
            out[place >= 0] = self._joined.vectors_Jd[place[place >= 0]]
        for number, places, local in self._by_part(entries[elsewhere]):
            out[elsewhere[places]] = self.parts[number].gather_vectors(local)
        return out

    def row_ids_of(self, entries: np.ndarray) -> np.ndarray:
        """Row ids of entry numbers of any shape; -1 where the entry is -1."""
        flat = entries.ravel()
        out = np.full(len(flat), -1, np.int64)
        present = np.flatnonzero(flat >= 0)
        place = self._in_memory(flat[present])
        if self._joined is not None:
            out[present[place >= 0]] = self._joined.row_ids_J[place[place >= 0]]
        present = present[place < 0]
        for segment in self._mapped:
            inside = present[(flat[present] >= segment.first_entry) & (flat[present] < segment.end_entry)]
            out[inside] = segment.row_ids_of(flat[inside])
        return out.reshape(entries.shape)

    def rows_of(self, entries: np.ndarray) -> list[dict[str, Any]]:
        """Row store lines of the entries int64 [n] (none of them -1), in their order."""
        lines: list[dict[str, Any]] = [{} for _ in range(len(entries))]
        for number, places, local in self._by_part(entries):
            for place, entry in zip(places.tolist(), local.tolist(), strict=True):
                group, first = self.parts[number].row_group_of(entry)
                lines[place] = self._row_group(number, group).slice(entry - first, 1).to_pylist()[0]
        return lines

    def _row_group(self, part: int, group: int) -> pa.Table:
        key = (part, group)
        if key not in self._row_groups:
            self._row_groups[key] = self.parts[part].read_row_group(group)
            if len(self._row_groups) > _CACHED_ROW_GROUPS:
                self._row_groups.popitem(last=False)
        self._row_groups.move_to_end(key)
        return self._row_groups[key]

    def doc_ids_of(self, entries: np.ndarray) -> np.ndarray:
        """Document ids of entry numbers int64 [n], object [n]."""
        unique, inverse = np.unique(entries, return_inverse=True)
        names = np.array([line["doc_id"] for line in self.rows_of(unique)], dtype=object)
        return names[inverse] if len(unique) else np.empty(0, object)

    def exact_search(self, queries_Qd: np.ndarray, k: int, *, from_row_id: int = 0) -> Neighbours:
        """Exhaustive search over the stored vectors of live rows, block by block: what the index is measured against.

        from_row_id: only in the segments from this row id on.
        """
        queries = self._checked_queries(queries_Qd)
        k = min(k, sum(s.num_live for s in self.manifest.segments if s.first_row_id >= from_row_id))
        if not k:
            none = np.empty((len(queries), 0), np.int64)
            return Neighbours(none.astype(np.float32), none, none)
        firsts, starts, ends = [0], [], []  # of each block: number of its first live row, entries [start, end)

        def blocks() -> Iterator[tuple[int, np.ndarray]]:
            for start, end, vectors in self._live_blocks(from_row_id):
                starts.append(start)
                ends.append(end)
                firsts.append(firsts[-1] + len(vectors))
                yield firsts[-2], vectors

        scores, rows = exact_search(queries, blocks(), k, metric=self.manifest.metric)
        entries = np.empty_like(rows)
        block_of = np.searchsorted(firsts, rows, side="right") - 1
        for number in np.unique(block_of).tolist():
            here = block_of == number
            live = np.flatnonzero(self._live(starts[number], ends[number])) + starts[number]
            entries[here] = live[rows[here] - firsts[number]]
        return Neighbours(scores, self.row_ids_of(entries), entries)

    def _live_blocks(self, from_row_id: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """(start, end, vectors float16 [n, d] of the live ones) of entries [start, end), through all of them."""
        first_row_ids = [s.first_row_id for s in self.manifest.segments for _ in s.parts]
        for part, first, row_id in zip(self.parts, self._part_starts[:-1].tolist(), first_row_ids, strict=True):
            if row_id < from_row_id:
                continue
            num_entries = part.facts["num_entries"]
            place = int(self._in_memory(np.array([first]))[0]) if num_entries else -1
            for lo in range(0, num_entries, EXACT_BLOCK_ROWS):
                hi = min(lo + EXACT_BLOCK_ROWS, num_entries)
                live = self._live(first + lo, first + hi)
                if self._joined is not None and place >= 0:
                    vectors = self._joined.vectors_Jd[place + lo : place + hi]
                else:
                    vectors = part.read_vectors(lo, hi)
                yield first + lo, first + hi, vectors if live.all() else vectors[live]

    def _live(self, start: int, end: int) -> npt.NDArray[np.bool_]:
        """bool [end - start]: which of the entries [start, end) of one part are not deleted."""
        entries = np.arange(start, end)
        for segment in self._mapped:
            if segment.first_entry <= start < segment.end_entry:
                segment.check_deleted()
                return segment.live(entries)
        assert self._joined is not None
        return self._joined.live_J[self._joined.places_of(entries)]

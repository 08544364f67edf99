"""A published version, open for search: inverted lists memory-mapped by faiss, vectors and texts by checked ranged reads.

A version is a base and deltas with one quantizer. A query is assigned to lists once; the probed lists of the base and of
each large delta are scanned in their files, those of all small deltas together in memory, and the best of all are scored
again with the stored vectors. Deleted rows are never among them.
Q queries, d dimensions, k hits, C candidates.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels.rescore import best_of, best_rows, score_pairs
from kernels.topk import exact_search
from operators import schemas
from operators.artifact.doc_id_prefixes import DocIdPrefixes
from operators.artifact.joined_segments import (
    JOINED_BYTES,
    JoinedSegments,
    LoadedSegment,
    load_segment,
    segments_to_join,
)
from operators.artifact.list_run import RunReader
from operators.artifact.list_scanner import ListScanner, Probes
from operators.artifact.manifest import Manifest, PartRef, open_current, read_current, read_part_records
from operators.artifact.mapped_segment import MappedSegment, cached_path
from operators.artifact.mapped_vectors import MappedVectors
from operators.artifact.open_files import OpenFiles
from operators.artifact.quantizer import read_quantizer
from operators.artifact.row_groups import RowGroups
from operators.errors import ConfigError, IndexNotFoundError, IntegrityError
from operators.storage.checked import ObjectEntry
from operators.storage.commits import CommitRecord
from operators.storage.store import Store

EXACT_BLOCK_ROWS = 65_536
ROW_CACHE_BYTES = 64 << 20  # decoded row groups that an open index keeps
EXACT_AMONG = 16_384  # so many entries with a prefix are scored each rather than found by their codes
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

    A server holds one, and between two requests moves on: `index = index.reopened()`. `copies` are the files that may stand for its
    objects in the cache, none where the root is on this disk; deleted, they are fetched again by the next to open it.
    """

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        *,
        joined_bytes: int = JOINED_BYTES,
        row_cache_bytes: int = ROW_CACHE_BYTES,
        copies: bool = False,
        scan_threads: int = 0,
    ) -> None:
        """Open the version. joined_bytes: how much of small deltas is read into memory now, to be searched together.

        row_cache_bytes: of decoded rows that are kept. copies: of a remote root vectors and rows are fetched into the cache
        now, too, and not read as they are needed. scan_threads: threads of faiss while it scans lists without a prefix, one a
        query, so that they change no answer; 0: as many as it has when it is called, as for all else.
        """
        self.store = store
        self.manifest = manifest
        self.quantizer = read_quantizer(store, manifest.quantizer_entry, manifest.list_assignment)
        refs = [ref for segment in manifest.segments for ref in segment.parts]
        records = read_part_records(store, refs)
        entries = [entry for record in records for entry in record.objects.values()]
        is_remote = any(store.local_path(entry.key) is None for entry in entries)
        self.copies = frozenset(map(cached_path, entries)) if is_remote else frozenset()
        joined = segments_to_join(manifest, self.quantizer.code_size, joined_bytes)
        first_part = np.cumsum([0, *(len(segment.parts) for segment in manifest.segments)]).tolist()
        in_memory = {part for number in joined for part in range(first_part[number], first_part[number + 1])}
        kept = [record.objects["rows"].key for record in records]
        kept += [record.objects["vectors"].key for part, record in enumerate(records) if part not in in_memory]
        files = OpenFiles(store, kept, {entry.key: entry for entry in entries} if copies else {})
        cache_bytes = CACHE_BYTES // (3 * max(1, len(refs)))

        def open_part(ref: PartRef, record: CommitRecord) -> RunReader:
            try:
                return RunReader(files, ref.record_key, record.objects, record.facts, cache_bytes)
            except IntegrityError:
                for entry in record.objects.values():  # a damaged copy would be taken again and again
                    files.drop_copy(entry.key)
                raise

        def open_segment(number: int) -> MappedSegment | LoadedSegment:
            parts = slice(first_part[number], first_part[number + 1])
            self._check_lists(number, self.parts[parts])
            segment, first_entry = manifest.segments[number], int(self._part_starts[parts.start])
            if number in joined:
                return load_segment(store, segment, self.parts[parts], first_entry)
            lists = [record.objects["lists"] for record in records[parts]]
            return MappedSegment(store, segment, self.parts[parts], lists, first_entry)

        with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:  # of a remote root each takes several requests
            self.parts = list(pool.map(open_part, refs, records))
            self._part_starts = np.cumsum([0, *(part.facts["num_entries"] for part in self.parts)])
            segments = list(pool.map(open_segment, range(len(manifest.segments))))
        self._mapped = [segment for segment in segments if isinstance(segment, MappedSegment)]
        loaded = [segment for segment in segments if isinstance(segment, LoadedSegment)]
        self._joined = JoinedSegments(loaded, manifest.nlist, self.quantizer.code_size) if loaded else None
        self._scanner = ListScanner(self.quantizer, self._mapped, self._joined)
        self._scan_threads = scan_threads
        self._vectors = [
            None if part in in_memory else self._map_vectors(files, record.objects["vectors"], record.facts)
            for part, record in enumerate(records)
        ]
        rows_keys = [record.objects["rows"].key for record in records]
        self.row_groups = RowGroups(self.parts, row_cache_bytes, lambda part: files.drop_copy(rows_keys[part]))
        # By a weak reference: in a cycle an index that a service has replaced would stay in memory, with its files mapped.
        own = weakref.proxy(self)
        self.prefixes = DocIdPrefixes(
            store, manifest, lambda entries: own.row_ids_of(entries), lambda entries: own._are_live(entries)
        )

    def _map_vectors(self, files: OpenFiles, entry: ObjectEntry, facts: dict[str, Any]) -> MappedVectors | None:
        """None where the object is remote."""
        path = files.local_path(entry.key)
        if path is None:
            return None
        is_copy = files.is_copy(entry.key)
        return MappedVectors(path, entry, facts["num_entries"], self.manifest.d, is_copy=is_copy)

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
    def open(store: Store, **options: Any) -> Index:
        """The published version, with options of the constructor. Raises IndexNotFoundError, IntegrityError."""
        while True:
            manifest = open_current(store)
            try:
                return Index(store, manifest, **options)
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
        self,
        queries_Qd: np.ndarray,
        k: int,
        *,
        nprobe: int | None = None,
        refine_factor: int | None = None,
        prefix: str | None = None,
    ) -> Neighbours:
        """The k best live entries of each query float32 [Q, d]; None takes what the manifest stores.

        refine_factor 0 gives the order of the codes alone, as plain faiss does; otherwise k * refine_factor candidates
        are scored again with the stored float16 vectors. Scores: inner product, or negative squared distance.

        prefix: only of documents whose id begins with it. Where there are few such rows (EXACT_AMONG of the version, or
        of a query's probed lists), all of them are scored with their stored vectors. Else the codes of the probed lists
        choose candidates from among them. Where the probed lists hold fewer than k, more lists are probed, until there are
        k or there are no more: so there are k hits whenever k rows have the prefix.
        """
        scores, entries = self.search_entries(queries_Qd, k, nprobe=nprobe, refine_factor=refine_factor, prefix=prefix)
        return Neighbours(scores, self.row_ids_of(entries), entries)

    def search_entries(
        self,
        queries_Qd: np.ndarray,
        k: int,
        *,
        nprobe: int | None = None,
        refine_factor: int | None = None,
        prefix: str | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and entries of `search`, without the row ids, which cost a look into the lists."""
        queries = self._checked_queries(queries_Qd)
        nprobe = self.manifest.quality["nprobe"] if nprobe is None else nprobe
        refine_factor = self.manifest.quality["refine_factor"] if refine_factor is None else refine_factor
        if not 1 <= nprobe <= self.manifest.nlist:
            raise ConfigError(f"nprobe must be in 1..nlist ({self.manifest.nlist}), got {nprobe}")
        if k < 1:
            raise ConfigError(f"k must be at least 1, got {k}")
        if prefix is not None:
            scores, entries = self._best_among(queries, k, nprobe, max(1, refine_factor), self.prefixes.entries(prefix))
        else:
            wanted = min(k * max(1, refine_factor), self.manifest.ntotal)
            scores, entries = self._best(queries, self._scanner.probes(queries, nprobe), wanted)
            if refine_factor:
                scores, entries = self._refine(queries, entries, k)
            k = min(k, wanted)
        return scores[:, :k], entries[:, :k]

    def _best(self, queries: np.ndarray, probes: Probes, wanted: int) -> tuple[np.ndarray, np.ndarray]:
        """What the scanner finds. Which lists are probed is found before, by products that may round otherwise on more threads."""
        if not self._scan_threads:
            return self._scanner.best(queries, probes, wanted)
        import faiss

        before = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(self._scan_threads)
        try:
            return self._scanner.best(queries, probes, wanted)
        finally:
            faiss.omp_set_num_threads(before)

    def _best_among(
        self, queries: np.ndarray, k: int, nprobe: int, refine_factor: int, among: Ints
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and entries [Q, min(k, entries)] of the best of the entries, int64 ascending, all live."""
        k = min(k, len(among))
        scores = np.full((len(queries), k), -np.inf, np.float32)
        entries = np.full((len(queries), k), -1, np.int64)
        if len(among) <= EXACT_AMONG:
            for q in range(len(queries) if k else 0):
                scores[q], entries[q] = self._best_of(queries[q : q + 1], among, k)
            return scores, entries
        left = np.arange(len(queries))
        while len(left):
            probes = self._scanner.probes(queries[left], nprobe)
            bounds = self._bounds_in_lists(probes[1], among)
            sizes = (bounds[1] - bounds[0]).sum(axis=1)
            many = np.flatnonzero(sizes > EXACT_AMONG)
            if len(many):
                of_many = queries[left[many]], (probes[0][many], probes[1][many])
                found = self._scanner.best(*of_many, min(k * refine_factor, len(among)), among)
                scores[left[many]], entries[left[many]] = self._refine(of_many[0], found[1], k)
            enough = (sizes >= k) | (nprobe == self.manifest.nlist)
            for q in np.flatnonzero(enough & (sizes <= EXACT_AMONG)).tolist():
                chosen = np.concatenate([among[lo:hi] for lo, hi in bounds[:, q].T.tolist()])
                scores[left[q]], entries[left[q]] = self._best_of(queries[left[q] : left[q] + 1], np.sort(chosen), k)
            left, nprobe = left[~enough], min(2 * nprobe, self.manifest.nlist)
        return scores, entries

    def _best_of(self, query: np.ndarray, entries: Ints, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and entries [k] of the best of at least k entries, ties by the lowest."""
        scores = self._score(query, np.zeros(len(entries), np.int64), entries)
        order = np.lexsort((entries, -scores))[:k]
        return scores[order], entries[order]

    def _bounds_in_lists(self, lists_Qp: Ints, among: Ints) -> Ints:
        """Where the entries of each segment's probed lists begin and end in `among`: int64 [2, Q, segments * p]."""
        first, end = [], 0
        for segment in self.manifest.segments:
            parts = self.parts[end : end + len(segment.parts)]
            starts = self._part_starts[end : end + len(segment.parts)]
            bounds_L = np.concatenate([*(r.starts_L[:-1] + s for r, s in zip(parts, starts.tolist(), strict=True))])
            end += len(segment.parts)
            bounds_L = np.append(bounds_L, self._part_starts[end])
            first.append(np.stack([bounds_L[lists_Qp], bounds_L[lists_Qp + 1]]))
        return np.searchsorted(among, np.concatenate(first, axis=2))

    def _checked_queries(self, queries_Qd: np.ndarray) -> np.ndarray:
        queries = np.ascontiguousarray(queries_Qd, dtype=np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.manifest.d:
            raise ConfigError(f"queries must have shape [Q, d] with d = {self.manifest.d}, got {list(queries.shape)}")
        return queries

    def _refine(self, queries: np.ndarray, entries_QC: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and entries of the k best candidates (-1: none) by their stored vectors."""
        if len(self.parts) == 1 and self._vectors[0] is not None:
            self._vectors[0].check(entries_QC)
            return best_rows(queries, self._vectors[0].vectors_nd, entries_QC, k, metric=self.manifest.metric)
        query, column = np.nonzero(entries_QC >= 0)
        scores = np.full(entries_QC.shape, -np.inf, np.float32)
        scores[query, column] = self._score(queries, query, entries_QC[query, column])
        return best_of(scores, entries_QC, k)

    def _score(self, queries_Qd: np.ndarray, query_P: Ints, entries_P: Ints) -> npt.NDArray[np.float32]:
        """Scores float32 [P] of pairs of a query and an entry, with the stored vectors."""
        metric = self.manifest.metric
        if len(self.parts) == 1 and self._vectors[0] is not None:
            self._vectors[0].check(entries_P)
            return score_pairs(queries_Qd, query_P, self._vectors[0].vectors_nd, entries_P, metric=metric)
        place = self._in_memory(entries_P)
        out = np.empty(len(entries_P), np.float32)
        elsewhere = np.flatnonzero(place < 0)
        if self._joined is not None and len(elsewhere) < len(place):
            here = np.flatnonzero(place >= 0)
            out[here] = score_pairs(queries_Qd, query_P[here], self._joined.vectors_Jd, place[here], metric=metric)
        by_part = list(self._by_part(entries_P[elsewhere]))
        gathered = self._gathered([(number, local) for number, _, local in by_part if self._vectors[number] is None])
        for number, places, local in by_part:
            pairs, mapped = elsewhere[places], self._vectors[number]
            if mapped is not None:
                mapped.check(local)
                out[pairs] = score_pairs(queries_Qd, query_P[pairs], mapped.vectors_nd, local, metric=metric)
            else:
                vectors, inverse = gathered[number]
                out[pairs] = score_pairs(queries_Qd, query_P[pairs], vectors, inverse, metric=metric)
        return out

    def _gathered(self, wanted: Sequence[tuple[int, Ints]]) -> dict[int, tuple[np.ndarray, npt.NDArray[np.intp]]]:
        """Of remote parts the vectors of entries, each once, and which of them is whose. A read takes a request: parts are read at once."""

        def gather(one: tuple[int, Ints]) -> tuple[int, tuple[np.ndarray, npt.NDArray[np.intp]]]:
            number, local = one
            unique, inverse = np.unique(local, return_inverse=True)
            return number, (self.parts[number].gather_vectors(unique), inverse)

        if len(wanted) < 2:
            return dict(map(gather, wanted))
        with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
            return dict(pool.map(gather, wanted))

    def _by_part(self, entries: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(part number, places in `entries`, entry numbers within the part) for entry numbers int64 [n]."""
        if len(self.parts) == 1:
            yield 0, np.arange(len(entries)), entries
            return
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
            mapped = self._vectors[number]
            if mapped is not None:
                mapped.check(local)
                out[elsewhere[places]] = mapped.vectors_nd[local]
            else:
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

    def rows_of(self, entries: np.ndarray, columns: Sequence[str] = schemas.ROW_STORE.names) -> list[dict[str, Any]]:
        """Row store lines of the entries int64 [n] (none of them -1), in their order."""
        wanted = tuple(columns)
        if len(self.parts) == 1:
            return self.row_groups.rows(0, entries, wanted)
        nothing: dict[str, Any] = {}
        lines = [nothing] * len(entries)
        for number, places, local in self._by_part(entries):
            rows = self.row_groups.rows(number, local, wanted)
            for place, row in zip(places.tolist(), rows, strict=True):
                lines[place] = row
        return lines

    def doc_ids_of(self, entries: np.ndarray) -> np.ndarray:
        """Document ids of entry numbers int64 [n], object [n]."""
        unique, inverse = np.unique(entries, return_inverse=True)
        names = np.array([line["doc_id"] for line in self.rows_of(unique, ("doc_id",))], dtype=object)
        return names[inverse] if len(unique) else np.empty(0, object)

    def warm(self, max_bytes: int) -> None:
        """Read and check lists and mapped vectors, part by part, up to so many bytes, so that searches find them in memory.

        May run while the index is searched. Raises IntegrityError.
        """
        left = max_bytes
        for segment in self._mapped:
            left -= segment.num_rows * (self.quantizer.code_size + 8)
            if left >= 0:
                segment.check_all()
        for mapped in self._vectors:
            if mapped is not None:
                left -= mapped.vectors_nd.nbytes
                if left >= 0:
                    mapped.check_all()

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

    def _are_live(self, entries_n: Ints) -> npt.NDArray[np.bool_]:
        """bool [n]: which entries are not deleted."""
        out = np.zeros(len(entries_n), bool)
        place = self._in_memory(entries_n)
        if self._joined is not None:
            out[place >= 0] = self._joined.live_J[place[place >= 0]]
        for segment in self._mapped:
            inside = (place < 0) & (entries_n >= segment.first_entry) & (entries_n < segment.end_entry)
            segment.check_deleted()
            out[inside] = segment.live(entries_n[inside])
        return out

    def _live(self, start: int, end: int) -> npt.NDArray[np.bool_]:
        """bool [end - start]: which of the entries [start, end) of one part are not deleted."""
        entries = np.arange(start, end)
        for segment in self._mapped:
            if segment.first_entry <= start < segment.end_entry:
                segment.check_deleted()
                return segment.live(entries)
        assert self._joined is not None
        return self._joined.live_J[self._joined.places_of(entries)]

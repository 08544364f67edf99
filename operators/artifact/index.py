"""A published version, open for search: inverted lists memory-mapped by faiss, vectors and texts by checked ranged reads.

Q queries, d dimensions, k hits, C candidates.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kernels.topk import exact_search, rescore
from operators.artifact.list_run import RunReader
from operators.artifact.manifest import Manifest, open_current, read_part_records
from operators.artifact.quantizer import read_quantizer
from operators.errors import ConfigError, IntegrityError
from operators.storage.checked import CheckedFile, ObjectEntry
from operators.storage.store import Store

EXACT_BLOCK_ROWS = 65_536
_CACHED_ROW_GROUPS = 256
CACHE_BYTES = 256 << 20  # verified blocks that an open index keeps, over all parts


@dataclass
class Neighbours:
    """Hits of Q queries, best first: scores float32 [Q, k], row_ids int64 [Q, k] (-1: fewer hits), and their places."""

    scores_Qk: np.ndarray
    row_ids_Qk: np.ndarray
    entries_Qk: np.ndarray  # entry number in the segment, list order; -1 where there is no hit


def cache_folder() -> Path:
    """Where inverted lists of remote indices are kept: $VECTORMILL_CACHE, else the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vectormill"
    return Path(os.environ.get("VECTORMILL_CACHE", default))


def local_copy(store: Store, entry: ObjectEntry) -> Path:
    """Path of the object on this disk: itself, or a verified copy in the cache (named by its SHA-256)."""
    path = store.local_path(entry.key)
    if path is not None:
        if not path.exists() or path.stat().st_size != entry.size_bytes:
            found = f"{path.stat().st_size} bytes" if path.exists() else "nothing"
            raise IntegrityError(f"object {path} must hold {entry.size_bytes} bytes, found {found}")
        return path
    target = cache_folder() / f"{entry.sha256}.lists"
    if target.exists() and target.stat().st_size == entry.size_bytes:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    source = CheckedFile(store, entry, cache_bytes=entry.block_bytes)
    digest = hashlib.sha256()
    with open(temporary, "wb") as file:
        for start in range(0, entry.size_bytes, 8 << 20):
            data = source.read_range(start, start + (8 << 20))
            digest.update(data)
            file.write(data)
    if digest.hexdigest() != entry.sha256:
        temporary.unlink()
        raise IntegrityError(f"object {store.url}/{entry.key} does not match its SHA-256")
    os.replace(temporary, target)
    return target


class Index:
    """One version of an index. Not thread-safe (faiss itself uses all of its threads)."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        import faiss

        self.store = store
        self.manifest = manifest
        self.quantizer = read_quantizer(store, manifest.quantizer_entry, manifest.list_assignment)
        if len(manifest.segments) != 1:
            raise IntegrityError(
                f"version {manifest.version} has {len(manifest.segments)} segments, this vectormill reads one"
            )
        refs = manifest.segments[0].parts
        records = read_part_records(store, refs)
        cache_bytes = CACHE_BYTES // (3 * max(1, len(refs)))
        self.parts = [
            RunReader(store, ref.record_key, record.objects, record.facts, cache_bytes)
            for ref, record in zip(refs, records, strict=True)
        ]
        self._first_lists = np.array([part.first_list for part in self.parts])
        self._part_starts = np.concatenate([[0], np.cumsum([part.facts["num_entries"] for part in self.parts])])
        self._lists = []
        stacked = faiss.InvertedListsPtrVector()
        for record in records:
            reader = faiss.FileIOReader(str(local_copy(store, record.objects["lists"])))
            lists = faiss.downcast_InvertedLists(faiss.read_InvertedLists(reader, faiss.IO_FLAG_MMAP))
            lists.prefetch_nthread = 0  # starting 32 threads a query costs more than the page faults they save
            self._lists.append(lists)
            stacked.push_back(lists)
        self._stack = faiss.VStackInvertedLists(stacked.size(), stacked.data())
        if self._stack.nlist != manifest.nlist:
            raise IntegrityError(
                f"the parts of version {manifest.version} hold {self._stack.nlist} lists, expected {manifest.nlist}"
            )
        self._faiss = self.quantizer.to_faiss()
        self._faiss.replace_invlists(self._stack)
        self._faiss.ntotal = manifest.ntotal
        self._row_groups: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()

    @staticmethod
    def open(store: Store) -> Index:
        """The published version. Raises IndexNotFoundError, IntegrityError."""
        return Index(store, open_current(store))

    def search(
        self, queries_Qd: np.ndarray, k: int, *, nprobe: int | None = None, refine_factor: int | None = None
    ) -> Neighbours:
        """The k best entries of each query float32 [Q, d]; None takes what the manifest stores.

        refine_factor 0 gives the order of the codes alone, as plain faiss does; otherwise k * refine_factor candidates
        are scored again with the stored float16 vectors. Scores: inner product, or negative squared distance.
        """
        import faiss

        queries = self._checked_queries(queries_Qd)
        nprobe = self.manifest.quality["nprobe"] if nprobe is None else nprobe
        refine_factor = self.manifest.quality["refine_factor"] if refine_factor is None else refine_factor
        if not 1 <= nprobe <= self.manifest.nlist:
            raise ConfigError(f"nprobe must be in 1..nlist ({self.manifest.nlist}), got {nprobe}")
        if k < 1:
            raise ConfigError(f"k must be at least 1, got {k}")
        wanted = min(k * max(1, refine_factor), self.manifest.ntotal)
        self._faiss.nprobe = nprobe
        coarse_D, coarse_I = self._faiss.quantizer.search(queries, nprobe)
        scores = np.empty((len(queries), wanted), np.float32)
        pairs = np.empty((len(queries), wanted), np.int64)
        pointers = [faiss.swig_ptr(a) for a in (queries, coarse_I, coarse_D, scores, pairs)]
        # store_pairs: ids come back as list_no << 32 | offset, which is the place of the entry without an id map.
        self._faiss.search_preassigned_c(
            len(queries), pointers[0], wanted, pointers[1], pointers[2], pointers[3], pointers[4], True
        )
        if self.manifest.metric == "l2":
            scores = -scores
        entries = self._entries_of(pairs)
        scores[entries < 0] = -np.inf
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

    def _entries_of(self, pairs: np.ndarray) -> np.ndarray:
        """Entry numbers of faiss's (list_no << 32 | offset) pairs; -1 stays."""
        list_no, offset = pairs >> 32, pairs & 0xFFFFFFFF
        starts = np.concatenate(
            [p.starts_L[:-1] + base for p, base in zip(self.parts, self._part_starts, strict=False)]
        )
        return np.where(pairs < 0, -1, starts[np.clip(list_no, 0, len(starts) - 1)] + offset)

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

    def _by_part(self, entries: np.ndarray) -> Iterator[tuple[RunReader, np.ndarray, np.ndarray]]:
        """(part, places in `entries`, entry numbers within the part) for entry numbers int64 [n]."""
        part_no = np.searchsorted(self._part_starts, entries, side="right") - 1
        for number in np.unique(part_no).tolist():
            places = np.flatnonzero(part_no == number)
            yield self.parts[number], places, entries[places] - self._part_starts[number]

    def vectors_of(self, entries: np.ndarray) -> np.ndarray:
        """Stored vectors of the entries int64 [n], float16 [n, d]."""
        out = np.empty((len(entries), self.manifest.d), np.float16)
        for part, places, local in self._by_part(entries):
            out[places] = part.gather_vectors(local)
        return out

    def row_ids_of(self, entries: np.ndarray) -> np.ndarray:
        """Row ids of entry numbers of any shape; -1 where the entry is -1."""
        flat = entries.ravel()
        out = np.full(len(flat), -1, np.int64)
        present = np.flatnonzero(flat >= 0)
        for part, places, local in self._by_part(flat[present]):
            list_no = np.searchsorted(part.starts_L, local, side="right") - 1 + part.first_list
            for one in np.unique(list_no).tolist():
                ids = part.read_codes(one, one + 1)[1]
                inside = np.flatnonzero(list_no == one)
                out[present[places[inside]]] = ids[local[inside] - part.starts_L[one - part.first_list]]
        return out.reshape(entries.shape)

    def rows_of(self, entries: np.ndarray) -> list[dict[str, Any]]:
        """Row store lines of the entries int64 [n] (none of them -1), in their order."""
        lines: list[dict[str, Any]] = [{} for _ in range(len(entries))]
        for part, places, local in self._by_part(entries):
            for place, entry in zip(places.tolist(), local.tolist(), strict=True):
                group, first = part.row_group_of(entry)
                lines[place] = self._row_group(part, group).slice(entry - first, 1).to_pylist()[0]
        return lines

    def _row_group(self, part: RunReader, group: int) -> pa.Table:
        key = (part.first_list, group)
        if key not in self._row_groups:
            self._row_groups[key] = part.read_row_group(group)
            if len(self._row_groups) > _CACHED_ROW_GROUPS:
                self._row_groups.popitem(last=False)
        self._row_groups.move_to_end(key)
        return self._row_groups[key]

    def doc_ids_of(self, entries: np.ndarray) -> np.ndarray:
        """Document ids of entry numbers int64 [n], object [n]."""
        unique, inverse = np.unique(entries, return_inverse=True)
        names = np.array([line["doc_id"] for line in self.rows_of(unique)], dtype=object)
        return names[inverse] if len(unique) else np.empty(0, object)

    def exact_search(self, queries_Qd: np.ndarray, k: int) -> Neighbours:
        """Exhaustive search over the stored vectors, block by block: what the index is measured against."""
        queries = self._checked_queries(queries_Qd)

        def blocks() -> Iterator[tuple[int, np.ndarray]]:
            for part, start in zip(self.parts, self._part_starts.tolist(), strict=False):
                for lo in range(0, part.facts["num_entries"], EXACT_BLOCK_ROWS):
                    hi = min(lo + EXACT_BLOCK_ROWS, part.facts["num_entries"])
                    yield start + lo, part.read_vectors(lo, hi)

        scores, entries = exact_search(queries, blocks(), min(k, self.manifest.ntotal), metric=self.manifest.metric)
        return Neighbours(scores, self.row_ids_of(entries), entries)

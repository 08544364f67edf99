"""Which entries of a version belong to documents whose id begins with a prefix: from the ledger, without reading a row.

The first question loads the ids of all documents (their bytes) and the entry of every row (8 bytes each); then a prefix
costs a scan of the ids. N documents, R rows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from operators.artifact.manifest import Manifest
from operators.documents import READERS, positions_of, read_ledger, read_sources
from operators.piece_store import read_table
from operators.storage.checked import ObjectEntry
from operators.storage.store import Store

KEPT_BYTES = 64 << 20  # of entries of prefixes that were asked for before
KEPT_PREFIXES = 1024
ROWS_AT_ONCE = 1 << 20

Ints = npt.NDArray[np.int64]


class DocIdPrefixes:
    """Entries by prefix. Thread-safe, and apart from the searching: it may be asked while the index is searched."""

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        row_ids_of: Callable[[Ints], Ints],
        live: Callable[[Ints], npt.NDArray[np.bool_]],
    ) -> None:
        """row_ids_of, live: of entries int64 [n]; may be called in any thread, as long as the index lives."""
        self._store, self._manifest = store, manifest
        self._row_ids_of, self._live = row_ids_of, live
        self._lock = Lock()
        self._kept: OrderedDict[str, Ints] = OrderedDict()
        self._kept_bytes = 0
        self._doc_ids: pa.Array | None = None

    @property
    def is_loaded(self) -> bool:
        return self._doc_ids is not None

    def load(self) -> None:
        """Read what every question needs, unless that was done. Raises IntegrityError."""
        with self._lock:
            self._load()

    def entries(self, prefix: str) -> Ints:
        """Entry numbers of the live rows, ascending, int64. Raises IntegrityError."""
        with self._lock:
            found = self._kept.get(prefix)
            if found is None:
                self._load()
                found = self._kept[prefix] = self._find(prefix)
                self._kept_bytes += found.nbytes
                while len(self._kept) > 1 and (self._kept_bytes > KEPT_BYTES or len(self._kept) > KEPT_PREFIXES):
                    self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes
            self._kept.move_to_end(prefix)
            return found

    def _load(self) -> None:
        if self._doc_ids is not None:
            return
        sources = read_sources(self._store, self._manifest)
        ledger = read_ledger(self._store, self._manifest, sources)
        tables = [ObjectEntry.from_json(held["object"]) for held in self._manifest.documents]
        with ThreadPoolExecutor(READERS) as pool:
            columns = list(pool.map(lambda entry: read_table(self._store, entry, ["doc_id"]).column(0), tables))
        chunks = [chunk.cast(pa.large_string()) for column in columns for chunk in column.chunks]
        doc_ids = pa.concat_arrays(chunks) if chunks else pa.array([], pa.large_string())
        has_rows = np.flatnonzero((ledger.num_chunks_N > 0) & (ledger.row_id_N >= 0))
        self._first_row_N = ledger.row_id_N[has_rows]
        self._num_rows_N = ledger.num_chunks_N[has_rows].astype(np.int64)
        num_entries = sum(segment.num_rows for segment in self._manifest.segments)
        self._entry_of_R = np.full(self._manifest.next_row_id, -1, np.int64)
        for begin in range(0, num_entries, ROWS_AT_ONCE):
            entries = np.arange(begin, min(begin + ROWS_AT_ONCE, num_entries))
            self._entry_of_R[self._row_ids_of(entries)] = entries
        self._doc_ids = doc_ids.take(pa.array(positions_of(sources)[has_rows]))

    def _find(self, prefix: str) -> Ints:
        begins = pc.starts_with(self._doc_ids, pattern=prefix).to_numpy(zero_copy_only=False)
        documents = np.flatnonzero(begins)
        counts = self._num_rows_N[documents]
        ends = np.cumsum(counts)
        within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
        entries = self._entry_of_R[np.repeat(self._first_row_N[documents], counts) + within]
        entries = np.unique(entries[entries >= 0])
        return entries[self._live(entries)]

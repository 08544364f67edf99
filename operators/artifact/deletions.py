"""Which rows of a segment a version has deleted: one bit a row.

Bit (i & 7) of byte i >> 3 is that of row first_row_id + i, the order of numpy's packbits with bitorder="little" and of
faiss's IDSelectorBitmap. N rows.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from operators.artifact.manifest import Manifest, Segment
from operators.errors import IntegrityError
from operators.storage.checked import CheckedFile, ObjectEntry, put_checked
from operators.storage.store import Store

Bits = npt.NDArray[np.uint8]
READERS = 16  # bitmaps that are read at once


def write_deleted(store: Store, key: str, deleted_N: npt.NDArray[np.bool_]) -> ObjectEntry:
    """Store the bitmap of a segment whose rows bool [N] says are deleted."""
    return put_checked(store, key, np.packbits(deleted_N, bitorder="little").tobytes())


def read_bitmap(store: Store, segment: Segment) -> Bits:
    """The bitmap as it is stored, uint8 [ceil(num_rows / 8)]. Raises IntegrityError for a damaged one, or one that does not fit."""
    expected = -(-segment.num_rows // 8)
    if segment.deleted is None:
        if segment.num_deleted:
            raise IntegrityError(f"segment {segment.name} has {segment.num_deleted} deleted rows and no bitmap of them")
        return np.zeros(expected, np.uint8)
    entry = ObjectEntry.from_json(segment.deleted)
    data = CheckedFile(store, entry).readall()
    if len(data) != expected or hashlib.sha256(data).hexdigest() != entry.sha256:
        raise IntegrityError(
            f"bitmap {store.url}/{entry.key} of segment {segment.name} must hold {expected} bytes with SHA-256"
            f" {entry.sha256}, found {len(data)} bytes"
        )
    bits = np.frombuffer(data, np.uint8)
    marked = int(np.bitwise_count(bits).sum(dtype=np.int64))
    beyond = int(bits[-1]) >> (segment.num_rows % 8) if segment.num_rows % 8 else 0
    if beyond or marked != segment.num_deleted:
        raise IntegrityError(
            f"bitmap {store.url}/{entry.key} marks {marked} rows, segment {segment.name} of {segment.num_rows} rows"
            f" has {segment.num_deleted} deleted"
        )
    return bits


def read_deleted(store: Store, segment: Segment) -> npt.NDArray[np.bool_]:
    """bool [num_rows]: True for the deleted rows. Raises IntegrityError for a damaged bitmap, or one that does not fit."""
    return np.unpackbits(read_bitmap(store, segment), count=segment.num_rows, bitorder="little").astype(bool)


def live_rows(store: Store, manifest: Manifest) -> npt.NDArray[np.bool_]:
    """bool [next_row_id]: True for the rows of the version, by row id. Raises IntegrityError."""
    with ThreadPoolExecutor(READERS) as pool:
        deleted = list(pool.map(lambda segment: read_deleted(store, segment), manifest.segments))
    return ~np.concatenate(deleted)

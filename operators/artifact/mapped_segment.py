"""Inverted lists of a segment, memory-mapped by faiss, every byte checked before the first scan that reads it.

n entries, L lists of the version, B bytes of a code.
"""

from __future__ import annotations

import hashlib
import os
import uuid
import weakref
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from operators.artifact.deletions import read_deleted
from operators.artifact.list_run import RunReader
from operators.artifact.manifest import Segment
from operators.errors import IntegrityError
from operators.storage.checked import CheckedFile, ObjectEntry
from operators.storage.local_store import writing
from operators.storage.store import Store

Ints = npt.NDArray[np.int64]


def cache_folder() -> Path:
    """Where inverted lists of remote indices are kept: $VECTORMILL_CACHE, else the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vectormill"
    return Path(os.environ.get("VECTORMILL_CACHE", default))


def cached_path(entry: ObjectEntry) -> Path:
    """Where a copy of the object is kept, under the name of its SHA-256."""
    return cache_folder() / f"{entry.sha256}.lists"


def local_copy(store: Store, entry: ObjectEntry) -> Path:
    """Path of the object on this disk: itself, or a verified copy in the cache (named by its SHA-256)."""
    path = store.local_path(entry.key)
    if path is not None:
        if not path.exists() or path.stat().st_size != entry.size_bytes:
            found = f"{path.stat().st_size} bytes" if path.exists() else "nothing"
            raise IntegrityError(f"object {path} must hold {entry.size_bytes} bytes, found {found}")
        return path
    target = cached_path(entry)
    if target.exists() and target.stat().st_size == entry.size_bytes:
        return target
    temporary = target.with_suffix(f".{uuid.uuid4().hex}.tmp")  # others may fetch the same, on other machines too
    source = CheckedFile(store, entry, cache_bytes=entry.block_bytes)
    digest = hashlib.sha256()
    try:
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                for start in range(0, entry.size_bytes, 8 << 20):
                    data = source.read_range(start, start + (8 << 20))
                    digest.update(data)
                    file.write(data)
                file.flush()
                os.fsync(file.fileno())  # the name must never stand for less than all of it: it is taken by its size
        if digest.hexdigest() != entry.sha256:
            raise IntegrityError(f"object {store.url}/{entry.key} does not match its SHA-256")
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, target)
    return target


class MappedLists:
    """The lists object of one part, mapped as long as this object lives. The mapping outlives the file's name."""

    def __init__(self, store: Store, entry: ObjectEntry, reader: RunReader) -> None:
        import faiss

        self.reader = reader
        self._entry = entry
        self._path = local_copy(store, entry)
        self._is_copy = store.local_path(entry.key) is None
        self._name = f"{store.url}/{entry.key}"
        self._checked = np.zeros(len(entry.crc32), bool)
        width = entry.block_bytes
        with open(self._path, "rb") as file:  # faiss believes the header: it is checked before
            for number in range(-(-reader.payload_start // width)):
                self._check_block(number, file.read(width))
        self.faiss = faiss.downcast_InvertedLists(
            faiss.read_InvertedLists(faiss.FileIOReader(str(self._path)), faiss.IO_FLAG_MMAP)
        )
        # faiss.read_InvertedLists gives them to nobody: without this the file would stay mapped, and its disk taken, for ever.
        # Not by SWIG's own ownership, which the downcast object does not survive.
        unmapped = weakref.finalize(self, type(self.faiss).__swig_destroy__, self.faiss)
        unmapped.atexit = False
        self.faiss.prefetch_nthread = 0  # starting 32 threads a query costs more than the page faults they save
        self._bytes: npt.NDArray[np.uint8] = faiss.rev_swig_ptr(self.faiss.ptr, entry.size_bytes)

    def check_list(self, list_no: int) -> None:
        """Check the blocks that hold the list and have not been checked. Raises IntegrityError naming the object."""
        start, stop = self.reader.list_bytes(list_no)
        width = self._entry.block_bytes
        for number in range(start // width, -(-stop // width)):
            if not self._checked[number]:
                self._check_block(number, self._bytes[number * width : (number + 1) * width])

    def _check_block(self, number: int, block: Any) -> None:
        if zlib.crc32(block) != self._entry.crc32[number]:
            where = f"bytes {number * self._entry.block_bytes} to {number * self._entry.block_bytes + len(block)}"
            if self._is_copy:
                self._path.unlink(missing_ok=True)
                raise IntegrityError(
                    f"the copy {self._path} of object {self._name} was damaged: {where} do not match their checksum; it has been"
                    " deleted, open the index again to fetch another"
                )
            raise IntegrityError(
                f"object {self._name} is damaged: {where} do not match their checksum; restore the object from a copy, or build"
                " again with --fresh"
            )
        self._checked[number] = True

    def row_ids_of(self, entries_n: Ints) -> Ints:
        """Row ids int64 [n] of entries of this part."""
        address = self.reader.row_id_bytes(entries_n)
        eight = self._bytes[address[:, None] + np.arange(8)]  # ids are not aligned to their size
        return eight.view("<i8")[:, 0]


class MappedSegment:
    """A segment whose lists are mapped. `inverted_lists` is for faiss; its entries are numbered in list order."""

    def __init__(
        self,
        store: Store,
        segment: Segment,
        readers: Sequence[RunReader],
        entries: Sequence[ObjectEntry],
        first_entry: int,
    ) -> None:
        """first_entry: number of the segment's first entry in the version."""
        import faiss

        with ThreadPoolExecutor(8) as pool:  # lists of a remote index are fetched here
            self._files = list(pool.map(lambda entry, reader: MappedLists(store, entry, reader), entries, readers))
        self._stacked = faiss.InvertedListsPtrVector()
        for file in self._files:
            self._stacked.push_back(file.faiss)
        self.inverted_lists = faiss.VStackInvertedLists(self._stacked.size(), self._stacked.data())
        self.inverted_lists.referenced_objects = [self._files]  # it points into them: they must outlive it
        counts = [reader.facts["num_entries"] for reader in readers]
        self.part_starts = first_entry + np.concatenate([[0], np.cumsum(counts)])
        self._first_lists = np.array([reader.first_list for reader in readers])
        self.list_starts_L = np.concatenate(
            [reader.starts_L[:-1] + start for reader, start in zip(readers, self.part_starts, strict=False)]
        )
        # What turns a pair into an entry; the last is for -1, whose list is -1.
        pair_starts_L = np.arange(len(self.list_starts_L), dtype=np.int64) << 32
        self._from_pair_L1 = np.append(self.list_starts_L - pair_starts_L, 0)
        self.list_sizes_L = np.concatenate([np.diff(reader.starts_L) for reader in readers])
        self._checked_L = np.zeros(len(self.list_starts_L), bool)
        self._all_checked = False
        self.first_entry, self.end_entry = first_entry, first_entry + segment.num_rows
        self.num_rows, self.num_deleted, self.num_live = segment.num_rows, segment.num_deleted, segment.num_live
        self._first_row_id = segment.first_row_id
        self._deleted_bits: npt.NDArray[np.uint8] | None = None
        if segment.num_deleted:
            self._deleted_bits = np.packbits(read_deleted(store, segment), bitorder="little")
            self._deleted_n = np.zeros(segment.num_rows, bool)  # by entry, of the lists that were checked

    def check(self, list_no: Ints) -> None:
        """Check all that a scan of these lists (any shape) reads, and find which of their entries are deleted.

        Done once a list; afterwards it costs microseconds. Raises IntegrityError naming a damaged object.
        """
        if self._all_checked:
            return
        unchecked = list_no[~self._checked_L[list_no]]
        for one in np.unique(unchecked).tolist():
            part = int(np.searchsorted(self._first_lists, one, side="right")) - 1
            file = self._files[part]
            file.check_list(one)
            if self._deleted_bits is not None:
                starts_L, first_list = file.reader.starts_L, file.reader.first_list
                local = np.arange(starts_L[one - first_list], starts_L[one - first_list + 1])
                at = local + (self.part_starts[part] - self.first_entry)
                self._deleted_n[at] = self._is_deleted(file.row_ids_of(local))
            self._checked_L[one] = True

    def check_all(self) -> None:
        """Check all lists; afterwards `check` costs nothing."""
        self.check(np.arange(len(self._checked_L)))
        self._all_checked = True

    def check_deleted(self) -> None:
        """Find all deleted entries, so that `live` can be asked of any."""
        if self._deleted_bits is not None:
            self.check_all()

    def _is_deleted(self, row_ids_n: Ints) -> npt.NDArray[np.bool_]:
        assert self._deleted_bits is not None
        place = row_ids_n - self._first_row_id
        if len(place) and (place.min() < 0 or place.max() >= self.num_rows):
            raise IntegrityError(
                f"{self._files[0].reader.name}: row ids {row_ids_n.min()}..{row_ids_n.max()} do not belong to their segment"
                f" ({self._first_row_id}..{self._first_row_id + self.num_rows - 1}); run `vectormill verify`"
            )
        return (self._deleted_bits[place >> 3] >> (place & 7).astype(np.uint8)) & 1 == 1

    def entries_of(self, pairs: Ints) -> Ints:
        """Entry numbers of faiss's list_no << 32 | offset (any shape), which the place in the lists is; -1 stays."""
        return pairs + self._from_pair_L1[pairs >> 32]

    def live(self, entries: Ints) -> npt.NDArray[np.bool_]:
        """Which of the entries (any shape, of lists that were checked) are not deleted; False for -1."""
        present = entries >= 0
        if self._deleted_bits is None:
            return present
        return present & ~self._deleted_n[np.where(present, entries - self.first_entry, 0)]

    def row_ids_of(self, entries_n: Ints) -> Ints:
        """Row ids int64 [n] of entries int64 [n]."""
        self.check(np.searchsorted(self.list_starts_L, entries_n, side="right") - 1)
        out = np.empty(len(entries_n), np.int64)
        part_no = np.searchsorted(self.part_starts, entries_n, side="right") - 1
        for part in np.unique(part_no).tolist():
            places = np.flatnonzero(part_no == part)
            out[places] = self._files[part].row_ids_of(entries_n[places] - self.part_starts[part])
        return out

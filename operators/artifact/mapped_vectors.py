"""Stored vectors of a part, memory-mapped: what a search scores again is read where it lies, every block checked once.

n entries of the part, d dimensions.
"""

from __future__ import annotations

import mmap
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from operators.errors import IntegrityError
from operators.storage.checked import ObjectEntry


class MappedVectors:
    """The vectors object of one part. The mapping outlives the file's name. Only `check` changes anything, and repeats well."""

    def __init__(self, path: Path, entry: ObjectEntry, num_rows: int, d: int, *, is_copy: bool = False) -> None:
        """is_copy: of a remote object, in the cache; when it is found damaged it is deleted there. Raises IntegrityError when the file is not as long as its entry says."""
        self._path = path
        self._is_copy = is_copy
        self._entry = entry
        self._row_bytes = 2 * d
        self._start = entry.size_bytes - num_rows * self._row_bytes
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            if size != entry.size_bytes:
                raise IntegrityError(f"object {path} must hold {entry.size_bytes} bytes, found {size}")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._map.madvise(mmap.MADV_RANDOM)  # candidates lie apart: what is beside them is not wanted
        self._checked = np.zeros(len(entry.crc32), bool)
        self._all_checked = False
        self.vectors_nd: npt.NDArray[np.float16] = np.frombuffer(
            self._map, "<f2", count=num_rows * d, offset=self._start
        ).reshape(num_rows, d)

    def check(self, positions: npt.NDArray[np.int64]) -> None:
        """Check the blocks that hold these entries (any shape, -1: none) and have not been checked.

        Raises IntegrityError naming the object.
        """
        if self._all_checked:
            return
        positions = positions[positions >= 0]
        if not len(positions):
            return
        first = (self._start + positions * self._row_bytes) // self._entry.block_bytes
        last = (self._start + (positions + 1) * self._row_bytes - 1) // self._entry.block_bytes
        if self._checked[first].all() and self._checked[last].all():
            return
        for number in np.unique(np.concatenate([first, last])).tolist():
            if not self._checked[number]:
                self._check_block(number)

    def check_all(self) -> None:
        """Check every block; afterwards `check` costs nothing."""
        for number in np.flatnonzero(~self._checked).tolist():
            self._check_block(number)
        self._all_checked = True

    def _check_block(self, number: int) -> None:
        begin = number * self._entry.block_bytes
        end = min(begin + self._entry.block_bytes, self._entry.size_bytes)
        if zlib.crc32(memoryview(self._map)[begin:end]) != self._entry.crc32[number]:
            if self._is_copy:
                self._path.unlink(missing_ok=True)
                raise IntegrityError(
                    f"the copy {self._path} of the object {self._entry.key} was damaged: bytes {begin} to {end} do not match"
                    " their checksum; it has been deleted, open the index again to fetch another"
                )
            raise IntegrityError(
                f"object {self._path} is damaged: bytes {begin} to {end} do not match their checksum; restore the object from"
                " a copy, or build again with --fresh"
            )
        self._checked[number] = True

"""Rows of the row store by their entries, from decoded row groups: those used last are kept, up to a number of bytes.

A row group is about 512 rows. Decoding one takes most of a millisecond; a row of a decoded one about a microsecond a column.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from operators.artifact.list_run import RunReader
from operators.errors import IntegrityError

VALUE_BYTES = 64  # of a listed value, about: its object, and its place in the list


class RowGroups:
    """Row store of the parts of a version. Not thread-safe. `held_bytes` is what is kept."""

    def __init__(
        self, parts: Sequence[RunReader], max_bytes: int, drop_copy: Callable[[int], bool] = lambda part: False
    ) -> None:
        """drop_copy: called with a part whose rows are damaged; whether they were a copy, which has been deleted."""
        self._parts = parts
        self._max_bytes = max_bytes
        self._drop_copy = drop_copy
        self._kept: OrderedDict[tuple[int, int, tuple[str, ...]], _RowGroup] = OrderedDict()
        self.held_bytes = 0
        self._found = 0
        self._read = 0

    def take_counts(self) -> tuple[int, int]:
        """How many row groups were asked for since the last call: found among those that are kept, and read."""
        counts = self._found, self._read
        self._found = self._read = 0
        return counts

    def rows(self, part: int, entries: npt.NDArray[np.int64], columns: tuple[str, ...]) -> list[dict[str, Any]]:
        """These columns of entries int64 [n] of one part, numbered within it, in their order. Raises IntegrityError."""
        with self._dropping_damaged(part):
            return self._rows(part, entries, columns)

    def warm(self, columns: tuple[str, ...]) -> None:
        """Decode row groups, from the first on, as long as there seems to be room for one more. Raises IntegrityError."""
        room_for = 0
        for part, reader in enumerate(self._parts):
            with self._dropping_damaged(part):
                for number in range(len(reader.row_group_starts) - 1):
                    if self.held_bytes + room_for > self._max_bytes:
                        return
                    if (part, number, columns) not in self._kept:
                        room_for = self._keep((part, number, columns)).nbytes

    @contextmanager
    def _dropping_damaged(self, part: int) -> Iterator[None]:
        try:
            yield
        except IntegrityError as error:
            if self._drop_copy(part):
                raise IntegrityError(
                    f"{error} (this was its copy in the cache: it has been deleted, open the index again to fetch another)"
                ) from error
            raise

    def _rows(self, part: int, entries: npt.NDArray[np.int64], columns: tuple[str, ...]) -> list[dict[str, Any]]:
        starts = self._parts[part].row_group_starts
        numbers = np.searchsorted(starts, entries, side="right") - 1
        places = entries - starts[numbers]
        out = []
        for number, place in zip(numbers.tolist(), places.tolist(), strict=True):
            group = self._group(part, number, columns)
            out.append({name: column[place] for name, column in group.columns})
        return out

    def _group(self, part: int, number: int, columns: tuple[str, ...]) -> _RowGroup:
        key = part, number, columns
        group = self._kept.get(key)
        if group is not None:
            self._found += 1
            self._kept.move_to_end(key)
            return group
        self._read += 1
        return self._keep(key)

    def _keep(self, key: tuple[int, int, tuple[str, ...]]) -> _RowGroup:
        part, number, columns = key
        group = _RowGroup(self._parts[part].read_row_group(number, columns))
        self._kept[key] = group
        self.held_bytes += group.nbytes
        while self.held_bytes > self._max_bytes and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self.held_bytes -= dropped.nbytes
        return group


class _RowGroup:
    """Columns whose values can be taken one by one without a detour over Arrow's scalars."""

    def __init__(self, table: pa.Table) -> None:
        self.nbytes = table.nbytes
        self.columns: list[tuple[str, Any]] = []
        for name in table.column_names:
            array = _one_array(table.column(name))
            if array.type in (pa.string(), pa.large_string()) and not array.null_count:
                self.columns.append((name, _Strings(array)))
            else:
                is_whole = pa.types.is_integer(array.type) and not array.null_count
                values = array.to_numpy().tolist() if is_whole else array.to_pylist()
                self.nbytes += VALUE_BYTES * len(values)
                self.columns.append((name, values))


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    combined = column.combine_chunks()
    return pa.concat_arrays(combined.chunks) if isinstance(combined, pa.ChunkedArray) else combined


class _Strings:
    """A column of strings, each decoded when it is asked for."""

    def __init__(self, array: pa.Array) -> None:
        _, offsets, data = array.buffers()
        self._offsets = memoryview(offsets).cast("B").cast("q" if pa.types.is_large_string(array.type) else "i")
        self._first = array.offset
        self._data = memoryview(data if data is not None else b"")

    def __getitem__(self, place: int) -> str:
        place += self._first
        return str(self._data[self._offsets[place] : self._offsets[place + 1]], "utf-8")

"""Entries of very many objects in two arrays: tasks of one node share them, where lists of entries would be copied into each."""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np

from operators.storage.checked import ObjectEntry


class PackedEntries:
    """Entry i is made when it is asked for. A checksum of a block takes 5 bytes, 40 in an ObjectEntry."""

    def __init__(self, entries: Iterable[ObjectEntry]) -> None:
        packed = [json.dumps(entry.to_json()).encode() for entry in entries]
        self._bytes = np.frombuffer(b"".join(packed), np.uint8)
        self._ends = np.cumsum([0, *(len(one) for one in packed)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: int) -> ObjectEntry:
        """Raises IndexError beyond the last."""
        if not 0 <= number < len(self):
            raise IndexError(f"there are {len(self)} entries, asked for number {number}")
        data = self._bytes[self._ends[number] : self._ends[number + 1]].tobytes()
        return ObjectEntry.from_json(json.loads(data))

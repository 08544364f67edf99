"""Objects with checksums: written once with a SHA-256 and a CRC-32 per block, read back in verified blocks.

One mechanism for every format: a ranged read of any length is checked against the CRCs of the blocks that it touches,
and a whole read against the SHA-256. So a flipped bit is found where it is read, whatever lies in the file.
"""

from __future__ import annotations

import base64
import hashlib
import io
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from operators.errors import IntegrityError
from operators.storage.store import Store
from operators.storage.traffic import count

BLOCK_BYTES = 64 << 10
# Bytes that do not match are read again before the object is called damaged: they may have been damaged on their way.
FETCH_ATTEMPTS = 3
# Published objects are deleted by gc alone, with the last version that names them.
GONE_ADVICE = (
    "; if `vectormill gc` removed the version that it belongs to, open the index again: that reads the published one"
)


@dataclass(frozen=True)
class ObjectEntry:
    """An immutable object and what its bytes must be. `crc32` holds one checksum per block of `block_bytes`."""

    key: str
    size_bytes: int
    sha256: str
    block_bytes: int
    crc32: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; the checksums as base64 of little-endian uint32."""
        packed = base64.b64encode(np.asarray(self.crc32, dtype="<u4").tobytes()).decode()
        return {
            "key": self.key,
            "size_bytes": self.size_bytes,
            "sha256": self.sha256,
            "block_bytes": self.block_bytes,
            "crc32": packed,
        }

    @staticmethod
    def from_json(fields: dict[str, Any]) -> ObjectEntry:
        """Inverse of `to_json`."""
        crc32 = np.frombuffer(base64.b64decode(fields["crc32"]), dtype="<u4")
        return ObjectEntry(
            fields["key"], fields["size_bytes"], fields["sha256"], fields["block_bytes"], tuple(crc32.tolist())
        )


class CheckedWriter(io.RawIOBase):
    """Write-only file that computes the entry of the object while its bytes pass through. Used by `write_checked`."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self._stream = stream
        self._sha256 = hashlib.sha256()
        self._crc32: list[int] = []
        self._running, self._in_block = 0, 0
        self._size = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._stream.write(view)
        self._sha256.update(view)
        self._size += len(view)
        position = 0
        while position < len(view):
            step = min(BLOCK_BYTES - self._in_block, len(view) - position)
            self._running = zlib.crc32(view[position : position + step], self._running)
            self._in_block += step
            position += step
            if self._in_block == BLOCK_BYTES:
                self._end_block()
        return len(view)

    def _end_block(self) -> None:
        self._crc32.append(self._running)
        self._running, self._in_block = 0, 0

    def entry(self, key: str) -> ObjectEntry:
        """The entry of all bytes written. Call once, at the end."""
        if self._in_block:
            self._end_block()
        return ObjectEntry(key, self._size, self._sha256.hexdigest(), BLOCK_BYTES, tuple(self._crc32))


class PendingObject:
    """What `write_checked` yields: `file` to write to; `entry` once the block has ended."""

    def __init__(self, file: CheckedWriter) -> None:
        self.file = file
        self.entry: ObjectEntry | None = None


@contextmanager
def write_checked(store: Store, key: str) -> Iterator[PendingObject]:
    """Write a new object: visible and durable when the block ends without an exception, else discarded."""
    stream = store.open_stream(key)
    pending = PendingObject(CheckedWriter(stream))
    try:
        yield pending
        stream.commit()
    except BaseException:
        stream.discard()
        raise
    pending.entry = pending.file.entry(key)


def put_checked(store: Store, key: str, data: bytes) -> ObjectEntry:
    """Write `data` as a new object and return its entry."""
    with write_checked(store, key) as pending:
        pending.file.write(data)
    assert pending.entry is not None
    return pending.entry


class CheckedFile(io.RawIOBase):
    """Read-only, seekable view of an object; every block is verified when it is first fetched.

    Keeps up to `cache_bytes` of verified blocks (least recently used out first). Not thread-safe: one a thread.
    Raises IntegrityError naming the object for a missing, truncated or damaged one.
    """

    def __init__(self, store: Store, entry: ObjectEntry, cache_bytes: int = 32 << 20) -> None:
        super().__init__()
        self._name = f"{store.url}/{entry.key}"
        self.entry = entry
        size = store.size_bytes(entry.key)
        if size is None:
            raise IntegrityError(
                f"object {self._name} is missing; it should hold {entry.size_bytes} bytes{GONE_ADVICE}"
            )
        if size != entry.size_bytes:
            raise IntegrityError(f"object {self._name} must hold {entry.size_bytes} bytes, found {size}")
        self._read_range = store.reader(entry.key)
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._capacity = max(1, cache_bytes // entry.block_bytes)
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.entry.size_bytes}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def size(self) -> int:
        """Size in bytes (pyarrow asks for it)."""
        return self.entry.size_bytes

    def read(self, size: int | None = -1) -> bytes:
        stop = self.entry.size_bytes if size is None or size < 0 else self._position + size
        data = self.read_range(self._position, stop)
        self._position += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self.read(-1)

    def read_range(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), cut at the object's end."""
        stop = min(stop, self.entry.size_bytes)
        if start >= stop:
            return b""
        width = self.entry.block_bytes
        first, last = start // width, (stop - 1) // width
        blocks = self._verified(first, last + 1)
        joined = b"".join(blocks) if len(blocks) > 1 else blocks[0]
        return joined[start - first * width : stop - first * width]

    def _verified(self, first: int, end: int) -> list[bytes]:
        """Blocks [first, end), fetched where they are not cached with one read per run of missing ones."""
        found: dict[int, bytes] = {}
        block = first
        while block < end:
            if block in self._blocks:
                self._blocks.move_to_end(block)
                found[block] = self._blocks[block]
                block += 1
                continue
            run_end = block + 1
            while run_end < end and run_end not in self._blocks:
                run_end += 1
            found |= self._fetch(block, run_end)
            block = run_end
        for number in range(max(first, end - self._capacity), end):
            self._blocks[number] = found[number]
        while len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)
        return [found[number] for number in range(first, end)]

    def _fetch(self, first: int, end: int) -> dict[int, bytes]:
        width = self.entry.block_bytes
        for _ in range(FETCH_ATTEMPTS):
            try:
                data = self._read_range(first * width, min(end * width, self.entry.size_bytes))
            except FileNotFoundError:
                raise IntegrityError(f"object {self._name} went missing while it was read{GONE_ADVICE}") from None
            view = memoryview(data)
            blocks = {n: bytes(view[(n - first) * width : (n - first + 1) * width]) for n in range(first, end)}
            bad = [n for n, block in blocks.items() if zlib.crc32(block) != self.entry.crc32[n]]
            if not bad:
                return blocks
            count(retries=1)
        raise IntegrityError(
            f"object {self._name} is damaged: bytes {bad[0] * width} to {bad[0] * width + len(blocks[bad[0]])}"
            " do not match their checksum; restore the object from a copy, or build again with --fresh"
        )


def verify_object(store: Store, entry: ObjectEntry, step_bytes: int = 8 << 20) -> None:
    """Read the whole object and compare size, block checksums and SHA-256. Raises IntegrityError naming it."""
    file = CheckedFile(store, entry, cache_bytes=entry.block_bytes)
    digest = hashlib.sha256()
    for start in range(0, entry.size_bytes, step_bytes):
        digest.update(file.read_range(start, start + step_bytes))
    if digest.hexdigest() != entry.sha256:
        raise IntegrityError(
            f"object {store.url}/{entry.key} has SHA-256 {digest.hexdigest()}, its record says {entry.sha256}"
        )

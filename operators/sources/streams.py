"""Bytes of source objects: opened with a check that they are the listed ones, decompressed, cut into lines."""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pyarrow as pa

from operators.errors import SourceError
from operators.sources.failures import check_unchanged, reading
from operators.sources.listing import SourceObject
from operators.sources.read_config import MAX_LINE_BYTES
from operators.storage.filesystem import filesystem_for, is_local
from operators.storage.traffic import open_counted

CHUNK_BYTES = 1 << 20


@contextmanager
def opened(obj: SourceObject, read_ahead: bool = False) -> Iterator[Any]:
    """Seekable binary file of the object's stored bytes; the object is compared with its listing before and after.

    `read_ahead` makes large requests for sequential reading. Failures to open become SourceErrors;
    wrap reads in `reading(obj)`.
    """
    fs, path = filesystem_for(obj.uri)
    check_unchanged(obj)
    with ExitStack() as stack:
        with reading(obj):
            if is_local(fs):
                file = stack.enter_context(open_counted(path))
            else:
                # s3fs sends If-Match with every ranged read, so one open file never mixes two versions.
                cache = "readahead" if read_ahead else "none"
                file = stack.enter_context(fs.open(path, "rb", cache_type=cache, block_size=8 << 20))
        yield file
    check_unchanged(obj)


@contextmanager
def decompressed(obj: SourceObject) -> Iterator[Any]:
    """Binary file of the object's decompressed bytes, to be read from front to back.

    Reading to the end verifies gzip's CRC and zstd's frame: a truncated or damaged object raises there.
    """
    if obj.compression and obj.size_bytes == 0:
        raise SourceError(
            f"source object {obj.uri} is truncated: it has 0 bytes, which is no {obj.compression} stream;"
            " repair or remove it"
        )
    with opened(obj, read_ahead=True) as file:
        if obj.compression == "gzip":
            with gzip.GzipFile(fileobj=file) as stream:
                yield stream
        elif obj.compression == "zstd":
            with reading(obj):
                stream = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")
            yield stream
        else:
            yield file


def chunks(obj: SourceObject, file: Any, first_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
    """The rest of `file` in chunks; the first of `first_bytes`. Failures become SourceErrors naming `obj`."""
    size = first_bytes
    while True:
        with reading(obj):
            chunk = file.read(size)
        if not chunk:
            return
        yield bytes(chunk)
        size = CHUNK_BYTES


def lines(data: Iterable[bytes], first: int = 0, limit: int = MAX_LINE_BYTES) -> Iterator[tuple[int, bytes | None]]:
    """(offset, bytes without the newline) of each line; None for a line of more than `limit` bytes.

    `first` is the offset of the first chunk. Only b"\\n" ends a line: U+2028 and the like are ordinary characters.
    """
    begin, held, held_bytes = first, list[bytes](), 0
    for chunk in data:
        parts = chunk.split(b"\n")
        for part in parts[:-1]:
            length = held_bytes + len(part)
            yield begin, (b"".join([*held, part]) if length <= limit else None)
            begin, held, held_bytes = begin + length + 1, [], 0
        held_bytes += len(parts[-1])
        if held_bytes > limit:
            held.clear()
        else:
            held.append(parts[-1])
    if held_bytes:
        yield begin, (b"".join(held) if held_bytes <= limit else None)


def lines_of_range(obj: SourceObject, file: Any, start: int, end: int) -> Iterator[tuple[int, bytes | None]]:
    """(offset, line) of the lines that begin in [start, end). Ranges that cover the object yield every line once."""
    # The line that begins at `start` is known by the newline before it.
    first = max(0, start - 1)
    with reading(obj):
        file.seek(first)
    found = lines(chunks(obj, file, first_bytes=end - first), first)
    if start > 0:
        next(found, None)
    for offset, line in found:
        if offset >= end:
            return
        yield offset, line

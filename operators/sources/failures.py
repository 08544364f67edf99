"""What reading a source object may raise, and its translation into one clear SourceError."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import aiohttp
import pyarrow as pa
from botocore.exceptions import BotoCoreError, ClientError

from operators.errors import SourceChangedError, SourceError
from operators.storage.filesystem import etag_of, filesystem_for

if TYPE_CHECKING:
    from operators.sources.listing import SourceObject

# OSError covers bad gzip and zstd data and most of what s3fs raises; the others come from below it.
READ_FAILURES = (OSError, EOFError, zlib.error, pa.ArrowException, BotoCoreError, ClientError, aiohttp.ClientError)


@contextmanager
def reading(obj: SourceObject) -> Iterator[None]:
    """Turns any failure to read `obj` in the block into a SourceError that names it.

    A change of the object explains a failure better than its symptom, so that is looked for first.
    """
    try:
        yield
    except READ_FAILURES as error:
        check_unchanged(obj)
        kind = f"{obj.compression} " if obj.compression else ""
        reason = " ".join(str(error).split())[:300] or "no details"
        raise SourceError(
            f"source object {obj.uri} ({kind}{obj.format}, {obj.size_bytes} bytes) is truncated, damaged or unreadable:"
            f" {type(error).__name__}: {reason}; repair or remove the object, then run again"
        ) from error


def check_unchanged(obj: SourceObject) -> None:
    """Raises SourceChangedError unless `obj` still is the object that was listed."""
    fs, path = filesystem_for(obj.uri)
    try:
        etag = etag_of(fs.info(path))
    except FileNotFoundError:
        raise SourceChangedError(
            f"source object {obj.uri} has vanished since it was listed; put it back,"
            " or run again to list the sources anew"
        ) from None
    except READ_FAILURES as error:
        raise SourceError(f"source object {obj.uri} cannot be read: {type(error).__name__}: {error}") from error
    if etag != obj.etag:
        raise SourceChangedError(
            f"source object {obj.uri} has changed since it was listed (etag {obj.etag} then, {etag} now);"
            " run again to list the sources anew, and do not write to a corpus while it is read"
        )

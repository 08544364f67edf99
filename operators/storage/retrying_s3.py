"""S3 file system with one policy for transient failures: every request is tried until a deadline, its body included.

s3fs and botocore each have retries of their own: together up to 40 attempts of up to a minute, none of them for a body that
breaks off. Here both are off. A request is repeated after a growing, random pause while its failure is one that passes;
what is given up names the object, the time and the last failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
import time
from typing import Any

import aiohttp
from botocore.exceptions import (
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError
from botocore.parsers import ResponseParserError
from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem

from operators.storage.traffic import count

# No attempt of a request begins later than this after the first one.
REQUEST_DEADLINE_S = 120.0
# Nothing answers at the endpoint at all: more often a wrong address than an outage.
UNREACHABLE_DEADLINE_S = 30.0
# After a request was given up, until one succeeds: whoever asks for a thousand objects does not wait for each.
DOWN_DEADLINE_S = 5.0
# One attempt, its body included. The most that a request can take is a deadline and this.
ATTEMPT_TIMEOUT_S = 90.0
BACKOFF_S = 0.1
MAX_BACKOFF_S = 10.0

TRANSIENT_STATUS = {408, 429, 500, 502, 503, 504}
TRANSIENT_CODES = {
    # Also in the body of an answer with status 200 (CompleteMultipartUpload, DeleteObjects).
    "InternalError",
    "ServiceUnavailable",
    "SlowDown",
    "RequestTimeout",
    "RequestLimitExceeded",
    "BandwidthLimitExceeded",
    "Throttling",
    "ThrottlingException",
    # The request's body was damaged or cut on its way.
    "BadDigest",
    "IncompleteBody",
    "XAmzContentSHA256Mismatch",
    # Another write of the key was under way; repeated, a conditional put gets a plain yes or no.
    "ConditionalRequestConflict",
    "OperationAborted",
}
_TRANSIENT = (
    aiohttp.ClientError,
    BotoConnectionError,
    ConnectionError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    ResponseParserError,
    TimeoutError,
    asyncio.IncompleteReadError,
)
_UNREACHABLE = (EndpointConnectionError, ConnectTimeoutError)


class StorageUnavailableError(OSError):
    """Requests for an object kept failing until the deadline. `filename` is its URL."""


class _WholeBody:
    """A response body that was read to its end."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def read(self, size: int = -1) -> bytes:
        data = self._data if size < 0 else self._data[:size]
        self._data = self._data[len(data) :]
        return data

    def close(self) -> None:
        """Nothing to close."""

    async def __aenter__(self) -> _WholeBody:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.close()


class RetryingS3FileSystem(S3FileSystem):
    """s3fs under this module's policy. Bodies of `get_object` arrive whole and checked for length."""

    retries = 1
    _down = False

    async def _call_s3(self, method: str, *option_sets: Any, **options: Any) -> Any:
        started = time.monotonic()
        deadline_s = DOWN_DEADLINE_S if self._down else REQUEST_DEADLINE_S
        attempt = 0
        while True:
            count(requests=1, retries=1 if attempt else 0)
            try:
                async with asyncio.timeout(ATTEMPT_TIMEOUT_S):
                    answer = await super()._call_s3(method, *option_sets, **options)
                    if method == "get_object":
                        data = await _whole_body(answer, options)
                        answer["Body"] = _WholeBody(data)
                        count(bytes_read=len(data))
                self._down = False
                count(bytes_written=len(options["Body"]) if isinstance(options.get("Body"), bytes) else 0)
                return answer
            except Exception as error:
                if not is_transient(error):
                    raise
                attempt += 1
                pause = random.uniform(0, min(MAX_BACKOFF_S, BACKOFF_S * 2**attempt))
                spent = time.monotonic() - started
                limit = min(deadline_s, UNREACHABLE_DEADLINE_S) if isinstance(error, _UNREACHABLE) else deadline_s
                if spent + pause > limit:
                    self._down = True
                    raise _given_up(error, method, options, attempt, spent) from _client_error(error)
            await asyncio.sleep(pause)

    # s3fs binds its own at class creation.
    call_s3 = sync_wrapper(_call_s3)


def is_transient(error: BaseException) -> bool:
    """Whether the failure of a request may pass: throttling, 5xx, a broken connection, a timeout, a damaged body."""
    answered = _client_error(error)
    if not isinstance(answered, ClientError):
        return isinstance(error, _TRANSIENT) and not isinstance(error, StorageUnavailableError)
    status = answered.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status in TRANSIENT_STATUS or answered.response.get("Error", {}).get("Code") in TRANSIENT_CODES


def _client_error(error: BaseException) -> BaseException:
    """The server's answer behind an error that s3fs translated, else the error itself."""
    return error.__cause__ if isinstance(error.__cause__, ClientError) else error


async def _whole_body(answer: Any, options: dict[str, Any]) -> bytes:
    """All bytes of the answer. Raises ConnectionError when they are fewer than the server said, or than were asked for."""
    async with answer["Body"] as stream:
        data = bytes(await stream.read())
    expected = answer.get("ContentLength", len(data))
    if "Range" in options and answer.get("ContentRange"):
        # "bytes 0-99/1000": what the store sent; the length is of what arrived, wherever it was shortened.
        first, _, last = answer["ContentRange"].removeprefix("bytes ").partition("/")[0].partition("-")
        expected = int(last) - int(first) + 1
    if len(data) != expected:
        raise ConnectionError(f"a body of {expected} bytes broke off after {len(data)}")
    return data


def _given_up(
    error: BaseException, method: str, options: dict[str, Any], attempts: int, spent_s: float
) -> StorageUnavailableError:
    place = "/".join(str(options[name]) for name in ("Bucket", "Key") if name in options)
    if "Prefix" in options:
        place += f"/{options['Prefix']}"
    reason = " ".join(str(error).split()) or type(error).__name__
    with contextlib.suppress(AttributeError, KeyError):
        reason = f"{_client_error(error).response['Error']['Code']}: {reason}"  # type: ignore[attr-defined]
    return StorageUnavailableError(
        errno.EIO,
        f"{method} failed {attempts} time(s) within {spent_s:.0f} s, at last with {reason}",
        f"s3://{place}",
    )

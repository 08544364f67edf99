"""A store on S3, through s3fs: conditional puts where the server honours them, a claim protocol where it does not."""

from __future__ import annotations

import contextlib
import hashlib
import random
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from email.utils import parsedate_to_datetime
from typing import Any

from fsspec.asyn import sync

from operators.errors import ResourceError
from operators.storage.retrying_s3 import TRANSIENT_CODES
from operators.storage.store import Store, StoredObject

CLAIM_STALE_S = 60.0
CLAIM_DEADLINE_S = 120.0
DELETE_AT_ONCE = 1000  # the most that S3 takes
DELETE_ATTEMPTS = 5
PART_BYTES = 16 << 20
_PART_CHECKSUMS = {"ChecksumCRC32", "ChecksumCRC32C", "ChecksumCRC64NVME", "ChecksumSHA1", "ChecksumSHA256"}
_PRECONDITION_CODES = {"PreconditionFailed", "412"}
_UNSUPPORTED_CODES = {"NotImplemented", "InvalidArgument", "501"}


# What the probe found of a file system's bucket: stores are opened anew in every task, buckets do not change.
_CONDITIONAL: dict[tuple[Any, str], bool] = {}


class _S3Stream:
    """A new object: one put, or a multipart upload once there is more than PART_BYTES. Visible by commit() only."""

    def __init__(self, fs: Any, bucket: str, key: str) -> None:
        self._fs = fs
        self._place = {"Bucket": bucket, "Key": key}
        self._buffer = bytearray()
        self._upload: str | None = None
        self._parts: list[dict[str, Any]] = []
        self._size = 0

    def write(self, data: bytes) -> int:
        self._buffer += data
        self._size += len(data)
        while len(self._buffer) > PART_BYTES:
            self._send_part()
        return len(data)

    def _send_part(self) -> None:
        if self._upload is None:
            self._upload = str(self._fs.call_s3("create_multipart_upload", **self._place)["UploadId"])
        body = bytes(self._buffer[:PART_BYTES])
        number = len(self._parts) + 1
        answer = self._fs.call_s3("upload_part", **self._place, UploadId=self._upload, PartNumber=number, Body=body)
        checksums = {name: value for name, value in answer.items() if name in _PART_CHECKSUMS}
        self._parts.append({"PartNumber": number, "ETag": answer["ETag"], **checksums})
        del self._buffer[:PART_BYTES]

    def commit(self) -> None:
        if self._upload is None:
            self._fs.call_s3("put_object", **self._place, Body=bytes(self._buffer))
            return
        if self._buffer:
            self._send_part()
        parts = {"Parts": self._parts}
        try:
            self._fs.call_s3("complete_multipart_upload", **self._place, UploadId=self._upload, MultipartUpload=parts)
        except FileNotFoundError:  # no such upload: completed by a request whose answer was lost
            if self._found_size() != self._size:
                raise
        self._upload = None

    def _found_size(self) -> int | None:
        try:
            return int(self._fs.call_s3("head_object", **self._place)["ContentLength"])
        except FileNotFoundError:
            return None

    def discard(self) -> None:
        if self._upload is not None:
            with contextlib.suppress(Exception):  # a bucket's lifecycle rule removes what cannot be aborted now
                self._fs.call_s3("abort_multipart_upload", **self._place, UploadId=self._upload)


class S3Store(Store):
    """A prefix of a bucket, through s3fs."""

    def __init__(self, url: str, fs: Any, path: str) -> None:
        super().__init__(url)
        self._fs = fs
        self._base = path
        self._bucket, _, self._prefix = path.partition("/")
        self._conditional: bool | None = None

    def _path(self, key: str) -> str:
        return f"{self._base}/{key}"

    def read(self, key: str) -> bytes:
        return bytes(self._fs.cat_file(self._path(key)))

    def reader(self, key: str) -> Callable[[int, int], bytes]:
        path = self._path(key)

        def read_range(start: int, stop: int) -> bytes:
            return bytes(self._fs.cat_file(path, start=start, end=stop))

        return read_range

    def size_bytes(self, key: str) -> int | None:
        try:
            return int(self._fs.info(self._path(key))["size"])
        except FileNotFoundError:
            return None

    def list_keys(self, prefix: str) -> list[str]:
        found = self._fs.find(self._path(prefix))
        return sorted(path[len(self._base) + 1 :] for path in found)

    def list_objects(self, prefix: str) -> list[StoredObject]:
        found = self._fs.find(self._path(prefix), detail=True)
        return sorted(
            (
                StoredObject(path[len(self._base) + 1 :], int(info["size"]), info["LastModified"].timestamp())
                for path, info in found.items()
            ),
            key=lambda found: found.key,
        )

    def clock(self) -> float:
        answer = self._fs.call_s3("list_objects_v2", Bucket=self._bucket, Prefix=f"{self._prefix}/", MaxKeys=1)
        said = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        return parsedate_to_datetime(said).timestamp() if said else time.time()

    def put(self, key: str, data: bytes) -> None:
        self._fs.pipe_file(self._path(key), data)

    def _put_conditionally(self, key: str, data: bytes, **condition: str) -> bool:
        """One put_object with If-None-Match or If-Match. False when the condition did not hold."""
        try:
            self._fs.call_s3("put_object", Bucket=self._bucket, Key=f"{self._prefix}/{key}", Body=data, **condition)
        except FileNotFoundError:
            return False  # If-Match on a key that is gone
        except OSError as error:
            if isinstance(error, FileExistsError) or _error_code(error) in _PRECONDITION_CODES:
                return False
            raise
        return True

    @property
    def conditional(self) -> bool:
        """Whether this store honours conditional puts: probed once a process and bucket, by really trying."""
        known = (self._fs, self._bucket)
        if self._conditional is None:
            self._conditional = _CONDITIONAL.get(known)
        if self._conditional is None:
            key = f".probe/{uuid.uuid4().hex}"
            # An unconditional put first: a conditional one whose answer was lost would look like a refused one.
            self.put(key, b"1")
            try:
                self._conditional = not self._put_conditionally(key, b"2", IfNoneMatch="*")
            except OSError as error:
                if _error_code(error) not in _UNSUPPORTED_CODES:
                    raise
                self._conditional = False
            self.delete(key)
            _CONDITIONAL[known] = self._conditional
        return self._conditional

    def put_if_absent(self, key: str, data: bytes) -> bool:
        if self.conditional:
            return self._put_conditionally(key, data, IfNoneMatch="*")
        with self._claim(key):
            if self.size_bytes(key) is not None:
                return False
            self.put(key, data)
            return True

    def read_tagged(self, key: str) -> tuple[bytes, str] | None:
        try:
            answer = self._fs.call_s3("get_object", Bucket=self._bucket, Key=f"{self._prefix}/{key}")
        except FileNotFoundError:
            return None
        return bytes(sync(self._fs.loop, answer["Body"].read)), str(answer["ETag"])

    def replace_if(self, key: str, data: bytes, tag: str | None) -> bool:
        if self.conditional:
            condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}
            return self._put_conditionally(key, data, **condition)
        with self._claim(key):
            found = self.read_tagged(key)
            if (found[1] if found else None) != tag:
                return False
            self.put(key, data)
            return True

    @contextlib.contextmanager
    def _claim(self, key: str) -> Iterator[None]:
        """Mutual exclusion on `key` for stores without conditional puts.

        Write a claim, then list the claims: with strongly consistent listings at least one of two contenders sees both
        and withdraws, so two never hold the key together. A claim older than CLAIM_STALE_S (by the store's own clock)
        is a dead process's and is removed.
        """
        folder = f".claims/{hashlib.sha256(key.encode()).hexdigest()[:32]}"
        name = uuid.uuid4().hex
        deadline = time.monotonic() + CLAIM_DEADLINE_S
        while True:
            self.put(f"{folder}/{name}", key.encode())
            entries = self._fs.find(self._path(folder), detail=True)
            modified = {path.rsplit("/", 1)[1]: info["LastModified"] for path, info in entries.items()}
            others = {other: at for other, at in modified.items() if other != name}
            if name in modified and not others:
                break
            self.delete(f"{folder}/{name}")
            for other, at in others.items():
                if name in modified and (modified[name] - at).total_seconds() > CLAIM_STALE_S:
                    self.delete(f"{folder}/{other}")
            if time.monotonic() > deadline:
                raise ResourceError(
                    f"could not claim {self.url}/{key} within {CLAIM_DEADLINE_S:.0f} s: {len(others)} other process(es) hold it;"
                    " stop the other run, or wait a minute and run again"
                )
            time.sleep(random.uniform(0.05, 0.5))
        try:
            yield
        finally:
            self.delete(f"{folder}/{name}")

    def open_stream(self, key: str) -> _S3Stream:
        return _S3Stream(self._fs, self._bucket, f"{self._prefix}/{key}")

    def delete(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(key))

    def delete_many(self, keys: Sequence[str]) -> None:
        for start in range(0, len(keys), DELETE_AT_ONCE):
            self._delete_some([f"{self._prefix}/{key}" for key in keys[start : start + DELETE_AT_ONCE]])

    def _delete_some(self, names: list[str]) -> None:
        """Delete at most DELETE_AT_ONCE objects; those that S3 could not delete just now are asked for again."""
        for attempt in range(DELETE_ATTEMPTS):
            objects = {"Objects": [{"Key": name} for name in names], "Quiet": True}
            # s3fs's own rm leaves out what the answer says of single keys.
            answer = self._fs.call_s3("delete_objects", Bucket=self._bucket, Delete=objects)
            refused = [error for error in answer.get("Errors", []) if error.get("Code") != "NoSuchKey"]
            final = [error for error in refused if error.get("Code") not in TRANSIENT_CODES]
            if final or (refused and attempt == DELETE_ATTEMPTS - 1):
                error = (final or refused)[0]
                raise OSError(
                    f"could not delete {self._bucket}/{error['Key']}: {error.get('Code')} {error.get('Message', '')}"
                )
            names = [error["Key"] for error in refused]
            if not names:
                return
            time.sleep(random.uniform(0, 2.0**attempt))

    def delete_tree(self, prefix: str) -> None:
        self.delete_many(self.list_keys(prefix))


def _error_code(error: OSError) -> str:
    """The S3 error code behind an exception that s3fs translated."""
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        cause = cause.__cause__
    return ""

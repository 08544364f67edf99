"""fsspec filesystems for local paths and s3:// URLs, with the timeouts and retries that every part of the tool uses."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from operators.errors import ConfigError

# Credentials, region and endpoint come from the AWS ecosystem's own places (environment, profile, instance role,
# AWS_ENDPOINT_URL): botocore reads them. Failures that pass are repeated in retrying_s3.py alone.
S3_CONFIG = {"retries": {"mode": "standard", "total_max_attempts": 1}, "connect_timeout": 10, "read_timeout": 60}


def filesystem_for(url: str) -> tuple[Any, str]:
    """The filesystem of `url` and the path inside it. Local paths come back absolute.

    Raises ConfigError for a scheme other than a local path, file:// or s3://.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme == "file":
        path = rest if separator else url
        return LocalFileSystem(), str(Path(os.path.expanduser(path)).absolute())
    if scheme in ("s3", "s3a"):
        from operators.storage.retrying_s3 import RetryingS3FileSystem  # here: local roots need no S3 client

        # File systems are kept by their arguments: one an endpoint.
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        # Listings must be fresh: a cached one would hide what other processes committed.
        fs = RetryingS3FileSystem(endpoint_url=endpoint, config_kwargs=S3_CONFIG, use_listings_cache=False)
        return fs, rest.rstrip("/")
    raise ConfigError(f"a location must be a local path or start with s3://, got {url!r} (scheme {scheme!r})")


def is_local(fs: Any) -> bool:
    """Whether `fs` is this machine's disk."""
    return isinstance(fs, LocalFileSystem)


def etag_of(info: dict[str, Any]) -> str:
    """A string that changes when the object's content does: the S3 ETag, or size and mtime of a local file."""
    if "ETag" in info:
        return str(info["ETag"]).strip('"')
    return f"{info['size']}-{int(info.get('mtime', 0) * 1e6)}"

"""What a service is started with: the index, its search settings, its limits and who may use it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from operators.errors import ConfigError

MIN_TOKEN_CHARS = 16
# Limits of a request that `GET /v1/index` tells; max_nprobe is that of the version, where it has fewer lists.
TOLD_LIMITS = (
    "max_k",
    "max_nprobe",
    "max_refine_factor",
    "max_batch",
    "max_hits",
    "max_candidates",
    "max_query_chars",
    "max_body_bytes",
)


@dataclasses.dataclass(frozen=True)
class ServiceSettings:
    """Settings of one replica. Plain values, so that they travel in a Ray Serve configuration as they are."""

    root: str
    model: str | None = None  # another place of the index's model
    # Default search settings; None: what the version stores. `recall` in their place: its operating point.
    nprobe: int | None = None
    refine_factor: int | None = None
    recall: float | None = None
    threads: int = 1  # of faiss and of the encoder
    # Limits of one request.
    max_k: int = 1000
    max_nprobe: int = 1024
    max_refine_factor: int = 64
    max_batch: int = 256  # queries
    max_hits: int = 10_000  # queries * k
    max_candidates: int = 20_000  # k * refine_factor
    max_query_chars: int = 8192
    max_body_bytes: int = 8 << 20
    # Limits of the replica.
    max_queue: int = 512  # queries that wait or are being worked on; more are refused
    deadline_s: float = 5.0  # a request that is not answered by then is refused
    drain_s: float = 15.0  # what requests in flight get to finish when the service ends
    row_cache_bytes: int = 256 << 20
    warm_bytes: int = 4 << 30  # of lists and vectors that are read before a version is served
    poll_s: float = 1.0  # between two looks at CURRENT
    # The bearer token is named, never given: it would show in process lists and in Serve's configuration.
    token_env: str | None = None
    token_file: str | None = None

    def __post_init__(self) -> None:
        least = {"threads": 1, "max_k": 1, "max_nprobe": 1, "max_refine_factor": 0, "max_batch": 1, "max_hits": 1}
        least |= {"max_candidates": 1, "max_query_chars": 1, "max_body_bytes": 1024, "max_queue": 1}
        least |= {"row_cache_bytes": 0, "warm_bytes": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ConfigError(f"{option(name)} must be at least {bound}, got {getattr(self, name)}")
        for name in ("deadline_s", "drain_s", "poll_s"):
            if not 0 < getattr(self, name) <= 3600:
                raise ConfigError(f"{option(name)} must be in (0, 3600] seconds, got {getattr(self, name):g}")
        for name in ("max_hits", "max_candidates"):
            if getattr(self, name) < self.max_k:
                raise ConfigError(
                    f"{option(name)} must be at least --max-k ({self.max_k}), or the largest k is never taken, got"
                    f" {getattr(self, name)}"
                )
        if self.max_queue < self.max_batch:
            raise ConfigError(
                f"--max-queue must be at least --max-batch ({self.max_batch}), or the largest request is never taken, got"
                f" {self.max_queue}"
            )
        if self.recall is not None and (self.nprobe is not None or self.refine_factor is not None):
            raise ConfigError("--recall chooses nprobe and the refine factor: leave out --nprobe and --refine-factor")
        if self.token_env is not None and self.token_file is not None:
            raise ConfigError("the token is taken from one place: give --token-env or --token-file")

    @staticmethod
    def of(fields: dict[str, Any]) -> ServiceSettings:
        """Settings from plain JSON. Raises ConfigError for an unknown name."""
        known = {field.name for field in dataclasses.fields(ServiceSettings)}
        unknown = sorted(fields.keys() - known)
        if unknown:
            raise ConfigError(f"unknown setting {unknown[0]!r} of the service; known are {', '.join(sorted(known))}")
        return ServiceSettings(**fields)

    def token(self) -> str | None:
        """The bearer token, None where none is asked for. Raises ConfigError where it should be and is not."""
        if self.token_env is not None:
            where, found = f"environment variable {self.token_env} (--token-env)", os.environ.get(self.token_env)
            if found is None:
                raise ConfigError(f"{where} is not set; set it to the token that clients will send")
        elif self.token_file is not None:
            where = f"file {self.token_file} (--token-file)"
            try:
                found = Path(self.token_file).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"{where} cannot be read: {error}") from None
        else:
            return None
        token = found.strip()
        if len(token) < MIN_TOKEN_CHARS or not token.isascii() or not token.isprintable() or " " in token:
            raise ConfigError(
                f"a token must be at least {MIN_TOKEN_CHARS} printable ASCII characters without spaces, the one in {where} is"
                f" {len(token)} characters; make one with `openssl rand -hex 32`"
            )
        return token


def option(name: str) -> str:
    """`max_body_bytes` -> `--max-body-bytes`."""
    return "--" + name.replace("_", "-")

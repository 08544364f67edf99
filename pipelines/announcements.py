"""What gc and rollback tell each other through the root: versions that are being dropped, and versions that are pinned.

Each writes before it reads what the other wrote, so of two that meet over a version at least one sees the other: a rollback
refuses a version that is announced, a gc looks again when one that it announced is pinned.
"""

from __future__ import annotations

import getpass
import os
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from operators.crash_points import crash_point
from operators.errors import FencedError
from operators.storage.commits import seal, unseal
from operators.storage.store import Store, StoredObject
from pipelines.versions import versions_in

DROP_PREFIX, PIN_PREFIX = "gc/drop-", "gc/pin-"
# A file that is being written gets younger with every write, a pin holds for minutes: one that rests so long has lost its owner.
DEAD_AGE_S = 3600.0


@contextmanager
def pinned(store: Store, version: str) -> Iterator[None]:
    """For the block no gc removes the version. Raises FencedError when one has begun to.

    What a killed process pinned is free again after the age that gc is given, an hour at least.
    """
    key = f"{PIN_PREFIX}{uuid.uuid4().hex}.json"
    store.put(key, seal({"version": version, **_signature()}))
    try:
        crash_point("pin.after")
        for found, body in _read_all(store, DROP_PREFIX).items():
            if version in body["versions"]:
                raise FencedError(
                    f"version {version} at {store.url} is being removed by gc ({body['holder']}, since {body['started_at']},"
                    f" {found}); choose another version (`vectormill history`)"
                )
        yield
    finally:
        store.delete_many([key])


def announce(store: Store, versions: Sequence[str]) -> str:
    """Say that these versions are being dropped; the announcement's key."""
    key = f"{DROP_PREFIX}{uuid.uuid4().hex}.json"
    store.put(key, seal({"versions": list(versions), **_signature()}))
    return key


def announced_versions(store: Store) -> set[str]:
    """Versions that running and killed gcs have begun to drop."""
    return {version for body in _read_all(store, DROP_PREFIX).values() for version in body["versions"]}


def pinned_versions(store: Store, now: float, min_age_s: float) -> tuple[set[str], list[StoredObject]]:
    """Versions that are pinned, and the pins of processes that must be dead."""
    dead = [
        found
        for found in store.list_objects("gc")
        if found.key.startswith(PIN_PREFIX) and now - found.modified_at >= max(min_age_s, DEAD_AGE_S)
    ]
    ended = {found.key for found in dead}
    return {body["version"] for key, body in _read_all(store, PIN_PREFIX).items() if key not in ended}, dead


def withdraw_finished(store: Store, own: str) -> None:
    """Delete this gc's announcement, and those of killed ones that there is nothing left of."""
    # In this order: a version that was announced, and has no manifest after that, is gone.
    announced = _read_all(store, DROP_PREFIX)
    there = set(versions_in(store))
    store.delete_many([key for key, body in announced.items() if key == own or not there & set(body["versions"])])


def _signature() -> dict[str, str]:
    holder = f"{getpass.getuser()}@{socket.gethostname()} pid {os.getpid()}"
    return {"holder": holder, "started_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def _read_all(store: Store, prefix: str) -> dict[str, dict[str, Any]]:
    """What is below `prefix`, by key."""
    found = {}
    for key in store.list_keys("gc"):
        content = store.read_tagged(key) if key.startswith(prefix) else None
        if content is not None:
            found[key] = unseal(content[0], f"{store.url}/{key}")
    return found

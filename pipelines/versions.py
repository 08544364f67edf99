"""The versions that a root holds: what each is made of, whether it is whole, what it shares; and `history`."""

from __future__ import annotations

import hashlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from operators.artifact.manifest import (
    Manifest,
    PartRef,
    candidate_key,
    manifest_key,
    open_current,
    read_candidate,
    read_current,
    read_manifest,
    read_part_record,
)
from operators.errors import IndexNotFoundError, IntegrityError
from operators.storage.store import Store, StoredObject, open_store

NUM_THREADS = 16
PUBLISHED_FOLDERS = ("segments", "quantizers")
CANDIDATE = "candidate"  # where a version is named: the version of the newest run that was refused


@dataclass
class Held:
    """A version as a root holds it. `manifest` is None when it cannot be read; `problems` say why, and what is missing."""

    version: str
    manifest: Manifest | None = None
    digest: str = ""  # SHA-256 of the manifest's file: what CURRENT names
    problems: list[str] = field(default_factory=list)
    # Everything that it names, key -> size in bytes; 0 for part records, which are checked by their SHA-256.
    objects: dict[str, int] = field(default_factory=dict)
    unknown: set[str] = field(
        default_factory=set
    )  # folders of part records that cannot be read: some of what lies there


def version_number(version: str) -> int:
    """`v000012` -> 12: the epoch of the run that made it."""
    digits = version.removeprefix("v")
    return int(digits) if digits.isdecimal() else 0


def is_manifest(key: str) -> bool:
    """Whether the key is that of a version's manifest."""
    return key.count("/") == 2 and key == manifest_key(key.split("/")[1])


def versions_in(store: Store) -> list[str]:
    """Names of all versions with a manifest, the newest last."""
    keys = [key for key in store.list_keys("versions") if is_manifest(key)]
    return sorted((key.split("/")[1] for key in keys), key=lambda version: (version_number(version), version))


def open_version(store: Store, version: str | None = None) -> Manifest:
    """Manifest of a version; of the published one for None, and for `candidate` of the newest that a run made and was refused.

    Raises IndexNotFoundError where there is no such version, IntegrityError for a damaged manifest.
    """
    if version is None:
        return open_current(store)
    if version == CANDIDATE:
        return _newest_candidate(store)
    if store.size_bytes(manifest_key(version)) is None:
        raise _no_version(store, version)
    return read_manifest(store, version)


def _newest_candidate(store: Store) -> Manifest:
    kept = [found for found in store.list_objects("runs") if found.key == candidate_key(found.key.split("/")[1])]
    if not kept:
        raise IndexNotFoundError(
            f"no candidate is kept at {store.url} (no object runs/*/candidate.json): a run keeps one when its version is refused"
        )
    newest = max(kept, key=lambda found: (found.modified_at, found.key))
    return read_candidate(store, newest.key.split("/")[1])


def _no_version(store: Store, version: str) -> IndexNotFoundError:
    return IndexNotFoundError(
        f"no version {version!r} at {store.url} (no object {manifest_key(version)});"
        f" versions: {', '.join(versions_in(store)) or 'none'}"
    )


class NamedObjects:
    """What manifests name. Records of segments that several versions share are read once."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._parts: dict[str, dict[str, int]] = {}

    def fill(self, held: Held) -> None:
        """Fill `objects`. Adds the part records that are missing or damaged to `problems`: what they name is not known."""
        manifest = held.manifest
        if manifest is None:
            return
        held.objects |= {entry["key"]: entry["size_bytes"] for entry in manifest.small_objects}
        refs = [ref for segment in manifest.segments for ref in segment.parts]
        unread = [ref for ref in refs if ref.record_sha256 not in self._parts]
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            wrong = {
                ref.record_key: error for ref, error in zip(unread, pool.map(self._read, unread), strict=True) if error
            }
        for ref in refs:
            if ref.record_key in wrong:
                held.problems.append(wrong[ref.record_key])
                held.unknown.add(ref.record_key.rsplit("/", 1)[0] + "/")
            else:
                held.objects |= self._parts[ref.record_sha256]

    def _read(self, ref: PartRef) -> str | None:
        """Keep what the part's record names; what is wrong if it cannot be read."""
        try:
            record = read_part_record(self._store, ref)
        except IntegrityError as error:
            return str(error)
        objects = {entry.key: entry.size_bytes for entry in record.objects.values()}
        self._parts[ref.record_sha256] = {**objects, ref.record_key: 0}
        return None


def hold(store: Store, version: str, named: NamedObjects | None = None) -> Held | None:
    """The version with what is wrong with it, and with what it names if `named` is given; None where there is none.

    A version that gc removes meanwhile is not one with missing objects: gc deletes the manifest first.
    """
    held = Held(version)
    try:
        data = store.read(manifest_key(version))
        held.digest = hashlib.sha256(data).hexdigest()
        held.manifest = read_manifest(store, version, held.digest)
    except FileNotFoundError:
        return None
    except IntegrityError as error:
        held.problems.append(str(error))
    else:
        if held.manifest.version != version:
            held.problems.append(f"{manifest_key(version)} is the manifest of {held.manifest.version}")
        if named is not None:
            named.fill(held)
    if held.problems and store.size_bytes(manifest_key(version)) is None:
        return None
    return held


def stored_objects(store: Store) -> dict[str, StoredObject]:
    """All objects that versions are made of, by key."""
    return {found.key: found for folder in PUBLISHED_FOLDERS for found in store.list_objects(folder)}


def missing_objects(store: Store, held: Held, stored: dict[str, StoredObject]) -> list[str]:
    """What is wrong with the objects that the version names, as far as a listing shows it: missing, or of another size."""
    problems = []
    for key, size_bytes in sorted(held.objects.items()):
        found = stored.get(key)
        if found is None:
            problems.append(f"object {store.url}/{key} is missing; it should hold {size_bytes} bytes")
        elif size_bytes and found.size_bytes != size_bytes:
            problems.append(f"object {store.url}/{key} must hold {size_bytes} bytes, found {found.size_bytes}")
    return problems


def check_whole(store: Store, version: str) -> Held:
    """The version, after a light check: manifest and part records by checksum, all objects by size.

    Raises IndexNotFoundError where there is none, IntegrityError with what is wrong.
    """
    held = hold(store, version, NamedObjects(store))
    if held is None:
        raise _no_version(store, version)
    problems = held.problems + missing_objects(store, held, stored_objects(store))
    if problems:
        shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise IntegrityError(f"version {version} at {store.url} is not whole: {shown}")
    return held


def history(root: str) -> dict[str, Any]:
    """{"root", "current", "problems", "versions"}: all versions that the root holds, the oldest first, as plain JSON.

    A version is {"version", "current", "state" (whole, incomplete, damaged), "problems", "parent", "created_at", "ntotal",
    "num_docs", "recall@10", "kind", "changes", "num_deltas", "num_deleted", "deleted_share", "bytes": {"own", "shared"}}. `shared` are the bytes of objects that other versions name too.
    Light: checksums of manifests and part records, sizes of all objects; `verify` reads the objects. Of a version whose
    manifest cannot be read the fields from `parent` on are None. `problems` is what is wrong with CURRENT.
    Raises IndexNotFoundError where there is neither CURRENT nor a version.
    """
    store = open_store(root)
    problems: list[str] = []
    current: str | None = None
    found = None
    try:
        found = read_current(store)
        if found is not None:
            current = found[0]["version"]
    except IntegrityError as error:
        problems.append(str(error))
    names = versions_in(store)
    if not names and current is None and not problems:
        raise IndexNotFoundError(
            f"no index is published at {store.url} (neither CURRENT nor a version there); check the path, or run `vectormill build` first"
        )
    named = NamedObjects(store)
    stored = stored_objects(store)
    all_held = []
    for name in names:
        held = hold(store, name, named)
        if held is None:  # gc removed it since it was listed
            continue
        if name == current and found is not None and held.digest != found[0]["manifest"]:
            held.problems.append(f"{manifest_key(name)} is not the manifest that CURRENT names (other SHA-256)")
        held.problems += missing_objects(store, held, stored)
        all_held.append(held)
    if current is not None and current not in {held.version for held in all_held}:
        problems.append(f"CURRENT names {current}, whose manifest is missing; roll back to a version that is whole")
    users = Counter(key for held in all_held for key in held.objects)
    versions = [_facts(held, users, held.version == current) for held in all_held]
    return {"root": root, "current": current, "problems": problems, "versions": versions}


def _facts(held: Held, users: Counter[str], is_current: bool) -> dict[str, Any]:
    manifest = held.manifest
    sizes = {
        "own": sum(size for key, size in held.objects.items() if users[key] == 1),
        "shared": sum(size for key, size in held.objects.items() if users[key] > 1),
    }
    state = "damaged" if manifest is None else "incomplete" if held.problems else "whole"
    return {
        "version": held.version,
        "current": is_current,
        "state": state,
        "problems": held.problems,
        "parent": manifest.parent if manifest else None,
        "created_at": manifest.created_at if manifest else None,
        "ntotal": manifest.ntotal if manifest else None,
        "num_docs": manifest.num_docs if manifest else None,
        "recall@10": manifest.quality["recall@10"] if manifest else None,
        "kind": manifest.kind if manifest else None,
        "changes": manifest.changes if manifest else None,
        "num_deltas": len(manifest.segments) - 1 if manifest else None,
        **(deletions(manifest) if manifest else dict.fromkeys(("num_deleted", "deleted_share"))),
        "bytes": sizes if manifest else None,
    }


def deletions(manifest: Manifest) -> dict[str, Any]:
    """{"num_deleted", "deleted_share"}: rows that the version's segments hold and searches skip, and their share of all rows."""
    num_deleted = sum(segment.num_deleted for segment in manifest.segments)
    return {"num_deleted": num_deleted, "deleted_share": num_deleted / max(1, manifest.next_row_id)}

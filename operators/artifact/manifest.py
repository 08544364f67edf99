"""Versions of an index: the manifest that lists every object of a version, and CURRENT that names the published one."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from operators.artifact.list_assignment import NEAREST, ListAssignment
from operators.crash_points import crash_point
from operators.errors import FencedError, IndexNotFoundError, IntegrityError
from operators.settings import digest_of
from operators.storage.checked import ObjectEntry
from operators.storage.commits import CommitRecord, parse_record, seal, unseal
from operators.storage.fencing import Epoch
from operators.storage.store import Store

FORMAT_VERSION = 1
CURRENT_KEY = "CURRENT"


@dataclass(frozen=True)
class PartRef:
    """A part as the manifest names it: the record's key and SHA-256, what it covers, and what its objects must hold."""

    record_key: str
    record_sha256: str
    first_list: int
    num_lists: int
    num_entries: int
    size_bytes: int
    content: list[list[Any]]  # [role, size_bytes, sha256] of each object


@dataclass(frozen=True)
class Segment:
    """An immutable set of rows: the base, or (later) a nightly delta."""

    name: str
    first_row_id: int
    num_rows: int
    parts: list[PartRef]
    rejects: dict[str, Any] | None  # ObjectEntry JSON of a schemas.REJECTS Parquet, None when no row was left out


@dataclass(frozen=True)
class Manifest:
    """Everything that makes up a version. Field meanings: docs/artifact-format.md."""

    version: str
    parent: str | None
    run_id: str
    epoch: int
    created_at: str
    config: dict[str, Any]
    fingerprint: dict[str, Any]
    model: dict[str, Any]
    metric: str
    d: int
    nlist: int
    M: int
    nbits: int
    ntotal: int
    num_docs: int
    rows: dict[str, Any]
    sources: dict[str, Any]
    quantizer: dict[str, Any]
    queries: dict[str, Any]
    segments: list[Segment]
    quality: dict[str, Any]
    content_digest: str
    format_version: int = FORMAT_VERSION
    reports: dict[str, Any] = field(default_factory=dict)
    assignment: dict[str, Any] = field(default_factory=NEAREST.to_json)  # a manifest without it: nearest of all

    @property
    def list_assignment(self) -> ListAssignment:
        return ListAssignment.from_json(self.assignment)

    @property
    def quantizer_entry(self) -> ObjectEntry:
        return ObjectEntry.from_json(self.quantizer)

    @property
    def bytes_per_vector(self) -> float:
        """Bytes of all published objects per vector."""
        total = self.quantizer["size_bytes"] + sum(part.size_bytes for s in self.segments for part in s.parts)
        return total / max(1, self.ntotal)


def compute_content_digest(quantizer: ObjectEntry, queries: ObjectEntry, segments: Sequence[Segment]) -> str:
    """SHA-256 over what the published objects hold, not over their keys, times or run ids."""
    content = {
        "format_version": FORMAT_VERSION,
        "quantizer": quantizer.sha256,
        "queries": queries.sha256,
        "segments": [
            {
                "first_row_id": s.first_row_id,
                "num_rows": s.num_rows,
                "parts": [[p.first_list, p.num_lists, p.num_entries, p.content] for p in s.parts],
                "rejects": s.rejects["sha256"] if s.rejects else None,
            }
            for s in segments
        ],
    }
    return digest_of(content)


def part_ref(store: Store, record_key: str) -> PartRef:
    """Reference to a committed part."""
    data = store.read(record_key)
    record = parse_record(data, record_key)
    return PartRef(
        record_key,
        hashlib.sha256(data).hexdigest(),
        record.facts["first_list"],
        record.facts["num_lists"],
        record.facts["num_entries"],
        record.size_bytes,
        [list(entry) for entry in record.content()],
    )


def read_part_record(store: Store, ref: PartRef) -> CommitRecord:
    """The part's record. Raises IntegrityError when it is missing or not the one that the manifest names."""
    try:
        data = store.read(ref.record_key)
    except FileNotFoundError:
        raise IntegrityError(
            f"part record {store.url}/{ref.record_key} is missing; restore it from a copy, or build again"
        ) from None
    if hashlib.sha256(data).hexdigest() != ref.record_sha256:
        raise IntegrityError(
            f"part record {store.url}/{ref.record_key} is not the one that the manifest names (other SHA-256)"
        )
    return parse_record(data, f"{store.url}/{ref.record_key}")


def read_part_records(store: Store, refs: Sequence[PartRef]) -> list[CommitRecord]:
    """Records of all parts, read in parallel."""
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda ref: read_part_record(store, ref), refs))


def manifest_key(version: str) -> str:
    return f"versions/{version}/manifest.json"


def write_manifest(store: Store, manifest: Manifest) -> str:
    """Store the manifest of a candidate (not published yet); returns the digest that CURRENT will name."""
    data = seal(asdict(manifest))
    store.put(manifest_key(manifest.version), data)
    return hashlib.sha256(data).hexdigest()


def read_manifest(store: Store, version: str, digest: str | None = None) -> Manifest:
    """Manifest of a version. Raises IntegrityError when it is missing, damaged or not the one with `digest`."""
    name = f"{store.url}/{manifest_key(version)}"
    try:
        data = store.read(manifest_key(version))
    except FileNotFoundError:
        raise IntegrityError(
            f"manifest {name} is missing; CURRENT names it: restore it from a copy, or build again"
        ) from None
    if digest is not None and hashlib.sha256(data).hexdigest() != digest:
        raise IntegrityError(f"manifest {name} is not the one that CURRENT names (other SHA-256): damaged or replaced")
    body = unseal(data, f"manifest {name}")
    if body["format_version"] != FORMAT_VERSION:
        raise IntegrityError(
            f"manifest {name} has format version {body['format_version']}, this vectormill reads {FORMAT_VERSION}; use the version that wrote it"
        )
    segments = [Segment(**{**s, "parts": [PartRef(**p) for p in s["parts"]]}) for s in body.pop("segments")]
    return Manifest(**body, segments=segments)


def read_current(store: Store) -> tuple[dict[str, Any], str] | None:
    """What CURRENT says ({version, manifest, epoch, ...}) and its tag, None where nothing is published."""
    found = store.read_tagged(CURRENT_KEY)
    return (unseal(found[0], f"{store.url}/{CURRENT_KEY}"), found[1]) if found else None


def open_current(store: Store) -> Manifest:
    """Manifest of the published version. Raises IndexNotFoundError where there is none."""
    found = read_current(store)
    if found is None:
        raise IndexNotFoundError(
            f"no index is published at {store.url} (no object CURRENT there); check the path, or run `vectormill build` first"
        )
    return read_manifest(store, found[0]["version"], found[0]["manifest"])


def publish(store: Store, manifest: Manifest, digest: str, epoch: Epoch, tag: str | None) -> None:
    """Swap CURRENT to the manifest. `tag` is CURRENT's when the run began. Raises FencedError when the run lost."""
    epoch.check(store)
    crash_point("publish.before")
    body = {
        "version": manifest.version,
        "manifest": digest,
        "epoch": epoch.number,
        "content_digest": manifest.content_digest,
        "published_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if not store.replace_if(CURRENT_KEY, seal(body), tag):
        found = read_current(store)
        if found is None or found[0]["manifest"] != digest:
            winner = f"version {found[0]['version']} (epoch {found[0]['epoch']})" if found else "nothing"
            raise FencedError(
                f"{store.url}/CURRENT changed while this run ({epoch.run_id}) worked: it now names {winner};"
                " this run's version was not published; run again to start from the new one"
            )
    crash_point("publish.after")

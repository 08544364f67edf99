"""Commit records: the only proof that a unit of work is done. The first commit of a unit wins.

An attempt writes its objects under keys of its own, then one small record under the unit's key, put if absent. Readers
follow records only, so a half-written object, or one of an attempt that lost, is never seen.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from operators.crash_points import crash_point
from operators.errors import IntegrityError
from operators.storage.checked import ObjectEntry
from operators.storage.store import Store


@dataclass(frozen=True)
class CommitRecord:
    """A finished unit: `objects` by role, `facts` (counts and the like), and the digest of what went into it."""

    unit: str  # kind and name, for messages: "piece 3f2a..."
    inputs: str  # digest of everything that determines the result: fingerprint and input records
    attempt: str
    objects: dict[str, ObjectEntry] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """Plain JSON of the record, without its own checksum."""
        return {
            "unit": self.unit,
            "inputs": self.inputs,
            "attempt": self.attempt,
            "objects": {role: entry.to_json() for role, entry in self.objects.items()},
            "facts": self.facts,
        }

    def content(self) -> list[tuple[str, int, str]]:
        """(role, size, sha256) of the objects: equal for equal results, whatever attempt made them."""
        return [(role, entry.size_bytes, entry.sha256) for role, entry in sorted(self.objects.items())]

    @property
    def size_bytes(self) -> int:
        """Bytes of all objects."""
        return sum(entry.size_bytes for entry in self.objects.values())


def new_attempt() -> str:
    """Name of an attempt: unique, so that no attempt ever writes over another's objects."""
    return uuid.uuid4().hex[:16]


def seal(body: dict[str, Any]) -> bytes:
    """JSON with its own SHA-256, so that a flipped bit in a record or manifest is found when it is read."""
    text = json.dumps(body, sort_keys=True, indent=1)
    # As json.dumps would write both, a level deeper: strings hold no newline. (Its indenting encoder is Python's slow one.)
    deeper = text.replace("\n", "\n ")
    return f"{_HEAD}{deeper}{_MIDDLE}{hashlib.sha256(text.encode()).hexdigest()}{_TAIL}".encode()


_HEAD, _MIDDLE, _TAIL = '{\n "body": ', ',\n "sha256": "', '"\n}'


def unseal(data: bytes, name: str) -> dict[str, Any]:
    """Body of a sealed JSON. Raises IntegrityError naming `name` when it is damaged."""
    try:
        sealed = json.loads(data)
        text, middle, _ = data.decode().removeprefix(_HEAD).rpartition(_MIDDLE)
        if middle and hashlib.sha256(text.replace("\n ", "\n").encode()).hexdigest() == sealed["sha256"]:
            return dict(sealed["body"])
    except (ValueError, KeyError, TypeError):
        pass
    raise IntegrityError(
        f"{name} is damaged: its content does not match its checksum; restore it from a copy, or build again with --fresh"
    )


def read_record(store: Store, key: str) -> CommitRecord | None:
    """The unit's record, None if it was not committed. Raises IntegrityError for a damaged record."""
    try:
        data = store.read(key)
    except FileNotFoundError:
        return None
    return parse_record(data, f"{store.url}/{key}")


def finished_unit(store: Store, key: str, inputs: str) -> CommitRecord | None:
    """The unit's record if it was committed. Raises IntegrityError for one that was made from other inputs."""
    record = read_record(store, key)
    if record is not None:
        check_inputs([record], [inputs])
    return record


def check_inputs(runs: Sequence[CommitRecord], expected_inputs: Sequence[str]) -> None:
    """Raise IntegrityError for work made for other inputs, settings or code than this run's (a foreign shard)."""
    for record, inputs in zip(runs, expected_inputs, strict=True):
        if record.inputs != inputs:
            raise IntegrityError(
                f"{record.unit} was made from other inputs ({record.inputs[:12]}) than this index expects ({inputs[:12]});"
                " delete its record to build it again"
            )


def parse_record(data: bytes, name: str) -> CommitRecord:
    """Record from its stored bytes."""
    body = unseal(data, f"commit record {name}")
    objects = {role: ObjectEntry.from_json(entry) for role, entry in body["objects"].items()}
    return CommitRecord(body["unit"], body["inputs"], body["attempt"], objects, body["facts"])


def commit(store: Store, key: str, record: CommitRecord) -> CommitRecord:
    """Put the record unless the unit is committed already; returns the record in force.

    A lost race deletes the loser's objects. A put whose answer was lost is recognised by its attempt name.
    """
    kind = record.unit.split()[0]
    crash_point(f"{kind}.before_record")
    if not store.put_if_absent(key, seal(record.body())):
        winner = read_record(store, key)
        if winner is None:
            raise IntegrityError(
                f"commit record {store.url}/{key} vanished while {record.unit} was committed; run again"
            )
        if winner.inputs != record.inputs:
            raise IntegrityError(
                f"commit record {store.url}/{key} of {record.unit} was made from other inputs ({winner.inputs[:12]}) than this"
                f" run's ({record.inputs[:12]}); delete it to build the unit again, or use --fresh"
            )
        if winner.attempt != record.attempt:
            for entry in record.objects.values():
                store.delete(entry.key)
        return winner
    crash_point(f"{kind}.after_record")
    return record

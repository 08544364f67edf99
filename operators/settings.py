"""Two kinds of configuration fields: semantic ones are fingerprinted, operational ones may change between attempts.

A section of the configuration is a frozen dataclass beside the code that it steers; `pipelines/config.py` assembles
the sections. Standard library only, so that the encoder's settings load on a bare GPU machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any


def semantic(default: Any, doc: str) -> Any:
    """Field that changes what is published. Part of the fingerprint."""
    return _field(default, {"semantic": True, "doc": doc})


def operational(default: Any, doc: str) -> Any:
    """Field that changes how the work is done, not its result. Not part of the fingerprint."""
    return _field(default, {"semantic": False, "doc": doc})


def _field(default: Any, metadata: dict[str, Any]) -> Any:
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def semantic_fields(section: Any) -> dict[str, Any]:
    """Name and value of the section's semantic fields, nested sections flattened as `outer.inner`."""
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            fields |= {f"{field.name}.{name}": inner for name, inner in semantic_fields(value).items()}
        elif field.metadata.get("semantic", False):
            fields[field.name] = list(value) if isinstance(value, tuple) else value
    return fields


def digest_of(value: Any) -> str:
    """Hex SHA-256 of the canonical JSON of `value` (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def differing_fields(made_with: dict[str, Any], asked_for: dict[str, Any]) -> list[str]:
    """One line for each field that differs: `name: was X, now Y`."""
    names = sorted(made_with.keys() | asked_for.keys())
    absent = "(not set)"
    return [
        f"{name}: was {made_with.get(name, absent)!r}, now {asked_for.get(name, absent)!r}"
        for name in names
        if made_with.get(name, absent) != asked_for.get(name, absent)
    ]

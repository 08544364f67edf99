"""The telemetry of the run that made a version, kept beside its manifest as `versions/<version>/run.json`.

It is no part of the version: no digest covers it, gc deletes it with the version, and everything works without it.
docs/telemetry.md says what it holds.
"""

from __future__ import annotations

from typing import Any

from operators.artifact.manifest import Manifest
from operators.storage.commits import seal, unseal
from operators.storage.store import Store
from pipelines.run_context import RunContext


def run_record_key(version: str) -> str:
    """Key of the telemetry of the run that made the version."""
    return f"versions/{version}/run.json"


def store_run_record(context: RunContext, manifest: Manifest) -> None:
    """Store what the run has measured so far. What storage refuses here is told and harms nothing."""
    run = context.run
    body = {
        "version": manifest.version,
        "run_id": run.run_id,
        "kind": manifest.kind,
        "resumed": run.resumed,
        **context.progress.telemetry.to_json(),
    }
    try:
        context.store.put(run_record_key(manifest.version), seal(body))
    except OSError as error:
        context.progress.say(f"the telemetry of {manifest.version} was not stored: {error}")


def read_run_record(store: Store, version: str) -> dict[str, Any] | None:
    """The telemetry of the run that made the version; None where there is none. Raises IntegrityError when it is damaged."""
    key = run_record_key(version)
    try:
        return unseal(store.read(key), f"{store.url}/{key}")
    except FileNotFoundError:
        return None

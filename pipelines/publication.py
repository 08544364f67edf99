"""The end of every run that makes a version: its manifest, the swap of CURRENT, and tidying up after it."""

from __future__ import annotations

from operators.artifact.manifest import Manifest, manifest_key, publish, read_part_records, write_manifest
from operators.crash_points import crash_point
from operators.errors import IntegrityError
from operators.storage.store import Store
from pipelines.operating_points import carry_operating_points
from pipelines.run_context import RunContext
from pipelines.runs import Run, unfinished_runs
from pipelines.telemetry.run_record import store_run_record
from pipelines.versions import hold, version_number, versions_in


def publish_version(context: RunContext, manifest: Manifest, tag: str | None) -> None:
    """Publish a version that was verified and measured. tag: what `fence_current` gave. Raises FencedError."""
    context.progress.stage("publish")
    crash_point("manifest.before")
    context.epoch.check(context.store)
    digest = write_manifest(context.store, manifest)
    try:
        carry_operating_points(context.store, manifest)
    except IntegrityError as error:  # they can be measured again, and are no part of the version
        context.progress.say(f"operating points were not carried over to {manifest.version}: {error}")
    store_run_record(context, manifest)
    publish(context.store, manifest, digest, context.epoch, tag)
    context.progress.published(manifest.version, manifest.rows, manifest.content_digest)
    tidy_up(context.store, context.run, manifest)


def tidy_up(store: Store, run: Run, manifest: Manifest) -> None:
    """Remove the run's work and what its lost attempts left: what counts of it is in the published version now.

    Segments of earlier versions are not looked at: those versions may still name objects that this one does not.
    """
    referenced = {entry["key"] for entry in manifest.small_objects}
    for segment in manifest.segments:
        if segment.name.startswith(run.run_id):
            for part, record in zip(segment.parts, read_part_records(store, segment.parts), strict=True):
                referenced |= {part.record_key, *(entry.key for entry in record.objects.values())}
    if run.resumed:
        _discard_lost_manifests(store, run, manifest)
    for key in store.list_keys("segments"):
        if key.startswith(f"segments/{run.run_id}-") and key not in referenced:
            store.delete(key)
    crash_point("tidy.before_runs")
    store.delete_tree(run.prefix)


def _discard_lost_manifests(store: Store, run: Run, manifest: Manifest) -> None:
    """Delete the manifests of the run's attempts that ended between manifest and publication: they name what goes now."""
    for version in versions_in(store):
        if version_number(version) < manifest.epoch and version != manifest.parent:
            held = hold(store, version)
            if held is not None and held.manifest is not None and held.manifest.run_id == run.run_id:
                store.delete(manifest_key(version))
                store.delete_tree(manifest_key(version).rsplit("/", 1)[0])  # what lay beside it


def finish_published(store: Store, current: Manifest) -> Run | None:
    """The run that published `current`, tidied up after, if it was ended before it had done that itself; else None.

    Every command that makes a version does this first. Once another run has published, the work that is left would be
    taken for that of an unfinished run, which would go on in the folders of a published version.
    """
    for run in unfinished_runs(store):
        if run.run_id == current.run_id:
            tidy_up(store, run, current)
            return run
    return None

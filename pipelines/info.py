"""`info`: what a version is, from its manifest alone."""

from __future__ import annotations

from typing import Any

from operators.storage.store import open_store
from pipelines.operating_points import read_operating_points
from pipelines.versions import deletions, open_version


def info(root: str, version: str | None = None) -> dict[str, Any]:
    """Facts of the published version, or another (see `open_version`), as plain JSON. Raises IndexNotFoundError, IntegrityError.

    `rows` reconcile: read = indexed + rejected + dropped. `ntotal` counts the entries that are not deleted,
    `deleted_share` is of all that the segments hold. `recall@10` is that of the index against exact search at the
    stored nprobe and refine_factor (`operating_points`: what `eval` stored, or None), on queries drawn from the corpus when it was built. `bytes_per_vector` counts
    quantizer and parts, deleted rows too.
    """
    store = open_store(root)
    manifest = open_version(store, version)
    segments = [
        {
            "name": segment.name,
            "first_row_id": segment.first_row_id,
            "num_rows": segment.num_rows,
            "num_deleted": segment.num_deleted,
            "parts": len(segment.parts),
            "size_bytes": sum(part.size_bytes for part in segment.parts),
        }
        for segment in manifest.segments
    ]
    return {
        "root": root,
        "version": manifest.version,
        "parent": manifest.parent,
        "kind": manifest.kind,
        "created_at": manifest.created_at,
        "ntotal": manifest.ntotal,
        "num_docs": manifest.num_docs,
        "d": manifest.d,
        "nlist": manifest.nlist,
        "M": manifest.M,
        "nbits": manifest.nbits,
        "metric": manifest.metric,
        "nprobe": manifest.quality["nprobe"],
        "refine_factor": manifest.quality["refine_factor"],
        "recall@10": manifest.quality["recall@10"],
        "operating_points": read_operating_points(store, manifest.version),
        "bytes_per_vector": manifest.bytes_per_vector,
        "content_digest": manifest.content_digest,
        "rows": manifest.rows,
        "changes": manifest.changes,
        "num_deltas": len(segments) - 1,
        **deletions(manifest),
        "segments": segments,
        "sources": {key: value for key, value in manifest.sources.items() if key != "listing"},
        "model": manifest.model,
        "config": manifest.config,
    }

"""`info`: what the published version at a root is, from its manifest alone."""

from __future__ import annotations

from typing import Any

from operators.artifact.manifest import open_current
from operators.storage.store import open_store


def info(root: str) -> dict[str, Any]:
    """Facts of the published version as plain JSON. Raises IndexNotFoundError, IntegrityError.

    `rows` reconcile: read = indexed + rejected + dropped. `recall@10` is that of the index against exact search at the
    stored nprobe and refine_factor, on queries drawn from the corpus when it was built. `bytes_per_vector` counts all
    published objects.
    """
    manifest = open_current(open_store(root))
    segments = [
        {
            "name": segment.name,
            "num_rows": segment.num_rows,
            "parts": len(segment.parts),
            "size_bytes": sum(part.size_bytes for part in segment.parts),
        }
        for segment in manifest.segments
    ]
    return {
        "root": root,
        "version": manifest.version,
        "parent": manifest.parent,
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
        "bytes_per_vector": manifest.bytes_per_vector,
        "content_digest": manifest.content_digest,
        "rows": manifest.rows,
        "segments": segments,
        "sources": {key: value for key, value in manifest.sources.items() if key != "listing"},
        "model": manifest.model,
        "config": manifest.config,
    }

"""The gate before publishing: a version whose measured recall is too low is kept for inspection and not published."""

from __future__ import annotations

from operators.artifact.manifest import Manifest, write_candidate
from operators.errors import QualityError
from operators.storage.store import Store

MAX_RECALL_LOSS = 0.02  # of recall@10 under the parent's, in one step


def gate(
    store: Store, candidate: Manifest, parent_recall: float, min_recall: float, recall: float | None = None
) -> None:
    """Raise QualityError, after keeping the candidate, when its recall@10 is below a bound. CURRENT is as it was.

    parent_recall: of the version that it would replace, on the same queries. recall: the candidate's on queries of the
    user's; None: on the query sample.
    """
    sample = recall is None
    recall = candidate.quality["recall@10"] if recall is None else recall
    least = parent_recall - MAX_RECALL_LOSS
    if recall >= min_recall and recall >= least:
        return
    key = write_candidate(store, candidate)
    rule = (
        f"at least {min_recall:g} (--min-recall)"
        if recall < min_recall
        else f"at most {MAX_RECALL_LOSS:g} under the published version's {parent_recall:.4f}"
    )
    raise QualityError(
        f"recall@10 on {'the query sample' if sample else 'the queries given (--queries)'} must be {rule}, got {recall:.4f} at nprobe {candidate.quality['nprobe']} of"
        f" {candidate.nlist}; nothing was published, {candidate.parent} stays. The candidate is kept as {store.url}/{key}:"
        " look at it with `vectormill info`, `search` or `eval` and --version candidate; `vectormill drift` says what helps"
    )

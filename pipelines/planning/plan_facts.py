"""A plan as JSON, with its cost at given prices."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from cluster.capacity.gpu_rates import CITED
from cluster.capacity.objects import PUBLISHED, num_parts
from cluster.capacity.stages import LENGTHS, encode_s_per_token

if TYPE_CHECKING:
    from pipelines.planning.plan import Planned


@dataclasses.dataclass(frozen=True)
class Prices:
    """What things cost, in one currency; 0: not given."""

    node_hour: float = 0.0
    gpu_hour: float = 0.0
    gb_month: float = 0.0
    thousand_writes: float = 0.0
    thousand_reads: float = 0.0

    @property
    def any(self) -> bool:
        return any(dataclasses.astuple(self))


def cost(planned: Planned, prices: Prices) -> dict[str, float]:
    """In the currency of the prices: machines, requests, and a month of what is published."""
    hours = planned.seconds / 3600
    reads, writes = (sum(pair[i] for pair in planned.requests.values()) for i in (0, 1))
    published = sum(planned.sizes[kind] for kind in PUBLISHED)
    fleet = planned.work.fleet
    return {
        "machines": hours * (fleet.num_nodes * prices.node_hour + fleet.num_gpus * prices.gpu_hour),
        "requests": (reads * prices.thousand_reads + writes * prices.thousand_writes) / 1000,
        "storage_month": published / 1e9 * prices.gb_month,
    }


def plan_facts(planned: Planned, prices: Prices, explain: bool) -> dict[str, Any]:
    """What `plan --json` prints."""
    work, corpus = planned.work, planned.work.corpus
    encode = next(stage for stage in planned.stages if stage.name == "encode pieces")
    reads, writes = (sum(pair[i] for pair in planned.requests.values()) for i in (0, 1))
    facts: dict[str, Any] = {
        "documents": corpus.num_docs,
        "vectors": corpus.num_vectors,
        "tokens": round(corpus.num_tokens),
        "text_bytes": round(corpus.num_docs * corpus.bytes_per_doc),
        "pieces": work.num_pieces,
        "docs_per_piece": round(work.docs_per_piece, 1),
        "shards": work.num_shards,
        "merge_waves": len(work.runs_of_waves),
        "parts": num_parts(work, planned.coefficients),
        "index": {
            "d": work.model.d,
            "nlist": work.sizes.nlist,
            "M": work.sizes.M,
            "train_points": work.sizes.train_points,
        },
        "model": work.model.name,
        "fleet": dataclasses.asdict(work.fleet),
        "encoders": work.num_encoders,
        "encoder_rate": _rate_facts(planned),
        "seconds": round(planned.seconds, 1),
        "gpu_hours": round(work.fleet.num_gpus * planned.seconds / 3600, 2),
        "gpu_busy_hours": round(encode.parts["encoders"] * work.num_encoders / 3600, 2) if work.uses_gpu else 0.0,
        "stages": [
            {
                "name": stage.name,
                "seconds": round(stage.seconds, 2),
                "binds": stage.binds,
                "if_alone_s": {name: round(value, 2) for name, value in stage.parts.items()},
                "reads": round(planned.requests.get(stage.name, (0, 0))[0]),
                "writes": round(planned.requests.get(stage.name, (0, 0))[1]),
            }
            for stage in planned.stages
        ],
        "binds": {"stage": planned.binds.name, "by": planned.binds.binds},
        "memory": [
            {"stage": p.stage, "process": p.process, "bytes": round(p.size_bytes), "at_once": p.parallel}
            for p in planned.peaks
        ],
        "bytes": {name: round(value) for name, value in planned.sizes.items()},
        "published_bytes": round(sum(planned.sizes[kind] for kind in PUBLISHED)),
        "peak_storage_bytes": round(sum(planned.sizes.values())),
        "requests": {"reads": round(reads), "writes": round(writes), "storage_known": planned.storage_known},
        "pods": dataclasses.asdict(planned.pods),
        "recommended": planned.settings,
        "update": None if planned.update is None else {k: round(v, 1) for k, v in planned.update.items()},
        "warnings": planned.warnings,
    }
    if prices.any:
        facts["cost"] = {name: round(value, 2) for name, value in cost(planned, prices).items()}
    if explain:
        facts["coefficients"] = {
            name: {"value": one.value, "unit": one.unit, "source": one.source, "note": one.note}
            for name, one in sorted(planned.coefficients.used.items())
        }
    return facts


def _rate_facts(planned: Planned) -> dict[str, Any]:
    """Tokens/s of one encoder and where that is known from."""
    c, work = planned.coefficients, planned.work
    if work.uses_gpu:
        rate = c.table["gpu_tokens_per_s"]
        return {
            "tokens_per_s": round(rate.value),
            "source": rate.source,
            "note": rate.note,
            "measured": not rate.source.startswith(CITED),
        }
    seconds = encode_s_per_token(c, work.corpus.tokens_per_chunk) / work.threads_per_worker
    source = c.table[f"encode_s_per_token_{LENGTHS[0]}"].source
    return {"tokens_per_s": round(1 / seconds), "source": source, "note": "", "measured": True}

"""What a plan reckons with: every coefficient with its unit and the measurement that it comes from.

Committed values were measured on the machine that `source` names (a result under benchmarks/results/, by its path in
that file). `vectormill plan --calibrate` measures those that depend on the machine again; its file takes their place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

HERE = (
    "benchmarks/results/calibration.json"  # `vectormill plan --calibrate` on 2 cores of an AMD EPYC (Zen 4), 2026-11-21
)


@dataclass(frozen=True)
class Coefficient:
    """One number of the model. `source`: the result it stands in, or where it was measured."""

    value: float
    unit: str
    source: str
    note: str = ""


class Coefficients(Mapping[str, float]):
    """Values by name. Remembers which were asked for, so that a plan can name what it rests on."""

    def __init__(self, table: Mapping[str, Coefficient]) -> None:
        self.table = dict(table)
        self.used: dict[str, Coefficient] = {}

    def __getitem__(self, name: str) -> float:
        found = self.table[name]
        self.used[name] = found
        return found.value

    def __iter__(self) -> Iterator[str]:
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)


def measured() -> Coefficients:
    """The committed coefficients."""
    return Coefficients({name: Coefficient(*row) for name, row in _TABLE.items()})


def with_calibration(values: Mapping[str, float], file: str) -> Coefficients:
    """The committed coefficients with those of a calibration in their place; what it has besides is added."""
    table = measured().table
    for name, value in values.items():
        unit = table[name].unit if name in table else ""
        table[name] = Coefficient(value, unit, f"measured here: {file}")
    return Coefficients(table)


# What the rows hold: value, unit, source.
_TABLE: dict[str, tuple[float, str, str]] = {
    "assign_s_per_row_dim_list": (1.4931e-11, "s/row dim list", HERE),
    "bytes_per_token": (3.1451, "B/token", HERE),
    "check_s_per_doc": (3.2595e-07, "s/doc", HERE),
    "chunk_s_per_row": (0.0, "s/row", HERE),
    "chunk_s_per_token": (3.0152e-06, "s/token", HERE),
    "commit_s_per_piece": (0.0031027, "s/piece", HERE),
    "commit_s_per_row": (8.9325e-06, "s/row", HERE),
    "commit_s_per_text_byte": (2.0324e-09, "s/text byte", HERE),
    "compare_s_per_doc": (
        3.2e-06,
        "s/document",
        "benchmarks/results/nightly.json, rounds[0].update.stages.compare over corpus.texts",
    ),
    "documents_bytes_per_doc": (35.671, "B/doc", HERE),
    "documents_bytes_per_table": (1050.0, "B/table", HERE),
    "driver_bytes": (327680000.0, "B", HERE),
    "driver_bytes_per_piece": (
        8200.0,
        "B/piece",
        "benchmarks/results/limits.json, ingest.stream_memory: end_mb less before_mb, over ingest.pieces",
    ),
    "driver_s_per_piece": (0.011, "s/piece", "benchmarks/results/limits.json, ingest on Ray.piece_cpu_s.first_tenth"),
    "encode_codes_s_per_row_dim": (1.3662e-08, "s/row dim", HERE),
    "encode_s_per_token_128": (0.00014065, "s/token", HERE),
    "encode_s_per_token_16": (0.00012727, "s/token", HERE),
    "encode_s_per_token_256": (0.00014494, "s/token", HERE),
    "encode_s_per_token_32": (0.00013022, "s/token", HERE),
    "encode_s_per_token_64": (0.00013384, "s/token", HERE),
    "encoded_bytes_per_piece": (5083.4, "B/piece", HERE),
    "encoded_bytes_per_row": (34.597, "B/row", HERE),
    "encoded_bytes_per_text_byte": (0.39226, "B/text byte", HERE),
    "encoder_bytes": (643760000.0, "B", HERE),
    "encoder_bytes_per_weight": (6.0, "B/weight", "operators/encoding/forward.py: loaded in float32, kept in bfloat16"),
    "encoder_weights": (22714000.0, "weights", HERE),
    "exact_bytes": (3019.0, "B", HERE),
    "exact_search_s_per_row_dim_query": (1.0584e-10, "s/row dim query", HERE),
    "fixed_s_build_shards": (
        0.092,
        "s",
        "benchmarks/results/build_throughput.json, rounds[0], less the formulas' part",
    ),
    "fixed_s_check_encoder": (
        8.042,
        "s",
        "benchmarks/results/build_throughput.json, rounds[0], less the formulas' part",
    ),
    "fixed_s_draw_samples": (
        0.037,
        "s",
        "benchmarks/results/build_throughput.json, rounds[0], less the formulas' part",
    ),
    "fixed_s_list_sources": (0.0, "s", "benchmarks/results/build_throughput.json, rounds[0], less the formulas' part"),
    "fixed_s_measure_recall": (
        0.301,
        "s",
        "benchmarks/results/build_throughput.json, rounds[0], less the formulas' part",
    ),
    "fixed_s_merge_parts": (0.007, "s", "benchmarks/results/build_throughput.json, rounds[0], less the formulas' part"),
    "fixed_s_number_rows": (0.046, "s", "benchmarks/results/build_throughput.json, rounds[0], less the formulas' part"),
    "fixed_s_publish": (1.411, "s", "benchmarks/results/build_throughput.json, rounds[0], less the formulas' part"),
    "fixed_s_train_quantizer": (
        0.65,
        "s",
        "benchmarks/results/build_throughput.json, rounds[0], less the formulas' part",
    ),
    "fixed_s_verify": (0.0, "s", "benchmarks/results/build_throughput.json, rounds[0], less the formulas' part"),
    "fixed_s_write_ledger": (
        0.096,
        "s",
        "benchmarks/results/build_throughput.json, rounds[0], less the formulas' part",
    ),
    "kmeans_s_per_row_dim": (4.7101e-09, "s/row dim", HERE),
    "ledger_check_bytes_per_doc": (200.0, "B/document", "docs/architecture.md, Memory"),
    "ledger_s_per_piece": (0.0014097, "s/piece", HERE),
    "ledger_s_per_row": (9.867e-07, "s/row", HERE),
    "ledger_s_per_text_byte": (1.866e-09, "s/text byte", HERE),
    "libraries_bytes": (271420000.0, "B", HERE),
    "listing_bytes": (2663.8, "B", HERE),
    "listing_bytes_per_object": (6.2452, "B/object", HERE),
    "manifest_bytes": (7815.0, "B", HERE),
    "manifest_bytes_per_part": (688.0, "B/part", HERE),
    "merge_buffers": (5.0, "buffers", "operators/merger.py"),
    "merge_s_per_row": (4.732e-06, "s/row", HERE),
    "merge_s_per_text_byte": (5.9355e-09, "s/text byte", HERE),
    "number_rows_bytes_per_hash": (50.0, "B/document", "docs/architecture.md, Memory"),
    "number_s_per_piece": (0.00043021, "s/piece", HERE),
    "number_s_per_row": (3.7145e-07, "s/row", HERE),
    "number_s_per_text_byte": (0.0, "s/text byte", HERE),
    "open_run_s": (0.00083206, "s", HERE),
    "plain_s_per_token": (0.00029468, "s/token", HERE),
    "plan_s_per_piece": (
        8e-05,
        "s/piece",
        "benchmarks/results/limits.json, ingest.stage_s.list sources over ingest.pieces",
    ),
    "pass_s_per_hash": (1.8327e-07, "s/hash", HERE),
    "pq_train_s_per_row_dim": (9.783e-09, "s/row dim", HERE),
    "process_start_s": (
        2.83,
        "s",
        "benchmarks/results/nightly.json, rounds[0].base: process_s less seconds and start_ray_s",
    ),
    "quantizer_bytes": (180.0, "B", "docs/artifact-format.md: the header of an IndexIVFPQ"),
    "queries_bytes": (1692.6, "B", HERE),
    "queries_bytes_per_query": (52.138, "B/query", HERE),
    "ray_bytes": (651950000.0, "B", HERE),
    "ray_join_s": (
        3.095,
        "s",
        "benchmarks/results/build_throughput.json, rounds[0].apart.start_ray_s (joining takes less)",
    ),
    "ray_start_s": (3.095, "s", "benchmarks/results/build_throughput.json, rounds[0].apart.start_ray_s"),
    "read_s_per_piece": (0.0010015, "s/piece", HERE),
    "read_s_per_row": (1.5722e-06, "s/row", HERE),
    "read_s_per_text_byte": (4.2045e-09, "s/text byte", HERE),
    "record_bytes": (891.12, "B", HERE),
    "refine_growth": (
        2.0,
        "times index.refine_factor",
        "benchmarks/results/searched_lists.json, sizes[2].refine_factor over the setting",
    ),
    "rows_bytes_per_row": (35.257, "B/row", HERE),
    "rows_bytes_per_run": (1418.0, "B/run", HERE),
    "rows_bytes_per_text_byte": (0.39261, "B/text byte", HERE),
    "sample_s_per_piece": (0.0017986, "s/piece", HERE),
    "sample_s_per_row": (3.626e-06, "s/row", HERE),
    "sample_s_per_text_byte": (0.0, "s/text byte", HERE),
    "search_s_per_code_byte": (5.5352e-10, "s/code byte", HERE),
    "searches": (15.0, "searches", "benchmarks/results/searched_lists.json, sizes[2].searches"),
    "searched_share": (4.937, "whole indices", "benchmarks/results/searched_lists.json, sizes[2].searched_share"),
    "shard_bytes_per_text_byte": (4.0, "copies", "operators/shard_builder.py, operators/artifact/list_run.py"),
    "shard_bytes_per_vector_byte": (
        3.0,
        "copies",
        "operators/shard_builder.py: pieces, all of them, all of them in order",
    ),
    "shard_s_per_piece": (0.0036512, "s/piece", HERE),
    "shard_s_per_row": (6.8467e-06, "s/row", HERE),
    "shard_s_per_text_byte": (4.5224e-09, "s/text byte", HERE),
    "stream_s_per_piece": (0.06, "s/piece", "docs/decisions/0005-small-pieces-by-default.md: 30 ms on 2 cores"),
    "stream_start_s": (10.859, "s", "benchmarks/results/build_throughput.json, rounds[0].apart.first_encoder_ready_s"),
    "task_worker_bytes": (508960000.0, "B", HERE),
    "two_level_s_per_row_dim": (2.8163e-08, "s/row dim", HERE),
    "two_level_s_per_row_dim_root": (1.2058e-10, "s/row dim root", HERE),
    "update_bytes_per_doc": (200.0, "B/document", "docs/architecture.md, Memory"),
    "verify_s_per_row": (7.8031e-06, "s/row", HERE),
    "verify_s_per_text_byte": (1.0348e-09, "s/text byte", HERE),
}

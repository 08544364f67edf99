"""`plan`: how long a build will take, what it needs and what binds it, before it runs; and settings that suit it.

The arithmetic is in cluster/capacity/; here the settings are chosen, and the outcome is judged.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from cluster.capacity.coefficients import Coefficient, Coefficients, measured, with_calibration
from cluster.capacity.gpu_rates import cited_rate
from cluster.capacity.memory import MemoryPeak, memory_peaks, update_driver_bytes
from cluster.capacity.objects import object_bytes
from cluster.capacity.pods import PodSizes, size_pods
from cluster.capacity.stages import LENGTHS, StageTime, encode_s_per_token, stage_times
from cluster.capacity.storage_requests import stage_requests
from cluster.capacity.workload import Workload
from pipelines.config import RunConfig, load_config
from pipelines.planning.plan_inputs import Asked, workload
from pipelines.planning.plan_limits import find_limits

MAX_PIECES = 100_000
MIN_PIECES_PER_ENCODER = 20
MAX_PIECE_ROWS, MAX_PIECE_BYTES = 32_768, 64 << 20
GPU_BATCH_TOKENS = 65_536  # docs/architecture.md, Settings
TWO_LEVEL_FROM, TWO_LEVEL_SHARE = 8192, 0.97  # index.assign_share: for an nlist of 10,000s
MAX_PARTS = 4096
MAX_FAN_IN = 256
STALL_MARGIN = 2.0
SOURCE_READS = 4  # requests in which a piece of a source object is read


@dataclasses.dataclass(frozen=True)
class Storage:
    """What is known of the storage; None: not said, and not measured."""

    latency_s: float | None = None
    bytes_per_s: float | None = None


@dataclasses.dataclass(frozen=True)
class Planned:
    """A plan. `settings` are what is recommended beside what was given."""

    work: Workload
    config: RunConfig
    settings: dict[str, Any]
    coefficients: Coefficients
    stages: list[StageTime]
    peaks: list[MemoryPeak]
    sizes: dict[str, float]
    requests: dict[str, tuple[float, float]]
    pods: PodSizes
    warnings: list[str]
    update: dict[str, float] | None
    storage_known: bool

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def binds(self) -> StageTime:
        return max(self.stages, key=lambda stage: stage.seconds)


def plan(
    asked: Asked,
    assignments: Sequence[str] = (),
    *,
    config_file: str | None = None,
    options: dict[str, tuple[Any, str]] | None = None,
    calibration: dict[str, float] | None = None,
    calibration_file: str = "",
    tokens_per_s_per_gpu: float | None = None,
    storage: Storage | None = None,
    changed: float | None = None,
    deadline_s: float | None = None,
    as_given: bool = False,
) -> Planned:
    """The plan of a build. What is given by assignments, file and options stays; the rest is chosen, unless `as_given`.

    Raises ConfigError for what cannot be planned: no rate for the GPU, a setting that does not fit.
    """
    given = load_config(config_file, assignments, options)
    coefficients = with_calibration(calibration, calibration_file) if calibration is not None else measured()
    storage_known = _set_storage(coefficients, storage or Storage(), asked.on_s3)
    per_token = coefficients["bytes_per_token"]
    settings: dict[str, Any] = {}
    config = given
    if not as_given:
        named = {assignment.partition("=")[0].strip() for assignment in assignments} | set(options or {})
        settings = recommended(asked, given, per_token, named)
        config = load_config(None, (), {name: (value, "plan") for name, value in settings.items()}, given)
    work = workload(asked, config, per_token)
    if work.uses_gpu:
        _set_gpu_rate(coefficients, work, tokens_per_s_per_gpu)
    stages = stage_times(work, coefficients)
    if not as_given and "cluster.stall_timeout_s" not in named:
        longest = max(stage.single_task_s for stage in stages)
        if STALL_MARGIN * longest > config.cluster.stall_timeout_s:
            settings["cluster.stall_timeout_s"] = float(math.ceil(STALL_MARGIN * longest / 900) * 900)
            config = load_config(None, (), {name: (value, "plan") for name, value in settings.items()}, given)
            work = workload(asked, config, per_token)
    peaks = memory_peaks(work, coefficients)
    update = None if changed is None else update_plan(work, coefficients, changed)
    planned = Planned(
        work,
        config,
        settings,
        coefficients,
        stages,
        peaks,
        object_bytes(work, coefficients),
        stage_requests(work, coefficients),
        size_pods(work, coefficients, for_updates=changed is not None),
        [],
        update,
        storage_known,
    )
    planned.warnings.extend(find_limits(planned, deadline_s))
    return planned


def recommended(asked: Asked, given: RunConfig, bytes_per_token: float, named: set[str]) -> dict[str, Any]:
    """Settings that suit the corpus and the machines, but for those that were named."""
    work = workload(asked, given, bytes_per_token)
    found: dict[str, Any] = {}
    rows = given.read.piece_rows
    while asked.docs / rows > MAX_PIECES and rows < MAX_PIECE_ROWS:
        rows *= 2
    if work.uses_gpu:  # fewer, larger pieces keep a GPU busy
        while rows < 16_384 and asked.docs / (2 * rows) > MIN_PIECES_PER_ENCODER * work.num_encoders:
            rows *= 2
    if rows != given.read.piece_rows:
        found["read.piece_rows"] = rows
    needed = rows * (work.corpus.bytes_per_doc + work.corpus.id_bytes)
    size = given.read.piece_bytes
    while size < 1.2 * needed and size < MAX_PIECE_BYTES:
        size *= 2
    if size != given.read.piece_bytes:
        found["read.piece_bytes"] = size
    if work.uses_gpu:
        found["encode.batch_tokens"] = GPU_BATCH_TOKENS
        found["encode.precision"] = "bfloat16"
    found["encode.workers"] = work.num_encoders
    sizes = work.sizes
    found |= {"index.nlist": sizes.nlist, "index.M": sizes.M}
    if sizes.nlist >= TWO_LEVEL_FROM:
        found["index.assign_share"] = TWO_LEVEL_SHARE
    shards = math.ceil(work.corpus.num_vectors / given.index.shard_rows)
    if shards > given.index.merge_fan_in:  # one wave in place of several
        found["index.merge_fan_in"] = min(MAX_FAN_IN, max(given.index.merge_fan_in, math.ceil(math.sqrt(shards)) + 1))
    entries = work.corpus.num_vectors * (2 * work.model.d + sizes.code_size + 100 + work.corpus.bytes_per_doc)
    part = given.index.part_bytes
    while entries / part > MAX_PARTS:
        part *= 2
    if part != given.index.part_bytes:
        found["index.part_bytes"] = part
    return {name: value for name, value in found.items() if name not in named}


def update_plan(work: Workload, c: Coefficients, changed: float) -> dict[str, float]:
    """A nightly update in which this share of the documents is new or edited, spread over all objects (all are scanned)."""
    docs = work.corpus.num_docs
    scan = docs * (c["read_s_per_row"] + work.corpus.bytes_per_doc * c["read_s_per_text_byte"])
    scan += work.num_pieces * c["read_s_per_piece"]
    waits = 0.0
    if work.on_s3:
        waits = SOURCE_READS * work.num_pieces * c["storage_get_s"] / work.fleet.num_slots
        waits += docs * work.corpus.bytes_per_doc / (work.fleet.num_nodes * c["storage_bytes_per_s"])
    tokens = work.corpus.num_tokens * changed
    if work.uses_gpu:
        encode = tokens / c["gpu_tokens_per_s"] / work.num_encoders
    else:
        encode = tokens * encode_s_per_token(c, work.corpus.tokens_per_chunk)
        encode /= work.num_encoders * work.threads_per_worker
    return {
        "documents_changed": docs * changed,
        "scan_s": scan / work.fleet.num_cores + waits,
        "compare_s": docs * c["compare_s_per_doc"],
        "encode_s": encode,
        "driver_bytes": update_driver_bytes(work, c),
    }


def _set_storage(c: Coefficients, storage: Storage, on_s3: bool) -> bool:
    """Fill what the times need of the storage; False where it is not known: then waiting is left out of them."""
    known = ("storage_get_s" in c.table or storage.latency_s is not None) and (
        "storage_bytes_per_s" in c.table or storage.bytes_per_s is not None
    )
    said = storage.latency_s is not None
    latency = Coefficient(storage.latency_s or 0.0, "s", "--storage-latency-ms" if said else "not known")
    for name in ("storage_get_s", "storage_put_s"):
        if storage.latency_s is not None or name not in c.table:
            c.table[name] = latency
    if storage.bytes_per_s is not None or "storage_bytes_per_s" not in c.table:
        source = "--network-gbit" if storage.bytes_per_s else "not known"
        c.table["storage_bytes_per_s"] = Coefficient(storage.bytes_per_s or math.inf, "B/s", source)
    return known or not on_s3


def _set_gpu_rate(c: Coefficients, work: Workload, tokens_per_s: float | None) -> None:
    """Tokens/s of a GPU: as given, as calibrated, or as published."""
    if tokens_per_s is not None:
        rate = Coefficient(tokens_per_s, "tokens/s a GPU", "--tokens-per-s-per-gpu")
    elif f"gpu_s_per_token_{LENGTHS[0]}" in c.table:
        names = {f"encode_s_per_token_{n}": c.table[f"gpu_s_per_token_{n}"] for n in LENGTHS}
        seconds = encode_s_per_token(Coefficients(names), work.corpus.tokens_per_chunk)
        rate = Coefficient(1 / seconds, "tokens/s a GPU", names[f"encode_s_per_token_{LENGTHS[0]}"].source)
    else:
        rate = cited_rate(work.fleet.gpu, work.model)
    c.table["gpu_tokens_per_s"] = rate

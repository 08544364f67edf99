"""`plan --calibrate`: measures what a plan reckons with, on this machine or cluster, by short runs of the build's own code.

Encoders run as tasks, as many at once as a build would have; the stages behind them run on small made pieces; three tiny
builds give what a build takes beside its work (start of Ray, of workers, of tasks; the medians). None of it is a run that a
plan is checked against (benchmarks/plan_check.py). Takes three to four minutes.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import random
import secrets
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.capacity.coefficients import measured
from cluster.capacity.stages import stage_times
from cluster.capacity.workload import Corpus, Fleet, ModelShape, Workload
from cluster.session import Session, connect
from cluster.tasks import run_tasks
from operators.encoding.encode_config import configured_model, precision_of_run
from operators.storage.store import Store, open_store
from pipelines.config import RunConfig
from pipelines.demo_corpus import collect_documents
from pipelines.planning.calibrate_build import tiny_build
from pipelines.planning.calibrate_encoder import measure_encoder
from pipelines.planning.calibrate_kernels import measure_kernels
from pipelines.planning.calibrate_stages import NUM_TEXTS, least_s, measure_stages
from pipelines.planning.calibration_file import write_calibration
from pipelines.planning.plan_inputs import model_shape
from pipelines.telemetry.progress import RunProgress

DOCUMENTS = 6000
WORDS_FOR_ENCODERS = 100_000
WORDS_PER_TEXT = 24
TOKENS_PER_WORD = 1.6  # of docstrings, about: what it is out is out by a part of a second of the tiny build
PIECES, PIECE_ROWS = 64, 16  # of the tiny build
TINY_BUILDS = 3
FROM_BUILD = (
    "process_start_s",
    "search_s_per_code_byte",
    "driver_bytes",
    "task_worker_bytes",
    "ray_bytes",
    "manifest_bytes",
    "exact_bytes",
)
TRANSFER_BYTES = 16 << 20
TRANSFER_REPEATS = 5
SMALL_PUTS = 16


def calibrate(config: RunConfig, root: str | None, progress: RunProgress) -> dict[str, Any]:
    """Coefficients measured here, by name, and what they were measured with. root: a folder or s3:// prefix for the index."""
    precision = precision_of_run(config.encode)
    config = dataclasses.replace(config, encode=dataclasses.replace(config.encode, precision=precision))
    spec = configured_model(config.encode)
    found: dict[str, float] = {}
    progress.stage("read texts")
    words = " ".join(document.text for document in collect_documents(DOCUMENTS)).split()
    texts = [" ".join(words[n * WORDS_PER_TEXT : (n + 1) * WORDS_PER_TEXT]) for n in range(NUM_TEXTS)]
    random.Random(0).shuffle(texts)  # neighbours that have nothing to do with each other compress the least
    with tempfile.TemporaryDirectory(prefix="vectormill-calibration-") as folder:
        progress.stage("encoders")
        encoders, session = _measure_encoders(config, words, found)
        progress.stage("stages and kernels")
        shape = model_shape(config, spec)
        M = max(M for M in range(1, spec.d // 8 + 1) if spec.d % M == 0)
        found |= measure_stages(open_store(f"{folder}/stages"), texts, spec.d, M)
        found |= measure_kernels(spec.d, M, config.index.coarse_iterations, config.index.pq_iterations)
        if root is not None:
            progress.stage("storage")
            found |= measure_storage(open_store(root))
        progress.stage("tiny build")
        few = texts[: PIECE_ROWS * PIECES]
        place = folder if root is None else f"{root.rstrip('/')}/.calibration-{secrets.token_hex(8)}"
        try:
            tiny = [tiny_build(f"{place}/{n}", few, PIECE_ROWS, config, encoders) for n in range(TINY_BUILDS)]
        finally:
            open_store(place).delete_tree("")
    _add_fixed(found, config, shape, session, few, encoders, _medians(tiny))
    return {
        "coefficients": {name: float(f"{value:.5g}") for name, value in sorted(found.items())},
        "settings": {
            "model": spec.name,
            "fingerprint": spec.fingerprint,
            "precision": precision,
            "threads_per_worker": config.encode.threads_per_worker,
            "batch_tokens": config.encode.batch_tokens,
            "encoders": encoders,
            "cpus": session.num_cpus,
            "gpus": session.num_gpus,
            "root": None if root is None else root.split("://")[0] if "://" in root else "local disk",
        },
    }


def _measure_encoders(config: RunConfig, words: Sequence[str], found: dict[str, float]) -> tuple[int, Session]:
    """Run `measure_encoder` on as many workers as a build would have encoders; their number and the session's totals."""
    began = time.monotonic()
    with connect(dataclasses.replace(config.cluster, where="ray")) as session:
        found["ray_start_s"] = time.monotonic() - began
        on_gpu = config.encode.device != "cpu" and session.num_gpus > 0
        threads = config.encode.threads_per_worker
        encoders = int(session.num_gpus) if on_gpu else max(1, int(session.num_cpus - 1) // threads)
        calls = [(config.encode, words[:WORDS_FOR_ENCODERS])] * encoders
        results = run_tasks(measure_encoder, calls, num_cpus=1 if on_gpu else threads, num_gpus=int(on_gpu))
    for name in results[0]:
        values = [result[name] for result in results]
        found[name] = max(values) if name.endswith("_bytes") else sum(values) / len(values)
    if on_gpu:
        lengths = [name for name in found if name.startswith("encode_s_per_token_")]
        found |= {name.replace("encode_s", "gpu_s"): found.pop(name) for name in lengths}
    return encoders, session


def measure_storage(store: Store) -> dict[str, float]:
    """Latency of a small put and get, and bytes a second of one large transfer each way, at a root. Leaves nothing there."""
    key = f".calibration-{secrets.token_hex(8)}"
    try:
        small = b"x" * 1024

        def put(number: int) -> None:
            store.put(f"{key}/small-{number}", small)

        puts = least_s(lambda _: list(map(put, range(SMALL_PUTS))), clock=time.perf_counter) / SMALL_PUTS
        gets = least_s(
            lambda _: [store.read(f"{key}/small-{number}") for number in range(SMALL_PUTS)], clock=time.perf_counter
        )
        gets /= SMALL_PUTS
        large = os.urandom(TRANSFER_BYTES)
        written = least_s(lambda _: store.put(f"{key}/large", large), TRANSFER_REPEATS, time.perf_counter)
        read = least_s(lambda _: store.read(f"{key}/large"), TRANSFER_REPEATS, time.perf_counter)
    finally:
        store.delete_tree(key)
    return {
        "storage_put_s": puts,
        "storage_get_s": gets,
        "storage_bytes_per_s": TRANSFER_BYTES / max(written, read),
    }


def _medians(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One run of which every number, also those of its stages, is the median: starts vary by half."""
    return {
        name: _medians([run[name] for run in runs])
        if isinstance(value, dict)
        else statistics.median(run.get(name, 0.0) for run in runs)
        for name, value in runs[0].items()
    }


def _add_fixed(
    found: dict[str, float],
    config: RunConfig,
    shape: ModelShape,
    session: Session,
    texts: Sequence[str],
    encoders: int,
    tiny: dict[str, Any],
) -> None:
    """What a stage takes beside its work: the tiny build's seconds less what the formulas say of its work."""
    found |= {name: tiny[name] for name in FROM_BUILD}
    found["ray_start_s"] = tiny["stages"].get("start Ray", found["ray_start_s"])
    found["ray_join_s"] = found["ray_start_s"]  # joining takes less
    found["manifest_bytes"] -= found["manifest_bytes_per_part"]
    found["driver_s_per_piece"] = tiny["stream_driver_cpu_s"] / (PIECES - 1)
    found |= {"stream_s_per_piece": 0.0, "stream_start_s": 0.0}
    base = measured().table
    stages = [name for name in base if name.startswith("fixed_s_")]
    known = {name: one.value for name, one in base.items()} | dict.fromkeys(stages, 0.0) | found
    known["gpu_tokens_per_s"] = 1 / known.get("gpu_s_per_token_32", 1.0)
    cores, gpus = max(1, int(session.num_cpus - 1)), int(session.num_gpus)
    work = Workload(
        Corpus(len(texts), TOKENS_PER_WORD * WORDS_PER_TEXT + 2, sum(map(len, texts)) / len(texts)),
        shape,
        Fleet(1, cores, 1e9, gpus, "here" if gpus else "none"),
        dataclasses.replace(config.read, piece_rows=PIECE_ROWS),
        workers=encoders,
        on_s3=False,
    )
    times = {stage.name: stage for stage in stage_times(work, known)}
    parts = times["encode pieces"].parts
    alone = max(parts["encoders"], parts["CPU cores"])
    # The first pieces of all encoders come together; the others follow while everything is busy.
    rest = PIECES - encoders
    found["stream_s_per_piece"] = max(0.0, tiny["stream_s"] / rest - alone / PIECES) * cores
    found["stream_start_s"] = max(0.0, tiny["stages"]["encode pieces"] - tiny["stream_s"] - alone / PIECES * encoders)
    for name in stages:
        stage = name.removeprefix("fixed_s_").replace("_", " ")
        found[name] = max(0.0, tiny["stages"].get(stage, 0.0) - times[stage].seconds)


def calibrate_to_file(config: RunConfig, root: str | None, out: str | None, progress: RunProgress) -> dict[str, Any]:
    """The report of `calibrate`, written to `out` if that is given."""
    with progress:
        report = {**calibrate(config, root, progress), "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    report["hardware"] = {"cpu": _cpu_name(), "cores": os.cpu_count()}
    if out is not None:
        write_calibration(out, report)
    return report


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())

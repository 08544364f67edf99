"""The arithmetic of plans: units are those of the code, bytes add up, nothing shrinks as the corpus grows."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.capacity import memory, objects, stages, storage_requests, workload
from cluster.capacity.coefficients import HERE, Coefficient, Coefficients, measured
from cluster.capacity.gpu_rates import CITED, cited_rate
from cluster.capacity.memory import memory_peaks
from cluster.capacity.objects import PUBLISHED, object_bytes
from cluster.capacity.pods import size_pods
from cluster.capacity.stages import kmeans_rows, pq_rows, stage_times
from cluster.capacity.storage_requests import stage_requests
from cluster.capacity.workload import TABLE_DOCUMENTS, Corpus, Fleet, ModelShape, Workload
from cluster.preflight import StreamPlan, plan_stream
from cluster.session import Session
from cluster.stream import BLOCK_BYTES, pieces_per_task
from kernels import kmeans
from kernels import pq as kernels_pq
from operators import query_sample, trainer
from operators.artifact import exact_neighbours, index, part_scan, verifier
from operators.artifact.manifest import Manifest, PartRef, Segment
from operators.errors import ConfigError
from operators.sources.listing import list_sources
from operators.sources.pieces import plan_pieces
from operators.sources.read_config import ReadConfig
from operators.storage import checked, s3_store
from pipelines import index_build, numbering, recall
from pipelines.index_build import group_pieces

ROOT = Path(__file__).resolve().parents[2]
MINILM = ModelShape("all-MiniLM-L6-v2", 384, 384, 6, 22.7e6)
SIZES = (1, 100, 1500, 8000, 45_000, 10**6, 10**7, 10**8, 10**9)


def a_workload(num_docs: int, **changes: Any) -> Workload:
    fleet = changes.pop("fleet", Fleet(1, 2, 24e9))
    corpus = Corpus(num_docs, 33, 106, num_objects=max(1, num_docs // 10**6))
    return Workload(corpus, MINILM, fleet, on_s3=False, **changes)


def known(**more: float) -> Coefficients:
    """The committed coefficients, with a storage and a GPU."""
    table = measured().table
    values = {"gpu_tokens_per_s": 1e6, "storage_get_s": 0.03, "storage_put_s": 0.03, "storage_bytes_per_s": 1e9, **more}
    return Coefficients(table | {name: Coefficient(value, "", "test") for name, value in values.items()})


def test_planning_imports_neither_ray_nor_torch() -> None:
    program = "import cluster.capacity.pods, cluster.capacity.stages, cluster.capacity.gpu_rates, sys; print({'ray', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_rows_of_training_are_those_of_the_kernels() -> None:
    for rows, lists, iterations in (
        (3000, 64, 8),
        (65_536, 512, 8),
        (6_553_600, 65_536, 8),
        (100, 8, 3),
        (5000, 40, 11),
    ):
        steps = [kmeans._row_step(number, iterations, rows, lists) for number in range(1, iterations + 1)]
        assert kmeans_rows(rows, lists, iterations) == sum(len(range(0, rows, step)) for step in steps)
    for rows, nbits, iterations in ((10_240, 8, 16), (65_536, 8, 16), (900, 4, 5)):
        assert pq_rows(rows, nbits, iterations) == sum(kernels_pq._part_sizes(rows, 1 << nbits, iterations))


def test_constants_are_those_of_the_code() -> None:
    assert (workload.HASHES_PER_PASS, workload.DOCUMENTS_PER_RUN) == (
        numbering.HASHES_PER_PASS,
        numbering.DOCUMENTS_PER_RUN,
    )
    assert (objects.GROUP_ROWS, objects.MOST_GROUPS) == (part_scan.GROUP_ROWS, part_scan.MOST_GROUPS)
    assert storage_requests.SCANNED_AT_ONCE == part_scan.BLOCK_ROWS
    assert storage_requests.CACHE_BYTES == index.CACHE_BYTES
    assert storage_requests.PROBE_RECALL_K == recall.PROBE_RECALL_K
    assert stages.RECORD_READERS == index.OPENED_AT_ONCE
    assert memory.PQ_TRAIN_POINTS == trainer.PQ_TRAIN_POINTS
    assert stages.QUERIES_PER_PIECE == objects.QUERIES_PER_PIECE == query_sample.QUERIES_PER_PIECE
    assert stages.PQ_TRAIN_POINTS == trainer.PQ_TRAIN_POINTS
    assert stages.REENCODED_ENTRIES == verifier.REENCODED_ENTRIES
    assert stages.MIN_ROWS_PER_CENTROID == kmeans.MIN_ROWS_PER_CENTROID
    assert (stages.MAX_EXACT_LISTS, stages.GROUP_ITERATIONS) == (
        kmeans.MAX_EXACT,
        kmeans.GROUP_ITERATIONS,
    )
    assert stages.ROWS_PER_CODEWORD == kernels_pq.ROWS_PER_CODEWORD
    assert objects.BLOCK_BYTES == checked.BLOCK_BYTES
    assert objects.EXACT_KEPT == exact_neighbours.KEPT
    assert storage_requests.MULTIPART_BYTES == s3_store.PART_BYTES
    assert TABLE_DOCUMENTS == index_build.TABLE_DOCUMENTS


def test_every_committed_coefficient_stands_in_the_result_that_it_names() -> None:
    here = json.loads((ROOT / HERE).read_text())["coefficients"]
    for name, one in measured().table.items():
        assert one.unit, name
        if one.source == HERE:
            assert one.value == pytest.approx(here[name], rel=1e-6), name
        else:
            assert (ROOT / one.source.split(",")[0].split(":")[0]).exists(), (name, one.source)


@pytest.mark.parametrize("rows_of_group", [400, 1024, 3000])
def test_pieces_are_as_many_as_the_reader_cuts(rows_of_group: int, tmp_path: Path) -> None:
    rows = 5000
    table = pa.table({"id": [f"{n:016d}" for n in range(rows)], "text": ["a word or two, " * 7] * rows})
    pq.write_table(
        table, tmp_path / "corpus.parquet", row_group_size=rows_of_group, compression="none", use_dictionary=False
    )
    read = ReadConfig(piece_rows=rows_of_group)
    found = plan_pieces(list_sources([str(tmp_path)]).objects, read).pieces({})
    work = Workload(Corpus(rows, 20, 105), MINILM, Fleet(1, 2, 24e9), read)
    assert work.num_pieces == len(found)


def test_hash_runs_and_scans_are_as_many_as_the_build_makes() -> None:
    for num_docs in (10**6, 10**7, 10**7 + 1, 3 * 10**7, 10**9):
        work, c = a_workload(num_docs, read=ReadConfig(piece_rows=16_384, piece_bytes=1 << 30)), known()
        piece: Any = SimpleNamespace(facts={"num_docs": work.docs_per_piece})
        runs = len(numbering.consecutive([piece] * work.num_pieces, numbering.DOCUMENTS_PER_RUN))
        assert work.num_hash_runs == (runs if num_docs > numbering.HASHES_PER_PASS else 0)
        num_parts = objects.num_parts(work, c)
        ref = PartRef("", "", 0, 0, num_docs // num_parts, 0, [])
        segment = Segment("base", 0, num_docs, [ref] * num_parts)
        manifest = cast(Manifest, SimpleNamespace(segments=[segment]))
        assert objects.num_scans(work, c) == pytest.approx(recall.count_scans(manifest), rel=0.02)


def test_few_hashes_and_vectors_are_one_task_and_many_are_not() -> None:
    c, fleet = known(), Fleet(8, 96, 1e12, is_local=False)
    small, large = (a_workload(num_docs, fleet=fleet) for num_docs in (5 * 10**5, 10**9))
    for name, stage in {stage.name: stage for stage in stage_times(small, c)}.items():
        if name in ("number rows", "train quantizer", "measure recall"):
            assert 0.9 * stage.seconds <= stage.single_task_s + 0.5, name
    alone = {stage.name: stage.single_task_s for stage in stage_times(large, c)}
    assert alone["number rows"] == 0
    assert sum(alone.values()) < 3600


def test_searches_are_those_that_were_measured() -> None:
    found = json.loads((ROOT / "benchmarks/results/searched_lists.json").read_text())
    c = measured()
    last = found["sizes"][-1]
    assert [a_workload(row["vectors"]).sizes.nlist for row in found["sizes"]] == [32, 128, 1024]
    assert all(c["searched_share"] >= row["searched_share"] > 0.75 * c["searched_share"] for row in found["sizes"])
    assert (c["searches"], c["searched_share"]) == (last["searches"], last["searched_share"])
    assert c["refine_growth"] == last["refine_factor"] / a_workload(1).index.refine_factor


def test_shards_tables_and_waves_are_as_many_as_the_build_makes() -> None:
    for pieces, rows, shard_rows in ((7, 1000, 2500), (45, 1024, 8192), (3, 50_000, 10_000)):
        records: Any = [SimpleNamespace(facts={"num_chunks": rows, "num_docs": rows})] * pieces
        numbered: Any = SimpleNamespace(counts=[rows] * pieces, bases=[0] * pieces, dropped={})
        work = a_workload(
            pieces * rows,
            read=ReadConfig(piece_rows=rows, piece_bytes=1 << 30),
            index=dataclasses.replace(a_workload(1).index, shard_rows=shard_rows, merge_fan_in=2),
        )
        assert work.num_pieces == pieces
        assert work.num_shards == len(group_pieces(records, numbered, shard_rows))
        assert work.num_tables == len(index_build.ledger_groups(records))
        assert not work.runs_of_waves or (work.runs_of_waves[-1] <= 2 < ([work.num_shards, *work.runs_of_waves])[-2])


@pytest.mark.parametrize(
    ("fleet", "threads"),
    [(Fleet(1, 2, 1e9), 1), (Fleet(4, 16, 1e9, 8, "a100", False), 1), (Fleet(3, 8, 1e9, is_local=False), 3)],
)
def test_encoders_are_as_many_as_the_preflight_check_gives(fleet: Fleet, threads: int) -> None:
    work = a_workload(10**7, fleet=fleet, threads_per_worker=threads)
    session = Session(fleet.num_slots, fleet.num_gpus, fleet.cpus_per_node)
    from cluster.supply import NodeSupply

    slots = fleet.cpus_per_node + (1 if fleet.is_local else 0)
    session = dataclasses.replace(session, nodes=tuple([NodeSupply(slots, fleet.gpus_per_node)] * fleet.num_nodes))
    found = plan_stream(session, workers=0, threads_per_worker=threads, use_gpu=work.uses_gpu, pieces_in_flight=0)
    assert (work.num_encoders, work.pieces_in_flight) == (found.workers, found.pieces_in_flight)


def test_nothing_shrinks_as_the_corpus_grows() -> None:
    c = known()
    before: dict[str, float] = {}
    for num_docs in SIZES:
        work = dataclasses.replace(a_workload(num_docs), on_s3=True)
        reads, writes = (sum(pair[i] for pair in stage_requests(work, c).values()) for i in (0, 1))
        now = {
            "seconds": sum(stage.seconds for stage in stage_times(work, c)),
            "reads": reads,
            "writes": writes,
            **{kind: size for kind, size in object_bytes(work, c).items() if kind != "merge waves"},
            # A group's share of the sample is smaller where there are more groups; tasks of passes share the records.
            **{
                f"{p.stage} {p.process}": p.size_bytes
                for p in memory_peaks(work, c)
                if p.stage not in ("draw samples", "number rows")
            },
        }
        smaller = [name for name, value in now.items() if value < 0.999 * before.get(name, 0.0)]
        assert not smaller, (num_docs, smaller)
        before = now


def test_more_machines_take_no_longer_and_faster_ones_less() -> None:
    c = known()
    times = [
        sum(s.seconds for s in stage_times(a_workload(10**8, fleet=Fleet(nodes, 16, 64e9, is_local=False)), c))
        for nodes in (1, 2, 8, 64)
    ]
    assert times == sorted(times, reverse=True)
    slow, fast = (
        sum(
            s.seconds
            for s in stage_times(
                a_workload(10**8, fleet=Fleet(8, 16, 64e9, 4, "a100", False)), known(gpu_tokens_per_s=rate)
            )
        )
        for rate in (1e4, 1e6)
    )
    assert fast < slow


def test_fixed_formats_are_counted_to_the_byte() -> None:
    work = a_workload(3000)
    sizes = object_bytes(work, known())
    nlist = work.sizes.nlist
    assert (nlist, work.sizes.M) == (64, 48)
    assert sizes["inverted lists"] == 3000 * (48 + 8) + 8 * nlist + 32
    assert sizes["vectors for refinement"] == 3000 * 2 * 384 + 128
    assert set(PUBLISHED) <= set(sizes)


def test_a_stage_is_bound_by_its_largest_part() -> None:
    for stage in stage_times(a_workload(10**7), known()):
        assert stage.seconds >= max(stage.parts.values(), default=0.0)
        assert not stage.parts or stage.parts[stage.binds] == max(stage.parts.values())


def test_pods_hold_every_peak_and_the_head_the_ledger() -> None:
    fleet = Fleet(8, 32, 256e9, 8, "h100", is_local=False)
    work, c = a_workload(10**9, fleet=fleet), known()
    pods = size_pods(work, c)
    assert pods.gpu_workers is not None and pods.cpu_workers is None
    assert pods.gpu_workers.memory_bytes > max(peak.size_bytes for peak in memory_peaks(work, c))
    assert size_pods(work, c, for_updates=True).head.memory_bytes > 200e9 > pods.head.memory_bytes


def test_pods_hold_the_blocks_of_several_pieces_that_gpus_are_given() -> None:
    wide = dataclasses.replace(MINILM, d=1024, hidden=1024)
    on_gpus = dataclasses.replace(a_workload(10**8, fleet=Fleet(1, 32, 256e9, 8, "h100", False)), model=wide)
    on_cpus = dataclasses.replace(on_gpus, fleet=Fleet(1, 32, 256e9, is_local=False))
    single = dataclasses.replace(on_gpus, read=ReadConfig(piece_bytes=BLOCK_BYTES, piece_rows=on_gpus.read.piece_rows))
    plan = StreamPlan(on_gpus.num_encoders, 1, 1.0, on_gpus.pieces_in_flight)
    pieces = pieces_per_task(plan, on_gpus.num_pieces, on_gpus.read.piece_bytes)
    assert (on_gpus.pieces_per_task, on_cpus.pieces_per_task, single.pieces_per_task) == (pieces, 1, 1)
    assert pieces == 8
    c = known()

    def task(work: Workload) -> float:
        return next(p.size_bytes for p in memory_peaks(work, c) if (p.stage, p.process) == ("encode pieces", "task"))

    assert task(on_gpus) - c["task_worker_bytes"] == pytest.approx(8 * (task(on_cpus) - c["task_worker_bytes"]))
    # The bound that cluster/stream.py sets on blocks between stages, which the store must hold without spilling.
    limit = on_gpus.pieces_in_flight * pieces * 2 * on_gpus.read.piece_bytes
    pods = size_pods(on_gpus, c)
    assert pods.gpu_workers is not None and pods.gpu_workers.object_store_bytes >= limit > 1 << 30


def test_a_public_figure_of_a_gpu_is_named_as_such_and_none_is_made_up() -> None:
    rate = cited_rate("h100", MINILM)
    assert rate.source.startswith(CITED)
    assert "an A100's" in rate.note and "e5-small" in rate.note
    assert "an A100's" not in cited_rate("a100", MINILM).note
    with pytest.raises(ConfigError, match=r"nor a public figure for a l4.*--calibrate.*--tokens-per-s-per-gpu"):
        cited_rate("l4", MINILM)
    with pytest.raises(ConfigError, match="nor a public figure for 48 layers of 4096"):
        cited_rate("a100", ModelShape("large", 4096, 4096, 48, 7e9))


def test_a_plan_refuses_a_corpus_and_machines_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="num_docs of a plan must be at least 1, got 0"):
        Corpus(0, 10, 10)
    with pytest.raises(ConfigError, match="cpus_per_node of a plan must be at least 1, got 0"):
        Fleet(1, 0, 1e9)

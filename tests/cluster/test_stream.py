"""The streaming job's stages: tokenizing on CPU tasks, encoding in a pool of its own."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cluster import parcels
from cluster.parcels import Parcel
from cluster.preflight import StreamPlan
from cluster.session import ClusterConfig, connect
from cluster.stream import (
    EncodeStage,
    StreamJob,
    _chunk,
    _commit,
    _dataset,
    _read_group,
    pieces_per_task,
    run_piece,
)
from cluster.telemetry import load_spans
from operators.chunker import ChunkConfig
from operators.encoding.encode_config import EncodeConfig, configured_model
from operators.piece_store import piece_key, read_table
from operators.sources.listing import list_sources
from operators.sources.pieces import Piece, plan_pieces
from operators.sources.read_config import ReadConfig
from operators.storage.commits import read_record
from operators.storage.store import open_store

ROOT = Path(__file__).resolve().parents[2]


def test_tokenizing_is_not_fused_into_the_encoders(ray_cluster: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": "a", "text": "one text"}\n')
    pieces = plan_pieces(list_sources([str(tmp_path)]).objects, ReadConfig()).pieces({})
    job = StreamJob(str(tmp_path / "root"), "runs/x", "i", "f", ReadConfig(), ChunkConfig(), EncodeConfig())
    with connect(ClusterConfig(address=ray_cluster)):
        dataset = _dataset(job, pieces, StreamPlan(1, 1, 0.0, 4), 1 << 20)
        # Ray 2.60 has no public view of the physical plan.
        from ray.data._internal.logical.optimizers import get_execution_plan

        physical, _ = get_execution_plan(dataset._logical_plan)
        names: list[str] = []
        operator: Any = physical.dag
        while operator is not None:
            names.append(f"{type(operator).__name__}: {operator.name}")
            operator = operator.input_dependencies[0] if operator.input_dependencies else None
    assert names[:3] == [
        "TaskPoolMapOperator: MapBatches(_commit)",
        "ActorPoolMapOperator: MapBatches(EncodeStage)",
        "TaskPoolMapOperator: ReadPieceSource->MapBatches(_chunk)",
    ]


def test_stages_are_known_without_torch() -> None:
    program = (
        "import sys; import cluster.stream; print([m for m in ('torch', 'transformers', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_pieces_travel_alone_on_cpus_and_together_on_gpus_while_there_are_many_and_small_ones() -> None:
    cpus, gpus = StreamPlan(2, 1, 0.0, 8), StreamPlan(2, 1, 1.0, 8)
    assert pieces_per_task(cpus, 100_000, 4 << 20) == 1
    assert pieces_per_task(gpus, 100_000, 4 << 20) == 8  # 32 MB
    assert pieces_per_task(gpus, 100_000, 64 << 20) == 1
    assert pieces_per_task(gpus, 100, 4 << 20) == 3  # 34 blocks, so that two encoders end together
    assert pieces_per_task(gpus, 1, 4 << 20) == 1


def test_pieces_of_one_block_are_committed_each_by_itself_with_the_bits_of_pieces_that_travel_alone(
    tmp_path: Path,
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for name in "abcd":
        rows = [
            {"id": f"{name}{number}", "text": f"text {number} of {name}, {'long ' * number}"} for number in range(9)
        ]
        (source / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pieces = plan_pieces(list_sources([str(source)]).objects, ReadConfig()).pieces({})
    (source / "c.jsonl").unlink()
    encode = EncodeConfig(device="cpu")
    fingerprint = configured_model(encode).fingerprint

    def job_at(root: str) -> StreamJob:
        return StreamJob(str(tmp_path / root), "runs/x", "i", fingerprint, ReadConfig(), ChunkConfig(), encode)

    together, alone = job_at("together"), job_at("alone")
    stage = EncodeStage(together)
    (block,) = _read_group(together, pieces)
    lines = _commit(stage(_chunk(block, together), together), together).to_pylist()
    errors = [line["error"] for line in lines]
    assert [error is None for error in errors] == [True, True, False, True]
    assert "c.jsonl" in errors[2]
    for piece in (pieces[0], pieces[1], pieces[3]):
        assert run_piece(alone, piece, stage).error is None
        tables: list[pa.Table] = []
        for job in (together, alone):
            store = open_store(job.store_url)
            record = read_record(store, piece_key(job.run_prefix, piece.piece_id))
            assert record is not None
            tables.append(read_table(store, record.objects["encoded"]))
        assert tables[0].num_rows == 9
        assert tables[0].equals(tables[1])


class Held:
    """Something whose end can be seen."""


@pytest.mark.parametrize("packed_beside", [True, False])
def test_a_piece_that_fails_in_its_work_or_while_it_is_packed_fails_alone_and_holds_nothing(
    monkeypatch: pytest.MonkeyPatch, packed_beside: bool
) -> None:
    pieces = [Piece((), "byte_range", n, n + 1) for n in range(5)]
    rows = pa.table({"x": [1, 2]})
    block = pa.concat_tables([parcels.envelope(Parcel(piece, rows, rows, {"n": n})) for n, piece in enumerate(pieces)])
    alive: list[weakref.ref[Held]] = []
    seen: list[list[bool]] = []

    def work(parcel: Parcel) -> Parcel:
        seen.append([ref() is not None for ref in alive])
        held = Held()
        alive.append(weakref.ref(held))
        if parcel.facts["n"] in (1, 4):
            raise ValueError("no memory")
        return replace(parcel, table=None if parcel.facts["n"] == 2 else parcel.table)

    def packed(parcel: Parcel) -> pa.Table:
        if parcel.table is None:
            raise OSError("cannot be packed")
        return pack(parcel)

    pack = parcels.envelope
    monkeypatch.setattr(parcels, "envelope", packed)
    gc.disable()
    try:
        with ThreadPoolExecutor(1) as pool:
            made = parcels.each_piece(block, "encode", work, packing=pool if packed_beside else None)
    finally:
        gc.enable()
    errors = made.column("error").to_pylist()
    assert [error is None for error in errors] == [True, False, False, True, False]
    assert "no memory" in errors[1]
    assert "cannot be packed" in errors[2]
    assert [Piece.from_json(json.loads(text)) for text in made.column("piece").to_pylist()] == pieces
    assert [[span.stage for span in load_spans(text)] for text in made.column("spans").to_pylist()] == [["encode"]] * 5
    assert not any(map(any, seen))
    assert not any(ref() is not None for ref in alive)

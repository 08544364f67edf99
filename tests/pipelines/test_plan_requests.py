"""Requests of a plan against those that a real build sends to a local S3 server."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import s3fs

from cluster.capacity.coefficients import measured
from cluster.capacity.storage_requests import stage_requests
from cluster.capacity.workload import Corpus, Fleet, Workload
from pipelines.build import build
from pipelines.config import load_config
from pipelines.planning.plan_inputs import model_shape
from pipelines.telemetry.progress import RunProgress

WRITES = ("put_object", "upload_part", "create_multipart_upload", "complete_multipart_upload")
DOCUMENTS, PIECE_ROWS = 400, 50


def test_requests_are_those_of_a_real_build(
    bucket: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from operators.encoding.encode_config import configured_model
    from operators.storage.store import open_store

    texts = [f"document {number} speaks of wings, rivers and stone number {number * 7}" for number in range(DOCUMENTS)]
    table = pa.table({"id": [f"d{number:06d}" for number in range(DOCUMENTS)], "text": texts})
    pq.write_table(table, tmp_path / "corpus.parquet", row_group_size=PIECE_ROWS)
    s3fs.S3FileSystem().put(str(tmp_path / "corpus.parquet"), f"{bucket.removeprefix('s3://')}/docs/corpus.parquet")
    monkeypatch.setenv("VECTORMILL_CACHE", str(tmp_path / "cache"))
    seen: Counter[tuple[str, str]] = Counter()
    stage = ["start"]
    call = s3fs.S3FileSystem._call_s3

    async def counted(self: Any, method: str, *arguments: Any, **keywords: Any) -> Any:
        seen[stage[0], method] += 1
        return await call(self, method, *arguments, **keywords)

    class Noted(RunProgress):
        def stage(self, name: str, total: int | None = None, done: int = 0) -> None:
            stage[0] = name
            super().stage(name, total, done)

    open_store(f"{bucket}/root").put_if_absent("first", b"")  # a process tries once whether the server takes conditions
    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", counted)
    config = load_config(
        None,
        [
            f"encode.model={tiny_model}",
            "encode.pooling=mean",
            f"read.piece_rows={PIECE_ROWS}",
            "index.shard_rows=200",
            "index.min_recall=0",
            "cluster.where=process",
            "encode.precision=float32",
            "index.checkpoint_s=1000",
            "chunk.overlap_tokens=8",
        ],
    )
    build([f"{bucket}/docs/"], f"{bucket}/root", config, progress=Noted(quiet=True))
    work = Workload(
        Corpus(DOCUMENTS, 20, 60),
        model_shape(config, configured_model(config.encode)),
        Fleet(1, 2, 1e9),
        config.read,
        config.index,
    )
    assert (work.num_pieces, work.num_shards) == (DOCUMENTS // PIECE_ROWS, 2)
    for name, (reads, writes) in stage_requests(work, measured()).items():
        written = sum(count for (at, method), count in seen.items() if at == name and method in WRITES)
        read = sum(count for (at, method), count in seen.items() if at == name and "delete" not in method) - written
        assert written == pytest.approx(writes, abs=1.5), name
        assert read == pytest.approx(reads, rel=0.3, abs=8), name

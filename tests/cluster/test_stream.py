"""The streaming job's stages: tokenizing on CPU tasks, encoding in a pool of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.preflight import StreamPlan
from cluster.session import ClusterConfig, connect
from cluster.stream import StreamJob, _dataset
from operators.chunker import ChunkConfig
from operators.encoding.encode_config import EncodeConfig
from operators.sources.listing import list_sources
from operators.sources.pieces import plan_pieces
from operators.sources.read_config import ReadConfig


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

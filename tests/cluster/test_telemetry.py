"""What workers measure: spans that travel with pieces, traffic with storage, Ray's metrics, the GPU where there is one."""

from __future__ import annotations

import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.gpu_sampler import GpuSampler
from cluster.preflight import StreamPlan
from cluster.session import ClusterConfig, connect
from cluster.stream import StreamJob, stream_pieces
from cluster.telemetry import METRICS, RayMetrics, Span, Stopwatch, dump_spans, has_ray, load_spans, with_span
from operators.chunker import ChunkConfig
from operators.encoding.encode_config import EncodeConfig, configured_model
from operators.sources.listing import list_sources
from operators.sources.pieces import plan_pieces
from operators.sources.read_config import ReadConfig
from operators.sources.streams import opened
from operators.storage import retrying_s3
from operators.storage.checked import CheckedFile, put_checked
from operators.storage.commits import read_record
from operators.storage.store import open_store
from operators.storage.traffic import Traffic, traffic
from pipelines.telemetry.progress import RunProgress
from tests.faults.faulty_s3 import faulty_s3

SCRAPE_DEADLINE_S = 30.0  # Ray's agent collects every few seconds


def test_spans_travel_as_they_are() -> None:
    spans = [Span("read", "h:1", 1000.25, 0.125, Traffic(1, 2, 3, 4)), Span("encode", "h:2", 1.5, 2.0, gpu=(0.5, 1e9))]
    assert load_spans(dump_spans(spans)) == spans
    assert load_spans(None) == []


def test_a_task_comes_with_its_span_and_keeps_its_name(tmp_path: Path) -> None:
    def work(number: int) -> int:
        """Its docstring."""
        open_store(str(tmp_path)).put("key", b"x" * 1000)
        time.sleep(0.05)
        return number + 1

    timed = with_span(work, "work")
    before = time.time()
    result, span = timed(41)
    assert (result, span.stage, timed.__name__) == (42, "work", "work")
    assert 0.05 <= span.seconds < 1
    assert before - 0.1 <= span.begin <= span.end <= time.time() + 0.1
    assert span.traffic.bytes_written == 1000


def test_local_reads_and_writes_are_counted_to_the_byte(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    watch = Stopwatch()
    entry = put_checked(store, "a", b"x" * 100_000)
    store.put_if_absent("b", b"y" * 50)
    assert CheckedFile(store, entry).readall() == b"x" * 100_000
    assert store.read("b") == b"y" * 50
    assert watch.span("s").traffic == Traffic(bytes_read=100_050, bytes_written=100_050)
    (tmp_path / "docs.jsonl").write_bytes(b"z" * 70_000)
    (obj,) = list_sources([str(tmp_path / "docs.jsonl")]).objects
    watch = Stopwatch()
    with opened(obj) as file:
        assert len(file.read()) == 70_000
    assert watch.span("s").traffic == Traffic(bytes_read=70_000)


def test_s3_requests_bytes_and_retries_are_counted(s3: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with faulty_s3(s3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        monkeypatch.setattr(retrying_s3, "MAX_BACKOFF_S", 0.05)
        store = open_store(f"{bucket}/root")
        store.put("warm", b"")
        before = traffic()
        proxy.plan("slow_down", lambda request: request.method == "PUT", 2)
        store.put("key", b"x" * 5000)
        after_put = traffic()
        assert after_put - before == Traffic(bytes_written=5000, requests=3, retries=2)
        proxy.plan("truncated", lambda request: request.method == "GET", 1)
        assert store.reader("key")(0, 3000) == b"x" * 3000
        read = traffic() - after_put
        assert (read.bytes_read, read.retries) == (3000, 1)


def test_without_ray_metrics_do_nothing() -> None:
    metrics = RayMetrics()
    assert "ray" not in sys.modules or not has_ray()
    metrics.gauge("a", 1.0, "A gauge")
    metrics.count("b", 1.0, "A counter")
    metrics.observe("c", 1.0, "A histogram")
    assert metrics._made == {}


def test_where_there_is_no_gpu_nothing_is_sampled() -> None:
    assert GpuSampler.start("cpu") is None


def nvml(shares: list[int]) -> Any:
    """The functions of NVML that are called, in place of a driver."""

    class NVMLError(Exception):
        pass

    def utilisation(handle: str) -> SimpleNamespace:
        if not shares:
            raise NVMLError("the device is gone")
        return SimpleNamespace(gpu=shares.pop(0))

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlDeviceGetUtilizationRates=utilisation,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=3 << 30),
    )


def test_a_gpu_is_told_by_its_mean_utilisation_between_pieces() -> None:
    sampler = GpuSampler(nvml([100, 50, 90]), "handle")
    sampler.sample()
    sampler.sample()
    assert sampler.take() == (0.75, float(3 << 30))
    assert sampler.take() == (0.5, float(3 << 30))  # a piece shorter than a sample: as it last was
    sampler.sample()
    assert sampler.take()[0] == pytest.approx(0.7)


def test_a_gpu_that_goes_away_ends_the_sampling_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.gpu_sampler.EVERY_S", 0.001)
    sampler = GpuSampler(nvml([10, 20]), "handle")
    sampler._run()
    assert sampler.take()[0] == pytest.approx(0.15)


def test_a_driver_that_nvml_cannot_talk_to_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    assert GpuSampler.start("cuda") is None


def test_pieces_on_ray_bring_their_spans_and_prometheus_sees_what_went_through(
    ray_cluster: str, tmp_path: Path
) -> None:
    from tests.operators.encoding.tiny_models import save_family  # here: it loads torch

    (tmp_path / "docs.jsonl").write_text("".join(f'{{"id": "{n}", "text": "text {n} of some"}}\n' for n in range(40)))
    listed = list_sources([str(tmp_path / "docs.jsonl")])
    read = ReadConfig(piece_bytes=500)
    pieces = plan_pieces(listed.objects, read).pieces({})
    encode = EncodeConfig(model=str(save_family("bert", tmp_path / "model")), precision="float32")
    store_url, model = str(tmp_path / "root"), configured_model(encode)
    job = StreamJob(store_url, "runs/x", "i", model.fingerprint, read, ChunkConfig(overlap_tokens=8), encode)
    progress = RunProgress(quiet=True)
    with connect(ClusterConfig(address=ray_cluster)):
        progress.stage("encode pieces", total=len(pieces))
        progress.expect_pieces(pieces, pieces, 1, False)
        for result in stream_pieces(job, pieces, StreamPlan(1, 1, 0.0, 4), piece_bytes=500, stall_timeout_s=200):
            assert result.error is None
            assert [span.stage for span in result.spans] == ["read", "chunk", "encode", "commit"]
            begins = [span.begin for span in result.spans]
            assert begins == sorted(begins)
            record = read_record(open_store(store_url), f"runs/x/pieces/{result.piece.piece_id}.json")
            # Nothing of the times is in what is committed.
            assert record is not None and record.facts == result.facts
            assert not [name for name in record.facts if "span" in name or name.endswith("_s")]
            progress.piece_done(result)
        progress.stage("next")
        found = _scraped(
            {
                "ray_vectormill_rows_total": 40,
                "ray_vectormill_piece_seconds_count": 4
                * len(pieces),  # each of the four stages, each from its own process
                "ray_vectormill_stage_units_done": 1,
            }
        )
    assert progress.telemetry.pieces.counts["rows_read"] == 40  # what the driver told Ray
    # At least: processes send what they counted since the last time, and send it again when the agent of a busy machine did
    # not answer in time, also when it had counted it (Ray 2.60, OTLP with delta temporality).
    assert sum(value for _, value in found["ray_vectormill_rows_total"]) >= 40
    by_stage: dict[str, float] = {}
    for labels, value in found["ray_vectormill_piece_seconds_count"]:
        name = labels.split('stage="')[1].split('"')[0]
        by_stage[name] = by_stage.get(name, 0.0) + value
    assert by_stage.keys() == {"read", "chunk", "encode", "commit"}
    assert min(by_stage.values()) >= len(pieces)
    assert any('stage="encode pieces"' in labels for labels, _ in found["ray_vectormill_stage_units_done"])
    encoders = {span.worker for span in result.spans if span.stage == "encode"}
    assert set(progress.telemetry.pieces.encoders) == encoders
    METRICS.forget()


def _scraped(least: dict[str, float]) -> dict[str, list[tuple[str, float]]]:
    """Labels and values of the metrics at the agent of this node, once the values of each add up to what is given."""
    import ray

    (node,) = [node for node in ray.nodes() if node["Alive"]]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + SCRAPE_DEADLINE_S
    while True:
        with urllib.request.urlopen(url, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        found = {
            name: [
                (line[len(name) : line.rindex("}") + 1], float(line.rsplit(" ", 1)[1]))
                for line in lines
                if line.startswith(name + "{")
            ]
            for name in least
        }
        complete = all(sum(value for _, value in found[name]) >= least[name] for name in least)
        if complete or time.monotonic() > deadline:
            return found
        time.sleep(0.5)

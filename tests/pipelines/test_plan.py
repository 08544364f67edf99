"""`plan`: recommended settings that the build itself takes, warnings where something will not fit, bytes of a real tiny build."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.plan_check import bytes_below
from cluster.preflight import plan_stream
from cluster.session import Session
from cluster.supply import NodeSupply
from operators.errors import ConfigError
from pipelines import cli, publication
from pipelines.build import build
from pipelines.commands.plan_output import amount, duration, seconds_of, size_of
from pipelines.config import load_config
from pipelines.planning.plan import Planned, Storage, plan
from pipelines.planning.plan_facts import Prices, plan_facts
from pipelines.planning.plan_inputs import Asked
from tests.pipelines.build_corpus import IN_PROCESS, write_corpus

BILLION = Asked(
    10**9, 120, gpu="h100", nodes=8, cpus_per_node=96, memory_per_node=1e12, gpus_per_node=8, objects=2000, on_s3=True
)
KNOWN = Storage(0.03, 5e9)
ROOT = Path(__file__).resolve().parents[2]


def a_plan(asked: Asked = BILLION, *assignments: str, **options: Any) -> Planned:
    return plan(asked, assignments, storage=options.pop("storage", KNOWN), **options)


@pytest.mark.parametrize("docs", [100, 45_000, 10**7, 10**9])
@pytest.mark.parametrize("gpu", ["none", "a100"])
def test_recommended_settings_are_taken_by_the_build_and_its_preflight_check(docs: int, gpu: str) -> None:
    gpus = 0 if gpu == "none" else 4
    asked = dataclasses.replace(BILLION, docs=docs, gpu=gpu, gpus_per_node=gpus, objects=1)
    planned = a_plan(asked)
    config = load_config(None, [f"{name}={value}" for name, value in planned.settings.items()])
    assert config == planned.config
    nodes = tuple([NodeSupply(96, gpus)] * 8)
    session = dataclasses.replace(Session(8 * 96, 8 * gpus, 96), nodes=nodes)
    found = plan_stream(
        session, workers=config.encode.workers, threads_per_worker=1, use_gpu=gpus > 0, pieces_in_flight=0
    )
    assert found.workers == planned.work.num_encoders
    assert len(planned.work.runs_of_waves) <= 1


def test_settings_that_are_named_stay() -> None:
    planned = a_plan(BILLION, "read.piece_rows=2048", "index.nlist=4096", "cluster.stall_timeout_s=60")
    assert not {"read.piece_rows", "index.nlist", "cluster.stall_timeout_s"} & set(planned.settings)
    assert (planned.config.read.piece_rows, planned.work.sizes.nlist) == (2048, 4096)
    assert planned.config.cluster.stall_timeout_s == 60
    assert not a_plan(BILLION, as_given=True).settings


def test_a_task_that_runs_long_is_not_taken_for_a_stall() -> None:
    planned = a_plan()
    longest = max(stage.single_task_s for stage in planned.stages)
    assert planned.config.cluster.stall_timeout_s >= 2 * longest > 900


def test_an_update_of_a_billion_documents_is_warned_of_loudly() -> None:
    warnings = a_plan(changed=0.01, asked=dataclasses.replace(BILLION, memory_per_node=128e9)).warnings
    assert warnings[0].startswith("UPDATES: the driver of an update holds about 200 B for each document")
    assert "200.3 GB" in warnings[0] or "200" in warnings[0]
    assert any(warning.startswith("MEMORY: verify needs 200") for warning in warnings)
    small = a_plan(dataclasses.replace(BILLION, docs=10**6, objects=1), changed=0.01)
    assert not any("UPDATES" in warning for warning in small.warnings)


def test_a_deadline_that_cannot_be_kept_says_what_it_takes() -> None:
    [text] = [warning for warning in a_plan(deadline_s=600).warnings if "DEADLINE" in warning]
    assert "tasks that run alone: no number of nodes is enough" in text
    on_cpus = dataclasses.replace(BILLION, docs=10**7, gpu="none", gpus_per_node=0, nodes=2, objects=20)
    deadline_s = 0.8 * a_plan(on_cpus).seconds
    [text] = [warning for warning in a_plan(on_cpus, deadline_s=deadline_s).warnings if "DEADLINE" in warning]
    assert "about " in text and " nodes like these (CPU cores bind the encoding stage)" in text


def test_what_is_not_known_of_the_storage_is_said() -> None:
    assert any("STORAGE: its latency or its bandwidth" in warning for warning in a_plan(storage=Storage()).warnings)
    assert not any("STORAGE" in warning for warning in a_plan().warnings)


def test_costs_follow_from_the_prices() -> None:
    planned = a_plan()
    facts = plan_facts(planned, Prices(10.0, 2.0, 0.02, 0.005, 0.0004), explain=True)
    hours = planned.seconds / 3600
    assert facts["cost"]["machines"] == pytest.approx(hours * (8 * 10 + 64 * 2), abs=0.01)
    assert facts["cost"]["storage_month"] == pytest.approx(facts["published_bytes"] / 1e9 * 0.02, abs=0.01)
    assert facts["gpu_hours"] == pytest.approx(64 * hours, abs=0.01)
    assert facts["peak_storage_bytes"] == pytest.approx(sum(facts["bytes"].values()), abs=20)
    rate = facts["encoder_rate"]
    assert not rate["measured"] and rate["source"].startswith("cited, not measured by us")
    used = facts["coefficients"]
    assert used["gpu_tokens_per_s"]["source"] == rate["source"]
    assert all(one["source"] for one in used.values())


def test_a_calibration_takes_the_place_of_the_committed_measurements() -> None:
    asked = dataclasses.replace(BILLION, docs=10**6, objects=1)
    slower = {f"gpu_s_per_token_{length}": 1e-5 for length in (16, 32, 64, 128, 256)}
    planned = a_plan(asked, calibration=slower, calibration_file="here.json", as_given=True)
    rate = plan_facts(planned, Prices(), explain=False)["encoder_rate"]
    assert rate == {"tokens_per_s": 100_000, "source": "measured here: here.json", "note": "", "measured": True}
    explicit = a_plan(asked, calibration=slower, calibration_file="here.json", tokens_per_s_per_gpu=5e6, as_given=True)
    assert plan_facts(explicit, Prices(), explain=False)["encoder_rate"]["source"] == "--tokens-per-s-per-gpu"
    assert explicit.seconds < planned.seconds


def test_long_documents_have_several_chunks() -> None:
    def chunks(tokens: float, *assignments: str) -> float:
        return a_plan(dataclasses.replace(BILLION, tokens_per_doc=tokens), *assignments).work.corpus.chunks_per_doc

    assert chunks(200) == 1
    assert chunks(254) == 1 < chunks(255) <= chunks(1000) < chunks(10_000)
    assert chunks(10_000, "chunk.mode=truncate") == 1
    with pytest.raises(ConfigError, match="chunk.mode late needs --chunks-per-doc"):
        chunks(100, "chunk.mode=late", "chunk.max_tokens=32")


def test_bytes_are_those_of_a_real_tiny_build(minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"word{number % 997} of {number * 7919 % 5003}" for number in range(40_000)]
    rows = [(f"d{n:015d}", f"t{n}", " ".join(words[n * 20 : n * 20 + 10])) for n in range(600)]
    source = write_corpus(tmp_path / "corpus.parquet", rows, row_group_size=100)
    assignments = ["read.piece_rows=100", f"encode.model={minilm}", "encode.num_layers=1", "index.min_recall=0"]
    sizes: dict[str, int] = {}
    tidy = publication.tidy_up

    def measured_tidy(*arguments: Any) -> None:
        sizes.update(bytes_below(str(tmp_path / "root")))
        tidy(*arguments)

    monkeypatch.setattr(publication, "tidy_up", measured_tidy)
    build([str(source)], str(tmp_path / "root"), load_config(None, [*assignments, IN_PROCESS]))
    text_bytes = sum(len(title) + 1 + len(text) for _, title, text in rows) / len(rows)
    asked = Asked(600, 60, text_bytes, objects=1, cpus_per_node=2, memory_per_node=8e9, on_s3=False, is_local=True)
    planned = plan(asked, assignments, as_given=True)
    assert planned.work.num_pieces == 6
    assert planned.sizes["vectors for refinement"] == sizes["vectors for refinement"]
    assert planned.sizes["inverted lists"] == sizes["inverted lists"]
    assert planned.sizes["quantizer"] == pytest.approx(sizes["quantizer"], abs=64)
    for kind in ("pieces' vectors", "pieces' queries", "samples", "shards", "queries and neighbours"):
        assert planned.sizes[kind] == pytest.approx(sizes[kind], rel=0.15), kind


def test_a_plan_is_near_the_committed_run_of_50_000_texts() -> None:
    result = json.loads((ROOT / "benchmarks/results/nightly.json").read_text())
    real = result["rounds"][0]["full"]
    # Of those texts (benchmarks/texts.py, 10 to 40 tokens): mean tokens of a sample, mean bytes.
    asked = Asked(
        50_000,
        21.2,
        75.2,
        objects=50,
        format="jsonl",
        cpus_per_node=2,
        memory_per_node=24e9,
        on_s3=False,
        is_local=True,
    )
    planned = plan(asked, ["encode.device=cpu"], as_given=True)
    assert planned.seconds == pytest.approx(real["process_s"], rel=0.25)
    encode = next(stage.seconds for stage in planned.stages if stage.name == "encode pieces")
    assert encode == pytest.approx(real["stages"]["encode pieces"], rel=0.25)
    assert sum(planned.sizes.values()) == pytest.approx(real["bytes_written"], rel=0.15)


def test_amounts_sizes_and_times_are_read_and_refused() -> None:
    assert (amount("1e9", "--docs"), amount("45_000", "--docs")) == (10**9, 45_000)
    assert (size_of("512GB"), size_of("96 GiB")) == (512e9, 96 * 2**30)
    assert (seconds_of("8h"), seconds_of("90m")) == (28_800, 5400)
    assert [duration(value) for value in (3.21, 245, 12_000)] == ["3.2 s", "4 m 05 s", "3 h 20 m"]
    for read, text in ((lambda t: amount(t, "--docs"), "many"), (size_of, "much"), (seconds_of, "soon")):
        with pytest.raises(ConfigError, match=text):
            read(text)


def test_the_command_prints_json_and_refuses_what_it_cannot_plan(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--docs", "1e6", "--gpu", "h100", "--cpus-per-node", "32", "--memory-per-node", "256GB"]
    assert cli.run([*arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["documents"], facts["fleet"]["gpu"]) == (10**6, "h100")
    assert cli.run(arguments) == 0
    assert "recommended settings" in capsys.readouterr().out
    for wrong, said in (
        (["plan"], "plan needs --docs"),
        (["plan", "--docs", "0"], "--docs must be a whole number"),
        (["plan", "--docs", "10", "--gpu", "l4"], "public figure for a l4"),
        (["plan", "--docs", "10", "--set", "read.piece_row=3"], "did you mean read.piece_rows"),
        (["plan", "--docs", "10", "--calibration", "absent.json"], "--calibration takes a file"),
    ):
        assert cli.run(wrong) == 2
        assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_plan_is_right_about_a_real_build(tmp_path: Path) -> None:
    from benchmarks.plan_check import measure

    [one] = measure([1500], None, ()).values()
    missed = {name for group in ("memory_bytes", "bytes") for name, found in one[group].items() if not found["met"]}
    assert not missed
    assert one["time_s"]["whole"]["ratio"] == pytest.approx(1.0, abs=0.25)

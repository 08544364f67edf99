"""The benchmarks run, check their own correctness, and report what they promise; their numbers are not judged here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from benchmarks.memory_sampler import MemorySampler
from benchmarks.report import spread
from benchmarks.texts import short_texts, write_corpus
from operators.errors import SourceError
from operators.model import load_spec, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ("build_throughput", "build_memory", "assign_scaling", "ivfpq_memory")


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", BENCHMARKS)
def test_help_says_what_is_shown_and_the_floor(name: str) -> None:
    text = run(name, "--help")
    assert "Shows " in text
    assert "Floor: " in text
    assert "--json" in text


def test_short_texts_are_distinct_short_and_the_same_again(minilm: Path) -> None:
    texts = short_texts(2000, str(minilm))
    assert len(set(texts)) == 2000
    lengths = [len(encoding.ids) for encoding in load_tokenizer(load_spec(minilm)).encode_batch(texts)]
    assert 9 <= min(lengths) <= 12
    assert 55 <= max(lengths) <= 80
    assert short_texts(2000, str(minilm)) == texts
    with pytest.raises(SourceError, match=r"distinct texts .* 10000000 were asked for"):
        short_texts(10_000_000, str(minilm))


def test_corpus_has_distinct_ids_and_row_groups_of_the_asked_size(tmp_path: Path) -> None:
    write_corpus(tmp_path / "in" / "corpus.parquet", ["a", "b", "c"], 10, 4)
    parquet = pq.ParquetFile(tmp_path / "in" / "corpus.parquet")
    assert [parquet.metadata.row_group(number).num_rows for number in range(parquet.num_row_groups)] == [4, 4, 2]
    table = parquet.read()
    assert len(set(table.column("id").to_pylist())) == 10
    assert table.column("text").to_pylist() == [*"abcabcabca"]


def test_spread_of_even_and_odd_numbers_of_rounds() -> None:
    assert spread([3.0, 1.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert spread([3.0, 1.0, 1.5]) == {"median": 1.5, "min": 1.0, "max": 3.0}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("pss", [True, False])
def test_sampler_sees_what_a_process_and_its_children_hold(pss: bool) -> None:
    # The child ends when the standard input that it inherits is closed.
    child = "import sys; data = b'x' * 50_000_000; print('ready', flush=True); sys.stdin.read()"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "VM_MARK": "q1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        sampler = MemorySampler(process.pid, b"VM_MARK=q1", interval_s=0.02, pss=pss)
        sampler.start()
        time.sleep(0.2)
        last = sampler.stop()[-1]
        process.stdin.close()
    assert last.num_processes == 2
    assert 50e6 < last.by_kind["ray system"] < 80e6  # the child, which is not the root
    assert last.total < 100e6


def test_assign_scaling_reports_both_ways_and_their_share(tmp_path: Path) -> None:
    small = ("--nlist", "64", "256", "--dims=16", "--rows=2000", "--exact-rows=2000", "--slack-rows=1000", "--rounds=2")
    report = json.loads(run("assign_scaling", *small, f"--out={tmp_path / 's.json'}", "--json"))
    assert json.loads((tmp_path / "s.json").read_text()) == report
    assert set(report["nlist"]) == {"64", "256"}
    for one in report["nlist"].values():
        assert 0 < one["us_per_vector"] <= one["us_per_vector_spread"]["median"]
        assert one["us_per_vector_exact"] > 0
        assert one["groups_s"] > 0
        assert one["share_on_slack_vectors"] >= 0.96
        assert 0.9 < one["exact_share"] <= 1
    assert report["least_exact_share"] == min(one["exact_share"] for one in report["nlist"].values())
    assert report["bf16"]["exact_share"] == 1.0
    assert report["floors"]["ratio_64k_to_4k"]["met"] == (report["ratio_64k_to_4k"] <= 4)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_training_and_encoding_is_within_the_budget_for_a_file_three_times_as_long() -> None:
    small = ("--rows=70000", "--dims=64", "--factor=3", "--nlist=64", "--m=8", "--budget-mib", "288")
    report = json.loads(run("ivfpq_memory", *small, "--json"))
    found = report["budget_mib"]["288"]
    for rows in ("70000", "210000"):
        assert 10 < found[rows]["train_peak_mb"] < 302  # the sample alone is 17 MB
        assert 1 < found[rows]["encode_peak_mb"] < 302
    assert max(found["train_ratio"], found["encode_ratio"]) <= 1.25  # of some 10 MB here; the floor is for the defaults
    assert found["share_of_budget"] <= 1


@pytest.mark.slow
def test_throughput_run_checks_the_build_and_tells_where_time_went() -> None:
    report = json.loads(run("build_throughput", "--documents=600", "--piece-rows=128", "--rounds=1", "--json"))
    assert report["documents"] == 600
    assert report["pieces"] == 5
    assert 0 < report["ratio_whole"]["median"] < report["ratio"] == report["ratio_by_round"]["median"]
    (one,) = report["rounds"]
    assert one["build_steady_s"] == pytest.approx(
        one["build_whole_s"] - one["apart"]["start_ray_s"] - one["apart"]["first_encoder_ready_s"], abs=0.01
    )
    shares = [stage["share"] for stage in one["steady_stages"].values()]
    assert sum(shares) == pytest.approx(1.0, abs=0.01)
    assert min(shares) > -0.01
    assert report["environment"]["versions"]["ray"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_run_reports_peaks_of_both_sizes(tmp_path: Path) -> None:
    arguments = (
        "--documents=256",
        "--factor=2",
        "--piece-rows=64",
        "--workers=1",
        f"--out={tmp_path / 'r' / 'm.json'}",
    )
    report = json.loads(run("build_memory", *arguments, "--json"))
    assert json.loads((tmp_path / "r" / "m.json").read_text()) == report
    assert report["pieces"] == {"256": 4, "512": 8}
    for one in report["documents"].values():
        assert one["peak_mb"] >= max(one["peak_by_kind_mb"].values())
        assert one["peak_by_kind_mb"]["encoders"] > 100
        assert one["peak_indexing_mb"] > 0
    assert report["ratio"] > 0.5

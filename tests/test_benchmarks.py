"""The benchmarks run, check their own correctness, and report what they promise; their numbers are not judged here."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks import encode, scaling
from benchmarks.encode_ceiling import model_work
from benchmarks.encode_contenders import serve
from benchmarks.encode_race import cosines
from benchmarks.made_models import made_texts, make_model
from benchmarks.memory_sampler import MemorySampler
from benchmarks.report import spread
from benchmarks.texts import short_texts, write_corpus
from operators.encoding.encode_config import EncodeConfig
from operators.encoding.model_folder import load_spec
from operators.encoding.text_encoder import TextEncoder
from operators.encoding.tokenizer import load_tokenizer
from operators.errors import SourceError

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ("build_throughput", "build_memory", "assign_scaling", "ivfpq_memory", "encode", "scaling")


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


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("tiny", tmp_path_factory.mktemp("tiny"))


def test_made_texts_have_as_many_tokens_of_the_made_model_as_asked_for(tiny_bert: Path) -> None:
    texts = made_texts(50, 10, 128)
    lengths = [len(found.ids) for found in load_tokenizer(load_spec(tiny_bert)).encode_batch(texts)]
    assert 10 <= min(lengths) < 20
    assert 110 < max(lengths) <= 128
    assert {len(found.ids) for found in load_tokenizer(load_spec(tiny_bert)).encode_batch(made_texts(9, 128, 128))} == {
        128
    }


def test_encode_counts_the_operations_of_linear_layers_and_of_attention(tiny_bert: Path) -> None:
    work = model_work(tiny_bert)  # 2 layers: 4 products of 64 x 64, one of 64 x 128, one of 128 x 64; 4 heads of 16
    assert work.linear == 2 * 2 * (4 * 64 * 64 + 2 * 64 * 128)
    assert work.shapes == ((64, 64), (64, 128), (128, 64))
    # One text of 10 tokens: scores and weighted sums are 2 * 10 * 10 * 64 operations each, in each of 2 layers.
    assert work.per_token([10]) == work.linear + 2 * 2 * 2 * 10 * 10 * 64 / 10
    assert work.per_token([10, 30]) == work.linear + 2 * 2 * 2 * 64 * (10 * 10 + 30 * 30) / 40


@pytest.mark.parametrize("way", ["sentence_transformers", "padded_loop"])
def test_a_peer_of_the_encoder_gives_vectors_and_counts_what_it_computes(
    tiny_bert: Path, tmp_path: Path, way: str
) -> None:
    texts = made_texts(10, 10, 100)
    (tmp_path / "texts.json").write_text(json.dumps([texts]))
    settings = {"way": way, "precision": "float32", "device": "cpu", "model": str(tiny_bert), "batch_size": 4}
    settings |= {"threads": 1, "max_seq_length": 512, "vocab_size": 30_522, "texts": str(tmp_path / "texts.json")}
    check = {"do": "check", "part": 0, "save": str(tmp_path / "v.npy")}
    answers = io.StringIO()
    serve(io.StringIO("\n".join(map(json.dumps, [settings, check, {"do": "memory"}]))), answers)
    started, checked, memory = map(json.loads, answers.getvalue().splitlines())
    assert started["versions"]["torch"]
    lengths = [len(text.split()) + 2 for text in sorted(texts, key=len, reverse=True)]
    padded = sum(len(lengths[begin : begin + 4]) * max(lengths[begin : begin + 4]) for begin in range(0, 10, 4))
    assert checked["computed_tokens"] == padded > sum(lengths)
    assert memory["peak_rss_mb"] > 100
    encoder = TextEncoder(EncodeConfig(precision="float32"), load_spec(tiny_bert))
    assert cosines(np.load(tmp_path / "v.npy"), encoder.encode_texts(texts)).min() > 0.99999


def test_encode_run_needs_torch_and_transformers_only_and_reports_its_keys(tmp_path: Path) -> None:
    absent = ("ray", "pyarrow", "faiss", "fsspec", "numba", "cupy", "sentence_transformers")
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({absent}))\n")
    command = [sys.executable, "-m", "benchmarks.encode", "--model", "made:tiny", "--rounds=1", "--texts-per-round=30"]
    done = subprocess.run(
        [*command, "--tokens", "10", "100", "--profile", "--json", f"--out={tmp_path / 'encode.json'}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode in (0, 1), done.stderr  # floors are for real sizes
    report = json.loads(done.stdout)
    assert json.loads((tmp_path / "encode.json").read_text()) == report
    assert str(tmp_path) not in done.stdout
    (run_,) = report["runs"]
    assert set(run_["contenders"]) == {"ours", "st_fp32", "st_bf16"}
    assert run_["contenders"]["st_fp32"]["way"] == "padded_loop"
    for key in ("tokens_per_s", "ratio_vs_st_fp32", "ratio_vs_st_bf16", "ceiling_share"):
        assert report[key] == run_[key] > 0
    assert 0.99 < report["cosine_min"] <= report["cosine_mean"] < 1.00001
    assert run_["padding_share"] < run_["contenders"]["st_fp32"]["padding_share"]
    assert len(run_["rounds"]["ratio_vs_st_fp32"]) == 1
    best = max(run_["ceiling"]["large_products_gflops"].values())
    assert run_["ceiling"]["gflops"] == best
    share = report["tokens_per_s"] * run_["ceiling"]["flops_per_token"] / (best * 1e9)
    assert share == pytest.approx(report["ceiling_share"], rel=0.02, abs=1e-4)
    assert sum(run_["profile"]["share"].values()) == pytest.approx(1.0, abs=0.01)
    assert min(run_["profile"]["share"][name] for name in ("linear", "attention", "pooling")) > 0
    met = all(one["met"] for each in report["targets"].values() for one in each.values())
    assert done.returncode == (0 if met else 1)


def test_encode_takes_the_distinct_texts_of_a_parquet_file_and_names_a_missing_column(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_corpus(tmp_path / "c.parquet", ["a", "b", "", "c"], 40, 10)
    given = encode.parse([f"--texts={tmp_path / 'c.parquet'}", "--rounds=1", "--texts-per-round=5"])
    texts, about = encode.texts_for("all-MiniLM-L6-v2", given)
    assert sorted(texts) == ["a", "b", "c"]
    assert about == {"from": "c.parquet", "distinct": 3}
    write_corpus(tmp_path / "long.parquet", ["one two three four five six " * 9, "alpha beta gamma " * 9], 2, 10)
    given = encode.parse(["--texts", str(tmp_path / "long.parquet"), "--cut", "--tokens", "5", "9", "--rounds=1"])
    given.texts_per_round = 5
    texts, _ = encode.texts_for("all-MiniLM-L6-v2", given)
    assert len(set(texts)) == 10
    assert {len(text.split()) for text in texts} <= {3, 4, 5, 6, 7}
    assert encode.main([f"--texts={tmp_path / 'c.parquet'}", "--text-column=body"]) == 2
    assert "'body' of" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_encode_on_cuda_ends_with_2_and_one_line_where_there_is_no_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert encode.main(["--device=cuda", "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1


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


def test_simulated_accelerators_on_logical_gpus_do_all_pieces_and_tell_what_they_cost(minilm: Path) -> None:
    program = (
        "import json; from benchmarks.made_models import made_texts; from benchmarks.simulated_pool import *;"
        "print(json.dumps(run_point(Point(2, 20_000.0), made_texts(500, 20, 60), 40, 64)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    point = json.loads(done.stdout.splitlines()[-1])
    assert (point["workers"], point["workers_used"], point["pieces"]) == (2, 2, 40)
    assert 0.2 < point["busy_share_least"] <= point["busy_share"] <= 1.0
    assert 0 < point["tokens_per_s"] <= 40_400
    assert set(point["stage_cpu_s_per_mtoken"]) == {"read", "chunk", "encode", "commit"}
    assert all(seconds > 0 for seconds in point["stage_cpu_s_per_mtoken"].values())
    assert point["ray_cpu_ms_per_block"]["driver"] > 0


def test_scaling_knee_is_what_a_core_feeds_and_the_floor_holds_below_it_only() -> None:
    def point(demand: float, busy: float) -> dict[str, Any]:
        stages = {"read": 0.2, "chunk": 2.0, "encode": 0.1, "commit": 0.7}
        ray = {"driver": 10.0, "raylet and others": 5.0, "in encoders": 3.0, "in tasks": 2.0}
        of = {"workers": 4, "tokens_per_s_of_one": demand / 4, "demand_tokens_per_s": demand, "busy_share": busy}
        return {
            **of,
            "tokens_per_piece": 5_000,
            "pieces_per_task": 4,
            "tokens_per_s": 400_000,
            "stage_cpu_s_per_mtoken": stages,
            "ray_cpu_ms_per_block": ray,
        }

    report = scaling.assemble({"points": [point(1e7, 0.1), point(1e5, 0.97)]})
    # A million tokens: 3 s of the stages, and 50 blocks of 20 ms.
    assert report["knee"]["core_tokens_per_s"] == 250_000
    assert report["knee"]["machine_tokens_per_s"] == 250_000 * (os.cpu_count() or 1)
    assert (report["busy_holds"], report["least_busy_share"], report["busy_up_to_tokens_per_s"]) == (True, 0.97, 1e5)
    assert not scaling.assemble({"points": [point(1e7, 0.1), point(1e5, 0.9)]})["busy_holds"]


@pytest.mark.slow
def test_scaling_compares_one_encoder_with_two_and_keeps_points_of_before(tmp_path: Path) -> None:
    out = tmp_path / "s.json"
    out.write_text(json.dumps({"points": []}))
    report = json.loads(run("scaling", "--rounds=1", "--documents=2048", "--workers", "--json", f"--out={out}"))
    assert json.loads(out.read_text()) == report
    assert report["threads"]["ratio"] > 0.3
    assert report["points"] == []


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

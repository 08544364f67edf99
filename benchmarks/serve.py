"""Shows what the service adds to plain faiss, how long text queries take, and what becomes of requests during swaps and overload.

200,000 short texts, all-MiniLM-L6-v2, recall@10 of at least 0.95 on passages that are not in the index, by settings that
reach it fastest with plain faiss. The load comes from a process of its own, on the same machine. Plain in-process faiss (its
IVF-PQ index with float16 vectors for refinement in memory, asked with the same queries), `vectormill serve --no-ray`, `vectormill
serve` (Ray Serve) and a service without batching (benchmarks/naive_service.py) are measured in turns; plain faiss has the machine
to itself. Checked first: the services' hits are those of the index, and the recall. Floor: vector queries at 0.7 of plain faiss;
text queries at half of saturation with p50 under 25 ms and p99 under 100 ms; 10 swaps without a failed request; at three
times saturation refusals within 100 ms.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from benchmarks.report import REPOSITORY, environment, spread, write_report
from benchmarks.served_index import PlainFaiss, held_out, open_served, plain_faiss, second_version, served_index
from operators.artifact.index import Index
from pipelines.rollback import rollback

K = 10
QUERIES = 1000
BATCH = 32
RECALL = 0.95
FLOORS = {"vector_ratio": 0.7, "text_p50_ms": 25.0, "text_p99_ms": 100.0, "failed_in_swaps": 0, "refusal_p99_ms": 100.0}
SWAPS = 10
CONNECTIONS = 16
FORMS = ("single_json", "single_binary", "batch_json", "batch_binary")


def choose_settings(index: Index, vectors: np.ndarray, exact: np.ndarray) -> dict[str, Any]:
    """nprobe and refine factor with which plain faiss reaches RECALL in the least time, and the recall."""
    found = []
    for refine in (4, 8, 16, 32):
        plain = plain_faiss(index, 1, refine)
        for nprobe in (4, 6, 8, 12, 16, 20, 24, 32, 48, 64):
            plain.ivfpq.nprobe = nprobe
            plain.search(vectors[:50], K)
            started = time.perf_counter()
            ids = plain.search(vectors, K)[1]
            seconds = time.perf_counter() - started
            recall = float(
                np.mean([len(set(a) & set(b)) / K for a, b in zip(ids.tolist(), exact.tolist(), strict=True)])
            )
            if recall >= RECALL:
                found.append((seconds, {"nprobe": nprobe, "refine_factor": refine, "recall@10": round(recall, 4)}))
                break
    if not found:
        raise SystemExit(f"no setting of plain faiss reaches recall {RECALL}")
    return min(found, key=lambda pair: pair[0])[1]


def plain_qps(plain: PlainFaiss, vectors: np.ndarray, batch: int, seconds: float) -> float:
    """Queries a second of in-process faiss, asked `batch` at a time."""
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        at = count % (len(vectors) - batch + 1)
        plain.search(vectors[at : at + batch], K)
        count += batch
    return count / (time.perf_counter() - begin)


def bodies_of(vectors: np.ndarray, texts: list[str], settings: dict[str, Any]) -> dict[str, list[str]]:
    """Requests of each form."""
    given = {"k": K, "nprobe": settings["nprobe"], "refine_factor": settings["refine_factor"]}

    def packed(some: np.ndarray) -> str:
        return base64.b64encode(np.ascontiguousarray(some, "<f4").tobytes()).decode()

    batches = [vectors[i : i + BATCH] for i in range(0, len(vectors) - BATCH + 1, BATCH)]
    return {
        "single_json": [json.dumps({"vectors": [v.tolist()], **given}) for v in vectors],
        "single_binary": [json.dumps({"vectors_b64": packed(v), **given}) for v in vectors],
        "batch_json": [json.dumps({"vectors": b.tolist(), **given}) for b in batches],
        "batch_binary": [json.dumps({"vectors_b64": packed(b), **given}) for b in batches],
        "text": [json.dumps({"queries": [text], **given}) for text in texts],
    }


def load(port: int, bodies: list[str], seconds: float, **how: Any) -> dict[str, Any]:
    """What the load generator saw."""
    spec = {"host": "127.0.0.1", "port": port, "path": "/v1/search", "bodies": bodies, "seconds": seconds, **how}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.load_generator"],
        input=json.dumps(spec), capture_output=True, text=True, check=True, cwd=REPOSITORY,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def ask(port: int, body: str) -> dict[str, Any]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/search", body.encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def served_version(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/index", timeout=60) as answer:
        return str(json.load(answer)["version"])


@contextlib.contextmanager
def running(command: list[str], port: int) -> Iterator[int]:
    """A service in processes of its own, ready; its port."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
        try:
            for _ in range(1200):
                if process.poll() is not None:
                    log.seek(0)
                    raise SystemExit(f"{' '.join(command)} ended: {log.read().decode()[-2000:]}")
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5):
                    break
                time.sleep(0.25)
            yield port
        finally:
            process.terminate()
            process.wait(60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_answers(
    port: int, index: Index, bodies: dict[str, list[str]], vectors: np.ndarray, how: dict[str, Any]
) -> None:
    """Raise SystemExit unless all forms of the first queries get the hits of the index."""
    expected = index.search(vectors[:BATCH], K, nprobe=how["nprobe"], refine_factor=how["refine_factor"])
    names = index.doc_ids_of(expected.entries_Qk.ravel()).reshape(-1, K).tolist()
    for form in FORMS:
        got = [[hit["doc_id"] for hit in found["hits"]] for found in ask(port, bodies[form][0])["results"]]
        if got != names[: len(got)]:
            raise SystemExit(f"the hits of {form} are not those of the index: {got[0]}, expected {names[0]}")


def measure_vectors(port: int, bodies: dict[str, list[str]], seconds: float) -> dict[str, float]:
    """Queries a second by form."""
    return {
        form: load(port, bodies[form], seconds, kind="closed", connections=CONNECTIONS)["ok_per_s"]
        * (BATCH if form.startswith("batch") else 1)
        for form in FORMS
    }


def measure_texts(port: int, bodies: list[str], seconds: float) -> dict[str, Any]:
    """Saturation by closed loop, then Poisson arrivals at half of it and at three times it."""
    saturation = load(port, bodies, seconds, kind="closed", connections=2 * CONNECTIONS)["ok_per_s"]
    return {
        "saturation_qps": saturation,
        "half": load(port, bodies, 2 * seconds, kind="open", rate=saturation / 2),
        "overload": load(port, bodies, seconds, kind="open", rate=3 * saturation),
        "after_overload": load(port, bodies, seconds, kind="open", rate=saturation / 4, seed=1),
    }


def measure_swaps(port: int, root: Path, bodies: list[str], rate: float, versions: tuple[str, str]) -> dict[str, Any]:
    """Ten changes of CURRENT under load: answers by status, and seconds until each was served."""
    seconds = SWAPS * 2.0 + 2
    spec = {"host": "127.0.0.1", "port": port, "path": "/v1/search", "bodies": bodies, "seconds": seconds}
    generator = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.load_generator"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY,
    )  # fmt: skip
    assert generator.stdin is not None
    generator.stdin.write(json.dumps({**spec, "kind": "open", "rate": rate}))
    generator.stdin.close()
    took = []
    for number in range(SWAPS):
        wanted = versions[number % 2]
        started = time.monotonic()
        rollback(str(root), wanted)
        while served_version(port) != wanted and time.monotonic() - started < 60:
            time.sleep(0.05)
        took.append(time.monotonic() - started)
        time.sleep(max(0.0, 1.6 - took[-1]))
    assert generator.stdout is not None
    found = json.loads(generator.stdout.read())
    generator.wait()
    failed = sum(count for status, count in found["by_status"].items() if status != "200")
    return {**found, "swaps": SWAPS, "failed": failed, "seconds_to_serve": spread(took, 2)}


def measure(
    num_texts: int, scratch: Path, threads: int, rounds: int, seconds: float, what: list[str]
) -> dict[str, Any]:
    """The report."""
    surroundings = environment()
    root, texts = served_index(scratch, num_texts, os.cpu_count() or 1)
    versions = second_version(scratch, root, texts)
    rollback(str(root), versions[0])
    questions, vectors = held_out(scratch, QUERIES, os.cpu_count() or 1)
    index = open_served(root)
    faiss.omp_set_num_threads(threads)
    exact = index.exact_search(vectors, K).row_ids_Qk
    settings = choose_settings(index, vectors, exact)
    bodies = bodies_of(vectors, questions, settings)
    plain = plain_faiss(index, settings["nprobe"], settings["refine_factor"])
    port = free_port()
    program = [sys.executable, "-m", "pipelines.cli", "serve", str(root), "--port", str(port)]
    program += ["--threads-per-replica", str(threads)]
    texts_file = str(scratch / f"texts-{num_texts}.json")
    naive = [sys.executable, "-m", "benchmarks.naive_service", str(root), texts_file, str(port)]
    naive += [str(settings["nprobe"]), str(settings["refine_factor"]), str(threads)]
    commands = {"one process": [*program, "--no-ray"], "ray serve": program, "naive": naive}
    commands = {name: command for name, command in commands.items() if name in what}
    seen: dict[str, list[dict[str, Any]]] = {name: [] for name in ("plain faiss", *commands)}
    for number in range(rounds):
        seen["plain faiss"].append(
            {"single": plain_qps(plain, vectors, 1, seconds), "batch": plain_qps(plain, vectors, BATCH, seconds)}
        )
        for name, command in commands.items():
            with running(command, port):
                found: dict[str, Any] = {}
                if name == "naive":
                    forms = {form: bodies[form] for form in ("single_json", "batch_json")}
                    found["vectors"] = {
                        form: load(port, some, seconds, kind="closed", connections=CONNECTIONS)["ok_per_s"]
                        * (BATCH if form.startswith("batch") else 1)
                        for form, some in forms.items()
                    }
                else:
                    check_answers(port, index, bodies, vectors, settings)
                    found["vectors"] = measure_vectors(port, bodies, seconds)
                found["text"] = measure_texts(port, bodies["text"], seconds)
                if name != "naive" and number == rounds - 1:
                    rate = found["text"]["saturation_qps"] / 2
                    found["swaps"] = measure_swaps(port, root, bodies["text"], rate, (versions[1], versions[0]))
                seen[name].append(found)
    return {
        **summed_up(seen, list(commands)),
        "settings": settings,
        "threads": threads,
        "rounds": seen,
        "environment": surroundings,
    }


def summed_up(seen: dict[str, list[dict[str, Any]]], names: list[str]) -> dict[str, Any]:
    """Ratios to plain faiss of the same round, text latencies and what the floors say of them."""
    out: dict[str, Any] = {"plain_faiss_qps": {}, "services": {}}
    plain = seen["plain faiss"]
    for form in ("single", "batch"):
        out["plain_faiss_qps"][form] = spread([one[form] for one in plain], 0)
    for name in names:
        runs = seen[name]
        said: dict[str, Any] = {"vector_qps": {}, "ratio_to_plain_faiss": {}}
        for form in runs[0]["vectors"]:
            rates = [run["vectors"][form] for run in runs]
            said["vector_qps"][form] = spread(rates, 0)
            kind = form.split("_")[0]
            said["ratio_to_plain_faiss"][form] = spread(
                [rate / one[kind] for rate, one in zip(rates, plain, strict=True)], 3
            )
        said["text_saturation_qps"] = spread([run["text"]["saturation_qps"] for run in runs], 0)
        for load_name in ("half", "overload", "after_overload"):
            for kind in ("ok_ms", "refused_ms"):
                found = [run["text"][load_name].get(kind) for run in runs]
                if all(found):
                    said[f"text_{load_name}_{kind}"] = {
                        point: spread([one[point] for one in found if one], 1) for point in ("p50", "p99")
                    }
        said["swaps"] = runs[-1].get("swaps")
        if name != "naive":
            said["met"] = _met(said)
        out["services"][name] = said
    return {**out, "floors": FLOORS}


def _met(said: dict[str, Any]) -> dict[str, bool]:
    ratios = said["ratio_to_plain_faiss"]
    refusals = said.get("text_overload_refused_ms")
    return {
        **{f"vector_ratio_{form}": found["median"] >= FLOORS["vector_ratio"] for form, found in ratios.items()},
        "text_p50_ms": said["text_half_ok_ms"]["p50"]["median"] < FLOORS["text_p50_ms"],
        "text_p99_ms": said["text_half_ok_ms"]["p99"]["median"] < FLOORS["text_p99_ms"],
        "failed_in_swaps": said["swaps"]["failed"] == FLOORS["failed_in_swaps"],
        "refusal_p99_ms": refusals is not None and refusals["p99"]["median"] < FLOORS["refusal_p99_ms"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=int, default=200_000)
    parser.add_argument("--threads", type=int, default=1, help="of faiss and of each service's search and encoder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each load")
    parser.add_argument("--what", default="one process,ray serve,naive", help="services, by comma")
    parser.add_argument("--scratch", help="folder in which the index is kept from run to run (a few minutes to make)")
    parser.add_argument("--out", help="also write the report to this file")
    parser.add_argument("--json", action="store_true", help="print the report (it is always JSON)")
    given = parser.parse_args()
    scratch = Path(given.scratch or Path(tempfile.gettempdir()) / "vectormill-serve-benchmark")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    report = measure(given.texts, scratch, given.threads, given.rounds, given.seconds, given.what.split(","))
    write_report(report, given.out)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

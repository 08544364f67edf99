"""Shows that `plan` is right: its times, memory and bytes against real builds of three sizes, 30 times apart.

Each build runs in a process of its own with the real MiniLM on passages of docstrings, on a Ray of its own, on all cores. The
plan is made before it, from the committed coefficients or from a calibration (--calibration), and from what a user would
know: the number of documents, their mean bytes, and the mean tokens of a sample of them. It never sees the builds.

Compared: seconds of the whole command (from its start to its end, with Python and Ray) and of every stage that takes at
least a tenth of it; the most memory that the driver, an encoder and a worker of tasks held (private bytes, sampled every 50
ms); bytes of every kind of object, those that are deleted at the end as well. Floors: time within 25%, memory and bytes within
15%. Bytes of kinds below 100 kB are not compared. Sizes may be run in calls of their own: results in --out are kept and joined.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import REPOSITORY, environment, write_report
from benchmarks.texts import short_texts, write_corpus
from cluster.process_memory import DRIVER, ENCODER, TASK, ProcessSampler
from operators.artifact.manifest import open_current
from operators.encoding.model_folder import load_spec, resolve_model
from operators.encoding.tokenizer import load_tokenizer
from operators.storage.store import open_store
from pipelines import publication
from pipelines.build import build
from pipelines.config import load_config
from pipelines.planning.calibration_file import read_calibration
from pipelines.planning.plan import Planned, plan
from pipelines.planning.plan_inputs import Asked, this_machine
from pipelines.telemetry.progress import RunProgress

SIZES = (1_500, 8_000, 45_000)
TIME, MEMORY, BYTES = 0.25, 0.15, 0.15
BIG_STAGE = 0.1
LEAST_BYTES = 100_000
SAMPLED = 500  # texts whose tokens are counted for the plan
MARKER = "VECTORMILL_PLAN_CHECK"
PIECE_ROWS = 1024
# Kinds of objects by their keys, as cluster/capacity/objects.py names them.
KINDS = (
    (r"/pieces/.*\.queries\.parquet$", "pieces' queries"),
    (r"/pieces/.*\.json$", "pieces' records"),
    (r"/pieces/.*\.parquet$", "pieces' vectors"),
    (r"/train-.*/sample-", "samples"),
    (r"/shards-", "shards"),
    (r"/waves-", "merge waves"),
    (r"^segments/.*\.lists$", "inverted lists"),
    (r"^segments/.*\.vectors\.npy$", "vectors for refinement"),
    (r"^segments/.*\.rows\.parquet$", "rows"),
    (r"^segments/.*/part-\d+\.json$", "part records"),
    (r"^segments/.*/documents-", "documents tables"),
    (r"^segments/.*/queries-|/exact-", "queries and neighbours"),
    (r"^segments/.*/sources-", "source listing"),
    (r"^quantizers/", "quantizer"),
    (r"^versions/.*/manifest\.json$", "manifest"),
)


class NotedStages(RunProgress):
    """Progress that tells the sampler the stage."""

    def __init__(self, sampler: ProcessSampler) -> None:
        super().__init__(quiet=True)
        self._sampler = sampler

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None:
        super().stage(name, total, done)
        self._sampler.stage = name


def kind_of(key: str) -> str:
    """The kind of an object by its key; "other" for small ones that no plan names."""
    return next((kind for pattern, kind in KINDS if re.search(pattern, key)), "other")


def bytes_below(root: str) -> dict[str, int]:
    """Bytes of the objects at a local root by kind."""
    found: dict[str, int] = {}
    for path in Path(root).rglob("*"):
        if path.is_file():
            kind = kind_of(path.relative_to(root).as_posix())
            found[kind] = found.get(kind, 0) + path.stat().st_size
    return found


def watched_build(source: str, root: str, assignments: Sequence[str]) -> dict[str, Any]:
    """What the measured process does: a build, with the bytes that lie at the root before it is tidied up."""
    sizes: dict[str, int] = {}
    tidy = publication.tidy_up

    def measured_tidy(*arguments: Any) -> None:
        sizes.update(bytes_below(root))
        tidy(*arguments)

    publication.tidy_up = measured_tidy  # type: ignore[assignment]
    with ProcessSampler(os.getpid(), f"{MARKER}={os.environ[MARKER]}") as sampler:
        result = build([source], root, load_config(None, assignments), progress=NotedStages(sampler))
    memory = {kind: sampler.peak(kind) for kind in (DRIVER, ENCODER, TASK)}
    of_stage = {f"{stage}, {kind}": size for (stage, kind), size in sampler.peaks.items()}
    return {"stages": result.seconds, "bytes": sizes, "memory": memory, "memory_of_stages": of_stage}


def run_build(source: Path, root: Path, assignments: Sequence[str]) -> dict[str, Any]:
    """The build in a process of its own; `seconds` from its start to its end. Raises RuntimeError when it fails."""
    program = (
        "import json, sys; from benchmarks.plan_check import watched_build;"
        " print(json.dumps(watched_build(sys.argv[1], sys.argv[2], sys.argv[3:])))"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program, str(source), str(root), *assignments],
        cwd=REPOSITORY,
        env={**os.environ, MARKER: os.urandom(8).hex()},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the build failed: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**found, "seconds": time.monotonic() - began}


def mean_tokens(texts: Sequence[str], model: str) -> float:
    """Tokens of a text without special ones, of a sample."""
    tokenizer = load_tokenizer(load_spec(resolve_model(model)))
    sample = texts[:: max(1, len(texts) // SAMPLED)]
    return sum(len(found) for found in tokenizer.encode_batch(sample, add_special_tokens=False)) / len(sample)


def make_plan(texts: Sequence[str], assignments: Sequence[str], calibration: str | None) -> Planned:
    """The plan of a build of the texts on this machine, with these very settings."""
    cpus, memory = this_machine()
    model = load_config(None, assignments).encode.model
    asked = Asked(
        len(texts),
        mean_tokens(texts, model),
        sum(len(text.encode()) for text in texts) / len(texts),
        objects=1,
        cpus_per_node=cpus,
        memory_per_node=memory,
        on_s3=False,
        is_local=True,
    )
    values = read_calibration(calibration) if calibration else None
    return plan(asked, assignments, calibration=values, calibration_file=calibration or "", as_given=True)


def compare(planned: float, real: float, within: float) -> dict[str, Any]:
    """Both, their ratio, and whether it is near enough to 1."""
    ratio = planned / real
    return {
        "planned": round(planned, 3),
        "real": round(real, 3),
        "ratio": round(ratio, 3),
        "met": abs(ratio - 1) <= within,
    }


def checked(planned: Planned, real: dict[str, Any]) -> dict[str, Any]:
    """Plan against reality, quantity by quantity."""
    times = {"whole": compare(planned.seconds, real["seconds"], TIME)}
    of_stage = {stage.name: stage.seconds for stage in planned.stages}
    small: dict[str, Any] = {}
    for name, seconds in real["stages"].items():
        found = compare(of_stage.get(name, 0.0), max(seconds, 1e-3), TIME)
        (times if seconds >= BIG_STAGE * real["seconds"] else small)[name] = found
    memory = {}
    for kind in (DRIVER, ENCODER, TASK):
        most = max(peak.size_bytes for peak in planned.peaks if peak.process == kind)
        memory[kind] = compare(most, real["memory"][kind], MEMORY)
    sizes = {
        kind: compare(planned.sizes[kind], real["bytes"][kind], BYTES)
        for kind in planned.sizes
        if real["bytes"].get(kind, 0) >= LEAST_BYTES
    }
    return {
        "met": all(one["met"] for group in (times, memory, sizes) for one in group.values()),
        "time_s": times,
        "memory_bytes": memory,
        "bytes": sizes,
        "small_stages_s": small,
        "memory_of_stages": real["memory_of_stages"],
        "load_average_after": round(os.getloadavg()[0], 2),
    }


def measure(sizes: Sequence[int], calibration: str | None, changes: Sequence[str]) -> dict[str, Any]:
    """The report of the builds."""
    assignments = ["encode.device=cpu", f"read.piece_rows={PIECE_ROWS}", *changes]
    surroundings = environment()
    texts = short_texts(max(*sizes, 1), load_config(None, assignments).encode.model)
    found = {}
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="vectormill-plan-") as name:
            source, root = Path(name) / "corpus.parquet", Path(name) / "root"
            write_corpus(source, texts[:size], size, PIECE_ROWS)
            planned = make_plan(texts[:size], assignments, calibration)
            real = run_build(source, root, assignments)
            held = open_current(open_store(str(root))).num_docs
            if held != size:
                raise RuntimeError(f"the index must hold {size} documents, it holds {held}")
        found[str(size)] = {**checked(planned, real), "environment": surroundings}
        print(f"{size}: {'met' if found[str(size)]['met'] else 'MISSED'}", file=sys.stderr, flush=True)
    return found


def report_of(found: dict[str, Any], calibration: str | None) -> dict[str, Any]:
    """The whole report from the sizes that were run so far."""
    return {
        "benchmark": "plan_check",
        "claim": f"plan is within {TIME:.0%} of the time and within {MEMORY:.0%} of memory and bytes of real builds",
        "met": all(one["met"] for one in found.values()) and len(found) >= len(SIZES),
        "calibration": "a file of --calibrate" if calibration else "committed coefficients",
        "sizes": dict(sorted(found.items(), key=lambda item: int(item[0]))),
    }


def readable(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = []
    for size, one in report["sizes"].items():
        lines.append(f"{size} documents: {'met' if one['met'] else 'MISSED'}")
        for group in ("time_s", "memory_bytes", "bytes"):
            for name, found in one[group].items():
                mark = "" if found["met"] else "  MISSED"
                lines.append(
                    f"  {group:<13} {name:<24} {found['planned']:>16,} {found['real']:>16,} {found['ratio']:>7}{mark}"
                )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 if the measurement was made, whatever it shows."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.plan_check", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="documents of each build, by commas")
    parser.add_argument("--calibration", help="file of `plan --calibrate --out`; default: the committed coefficients")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="other settings of the builds")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--out", help="also write the report to this file; sizes that stand there are kept")
    given = parser.parse_args(arguments)
    sizes = [int(size) for size in given.sizes.split(",")]
    found: dict[str, Any] = {}
    if given.out and Path(given.out).exists():
        found = json.loads(Path(given.out).read_text(encoding="utf-8"))["sizes"]
    report = report_of({**found, **measure(sizes, given.calibration, given.set)}, given.calibration)
    write_report(report, given.out)
    print(json.dumps(report, indent=1) if given.json else readable(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())

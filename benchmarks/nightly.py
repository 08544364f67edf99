"""Shows what an update costs beside a full build: texts encoded, time and bytes written, on 50,000 short texts with 1% changed.

A third each of the changed documents is added, edited and deleted, spread over all source objects (the hardest case: every
object must be read again), or over `--touched` of them. Three commands run in processes of their own: a build of the corpus as
it was, an update to the corpus as it is, a build of the corpus as it is in a fresh root. Then the update again, with nothing
changed. Checked first: the updated index verifies, holds exactly the documents of the new corpus, and answers like the fresh
one (exact search: the same ids, scores within the encoder's rounding). Time is that of the call without the start of Ray,
and of the whole process; bytes are all objects written below the root, work in progress included. Floors: encoded_ratio 1.0,
time_ratio at most 0.10, bytes_written_ratio at most 0.03, and an update without a change encodes and publishes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import REPOSITORY, environment, spread, write_report
from benchmarks.texts import texts_of_lengths
from operators.artifact.index import Index
from operators.artifact.manifest import open_current
from operators.errors import IntegrityError
from operators.piece_store import read_table
from operators.storage.checked import ObjectEntry
from operators.storage.store import open_store
from pipelines import publication
from pipelines.build import build
from pipelines.config import load_config
from pipelines.update import update
from pipelines.verify import verify

FLOORS = {"encoded_ratio": 1.0, "time_ratio": 0.10, "bytes_written_ratio": 0.03}
TOKENS = (10, 40)  # of a text, about
QUERIES = 200
K = 10
ROUNDING = 2e-3  # of scores of unit vectors in bfloat16 and float16

Corpus = list[dict[str, str]]  # object number -> id -> text


def make_corpora(num_texts: int, num_objects: int, changed: float, touched: int) -> tuple[Corpus, Corpus, int]:
    """The corpus before and after, and how many texts are new. Changes lie in the first `touched` objects."""
    num_changed = round(num_texts * changed)
    added, edited = num_changed // 3, num_changed // 3
    deleted = num_changed - added - edited
    texts = texts_of_lengths(num_texts + added + edited, load_config().encode.model, *TOKENS)
    before: Corpus = [{} for _ in range(num_objects)]
    for number in range(num_texts):
        before[number % num_objects][f"d{number:07d}"] = texts[number]
    after = [dict(held) for held in before]
    rng = np.random.default_rng(7)
    candidates = np.array([number for number in range(num_texts) if number % num_objects < touched])
    chosen = rng.permutation(candidates)[: edited + deleted].tolist()
    for fresh, number in enumerate(chosen[:edited]):
        after[number % num_objects][f"d{number:07d}"] = texts[num_texts + fresh]
    for number in chosen[edited:]:
        del after[number % num_objects][f"d{number:07d}"]
    for fresh in range(added):
        after[fresh % touched][f"n{fresh:07d}"] = texts[num_texts + edited + fresh]
    return before, after, added + edited


def write_objects(folder: Path, corpus: Corpus) -> None:
    """JSON Lines, one file an object; files whose content is the same are left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, held in enumerate(corpus):
        path = folder / f"part-{number:04d}.jsonl"
        content = "".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in held.items())
        if not path.exists() or path.read_text() != content:
            path.write_text(content)


def size_of(folder: str) -> int:
    """Bytes of all files below."""
    return sum(os.path.getsize(os.path.join(place, name)) for place, _, names in os.walk(folder) for name in names)


def run_command(command: str, source: str, root: str, assignments: Sequence[str]) -> dict[str, Any]:
    """What the measured process does: a build or an update, with the bytes that lie at the root before it is tidied up."""
    written = {"before": size_of(root) if os.path.exists(root) else 0, "most": 0}
    tidy = publication.tidy_up

    def measured_tidy(*arguments: Any) -> None:
        written["most"] = size_of(root)
        tidy(*arguments)

    publication.tidy_up = measured_tidy  # type: ignore[assignment]
    started = time.monotonic()
    facts: dict[str, Any] = {}
    if command == "build":
        built = build([source], root, load_config(None, assignments))
        seconds = built.seconds
    else:
        done = update([source], root, lambda base: load_config(None, assignments, base=base))
        seconds = done.seconds
        facts = {
            "published": done.published,
            "objects": done.objects,
            "documents": done.changes,
            "texts_encoded": done.texts_encoded,
        }
    took = time.monotonic() - started
    return {
        **facts,
        "seconds": took - seconds.get("start Ray", 0.0),
        "start_ray_s": seconds.get("start Ray", 0.0),
        "bytes_written": max(0, written["most"] - written["before"]),
        "stages": {name: round(value, 2) for name, value in seconds.items()},
    }


def measured(command: str, source: Path, root: Path, assignments: Sequence[str]) -> dict[str, Any]:
    """Run the command in a process of its own. Raises RuntimeError when it fails."""
    program = (
        "import json, sys; from benchmarks.nightly import run_command;"
        " print(json.dumps(run_command(*sys.argv[1:4], sys.argv[4:])))"
    )
    started = time.monotonic()
    line = [sys.executable, "-c", program, command, str(source), str(root), *assignments]
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command} of {source} failed: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**found, "process_s": time.monotonic() - started}


def check_answers(updated: Path, fresh: Path, corpus: Corpus) -> dict[str, float]:
    """Raise IntegrityError unless the updated index is whole, holds this corpus, and answers as the fresh one does."""
    problems = verify(str(updated))["problems"]
    if problems:
        raise IntegrityError(f"the updated index does not verify: {problems[:3]}")
    indexes = [Index.open(open_store(str(root))) for root in (updated, fresh)]
    expected = {name for held in corpus for name in held}
    table = read_table(indexes[1].store, ObjectEntry.from_json(open_current(indexes[1].store).queries), ["vector"])
    queries = np.array(table.column("vector").to_pylist(), np.float32)[:QUERIES]
    found = [index.exact_search(queries, K) for index in indexes]
    names = [
        index.doc_ids_of(hits.entries_Qk.ravel()).reshape(-1, K) for index, hits in zip(indexes, found, strict=True)
    ]
    if not set(names[0].ravel()) <= expected or indexes[0].manifest.num_docs != len(expected):
        raise IntegrityError(
            f"the updated index must hold {len(expected)} documents, it has {indexes[0].manifest.num_docs}"
        )
    apart = np.abs(found[0].scores_Qk - found[1].scores_Qk).max()
    if apart > ROUNDING:
        raise IntegrityError(f"scores of the updated and the fresh index differ by {apart}, more than rounding")
    same = float((names[0] == names[1]).mean())
    through = indexes[0].search(queries, K)
    hits = [
        len(set(a) & set(b)) / K for a, b in zip(through.entries_Qk.tolist(), found[0].entries_Qk.tolist(), strict=True)
    ]
    return {"same_ids_in_place": same, "largest_score_difference": float(apart), "recall@10": float(np.mean(hits))}


def measure(num_texts: int, num_objects: int, changed: float, touched: int, rounds: int, where: str) -> dict[str, Any]:
    """The report."""
    surroundings = environment()
    before, after, new_texts = make_corpora(num_texts, num_objects, changed, touched)
    settings = {"build": ["cluster.where=ray"], "update": [f"cluster.where={where}"]}
    runs: list[dict[str, Any]] = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="vectormill-nightly-") as name:
            folder = Path(name)
            source, root, fresh = folder / "corpus", folder / "root", folder / "fresh"
            write_objects(source, before)
            base = measured("build", source, root, settings["build"])
            write_objects(source, after)
            updated = measured("update", source, root, settings["update"])
            nothing = measured("update", source, root, settings["update"])
            full = measured("build", source, fresh, settings["build"])
            answers = check_answers(root, fresh, after)
            if nothing["published"] or nothing["texts_encoded"]:
                raise IntegrityError(f"an update without a change must do nothing, it did {nothing}")
            runs.append({"base": base, "update": updated, "nothing": nothing, "full": full, "answers": answers})
    ratio = {
        "encoded_ratio": [run["update"]["texts_encoded"] / new_texts for run in runs],
        "time_ratio": [run["update"]["seconds"] / run["full"]["seconds"] for run in runs],
        "process_time_ratio": [
            (run["update"]["process_s"] - run["update"]["start_ray_s"])
            / (run["full"]["process_s"] - run["full"]["start_ray_s"])
            for run in runs
        ],
        "bytes_written_ratio": [run["update"]["bytes_written"] / run["full"]["bytes_written"] for run in runs],
    }
    summary = {name: spread(values, 5) for name, values in ratio.items()}
    met = {
        "encoded_ratio": all(value == FLOORS["encoded_ratio"] for value in ratio["encoded_ratio"]),
        "time_ratio": summary["time_ratio"]["median"] <= FLOORS["time_ratio"],
        "bytes_written_ratio": summary["bytes_written_ratio"]["max"] <= FLOORS["bytes_written_ratio"],
    }
    return {
        **{name: values["median"] for name, values in summary.items()},
        "floors": FLOORS,
        "met": met,
        "spread": summary,
        "update_s": spread([run["update"]["seconds"] for run in runs], 2),
        "full_build_s": spread([run["full"]["seconds"] for run in runs], 2),
        "nothing_changed_s": spread([run["nothing"]["process_s"] for run in runs], 2),
        "corpus": {
            "texts": num_texts,
            "objects": num_objects,
            "touched_objects": touched,
            "changed": changed,
            "new_texts": new_texts,
            "documents": runs[0]["update"]["documents"],
        },
        "where": {"build": "ray", "update": where},
        "rounds": runs,
        "environment": surroundings,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.nightly", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=int, default=50_000)
    parser.add_argument("--objects", type=int, default=50)
    parser.add_argument("--touched", type=int, default=0, help="objects that changes lie in; 0: all")
    parser.add_argument("--changed", type=float, default=0.01, help="fraction of the documents")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--where", default="auto", choices=("auto", "ray", "process"), help="where the update runs")
    parser.add_argument("--out", help="also write the report to this file")
    parser.add_argument("--json", action="store_true", help="print the report (it is always JSON)")
    given = parser.parse_args()
    touched = given.touched or given.objects
    report = measure(given.texts, given.objects, given.changed, touched, given.rounds, given.where)
    write_report(report, given.out)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

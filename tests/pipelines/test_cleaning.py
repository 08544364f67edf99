"""Cleaning in a build: what is left out is counted, listed with what stands for it, and everything reconciles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from operators.artifact.manifest import Manifest, open_current
from operators.piece_store import read_table
from operators.storage.checked import ObjectEntry
from operators.storage.store import open_store
from pipelines import build as build_module
from pipelines.run_context import RunContext
from pipelines.search import search
from tests.pipelines.build_corpus import build_json
from tests.pipelines.one_process import build_in_one_process

RULES = """
import pyarrow.compute as pc

def in_latin_script(rows):
    return pc.match_substring_regex(rows["text"], r"\\p{Latin}")
"""
SETTINGS = (
    "clean.unicode=NFKC",
    "clean.control_characters=space",
    "clean.invisible_characters=remove",
    "clean.min_chars=10",
    "clean.max_chars=300",
    "clean.keep=script_rules:in_latin_script",
    "clean.duplicates=drop",
    "read.max_reject_fraction=0.9",
)


def lines_of_corpus() -> list[list[tuple[str, str]]]:
    """(id, text) of the documents of each object."""
    plain = [(f"plain-{i}", f"A plain text about the number {i} and nothing else.") for i in range(30)]
    awkward = [
        ("plain-3", "a second document with the id of another one"),  # duplicate_id
        ("ligature", "an oﬃce\u200b in a\x0c ﬁeld"),
        ("same-1", "A plain text about the number 7 and nothing else."),  # equal to plain-7
        ("same-2", "A plain text about the \ufeffnumber ７ and nothing else."),  # equal once cleaned
        ("short", "too\u200b\u200b\u200b\u200b\u200b\u200b\u200b"),
        ("long", "far too long " * 30),
        ("other", "これは日本語の短い文章です。"),
        ("nothing", "\u200b\x00\u200b"),
        ("plain-4", "only here, since the next document has it too"),  # duplicate_id
        ("heir", "only here, since the next document has it too"),  # the text must not vanish with the one before
        ("same-3", "only here, since the next document has it too"),
        ("null", ""),
    ]
    return [plain, awkward, [("same-4", awkward[1][1])]]


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules" / "script_rules.py").write_text(RULES)
    monkeypatch.syspath_prepend(str(tmp_path / "rules"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "rules"), prepend=":")
    (tmp_path / "corpus").mkdir()
    for number, docs in enumerate(lines_of_corpus()):
        lines = "".join(json.dumps({"id": doc_id, "text": text}) + "\n" for doc_id, text in docs)
        (tmp_path / "corpus" / f"{number}.jsonl").write_text(lines)
    return tmp_path / "corpus"


def rejects_of(root: str, manifest: Manifest) -> list[dict[str, Any]]:
    entry = manifest.rejects
    assert entry is not None
    return list(read_table(open_store(root), ObjectEntry.from_json(entry)).to_pylist())


def check(root: str) -> None:
    """The version holds what is left of the corpus, and says what became of the rest."""
    manifest = open_current(open_store(root))
    assert manifest.rows == {
        "read": 43,
        "indexed": 32,
        "rejected": {"duplicate_id": 2, "empty_text": 1},
        "dropped": {
            "duplicate_text": 4,
            "empty_after_cleaning": 1,
            "in_latin_script": 1,
            "too_long": 1,
            "too_short": 1,
        },
    }
    lines = {line["doc_id"]: line for line in rejects_of(root, manifest) if line["doc_id"] is not None}
    assert len(rejects_of(root, manifest)) == 43 - 32
    assert {name: line["detail"] for name, line in lines.items() if line["reason"] == "duplicate_text"} == {
        "same-1": lines["same-2"]["detail"],
        "same-2": f"same text as plain-7 in 0.jsonl row {len(first_lines(7))}",
        "same-3": f"same text as heir in 1.jsonl row {lines['plain-4']['row'] + len(line_of('plain-4'))}",
        "same-4": f"same text as ligature in 1.jsonl row {lines['plain-3']['row'] + len(line_of('plain-3'))}",
    }
    assert lines["same-1"]["source"] == "1.jsonl"
    # Queries are cleaned like the documents.
    for query in ("an oﬃce\u200b in a\x0c ﬁeld", "an office in a  field"):
        (found,) = search(root, [query], k=1)
        assert (found["hits"][0]["doc_id"], found["hits"][0]["text"]) == ("ligature", "an office in a  field")
        assert found["hits"][0]["score"] > 0.99


def first_lines(count: int) -> bytes:
    """The first lines of the first object."""
    lines = [json.dumps({"id": doc_id, "text": text}) + "\n" for doc_id, text in lines_of_corpus()[0][:count]]
    return "".join(lines).encode()


def line_of(doc_id: str) -> bytes:
    """The document's line in the second object."""
    text = dict(lines_of_corpus()[1])[doc_id]
    return (json.dumps({"id": doc_id, "text": text}) + "\n").encode()


def test_what_cleaning_leaves_out_is_counted_and_listed_on_a_cluster_too(
    corpus: Path, tmp_path: Path, ray_cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, together = str(tmp_path / "alone"), str(tmp_path / "together")
    build_in_one_process(monkeypatch, [str(corpus)], alone, *SETTINGS)
    check(alone)
    monkeypatch.undo()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "rules"), prepend=":")
    facts = build_json([str(corpus)], together, *SETTINGS, ray_address=ray_cluster, workers=1)
    assert facts["content_digest"] == open_current(open_store(alone)).content_digest
    assert open_current(open_store(together)).rows == open_current(open_store(alone)).rows


def test_pieces_are_kept_when_only_the_treatment_of_equal_texts_changes(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path / "root")
    settings = [setting for setting in SETTINGS if not setting.startswith("clean.duplicates")]

    def stopped(context: RunContext, *_: Any) -> Manifest:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "build_candidate", stopped)
        with pytest.raises(KeyboardInterrupt):
            build_in_one_process(patch, [str(corpus)], root, *settings, "clean.duplicates=drop")
    kept = build_in_one_process(monkeypatch, [str(corpus)], root, *settings)
    assert (kept.pieces_encoded, kept.manifest.rows["indexed"]) == (0, 36)
    assert "duplicate_text" not in kept.manifest.rows["dropped"]
    # Published: the other treatment is another index, which is not up to date.
    dropped = build_in_one_process(monkeypatch, [str(corpus)], root, *settings, "clean.duplicates=drop")
    assert (dropped.published, dropped.manifest.rows["indexed"]) == (True, 32)
    assert dropped.manifest.fingerprint["clean.keep.script_rules:in_latin_script"]

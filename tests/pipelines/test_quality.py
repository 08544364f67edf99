"""Retrieval quality on real judged collections: index against exact search against sentence-transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.evaluate import evaluate
from tests.data_paths import collection
from tests.pipelines.one_process import build_in_one_process

# nDCG@10 of sentence-transformers with all-MiniLM-L6-v2: title, a space, text; 256 tokens, one vector a document.
REFERENCE = {"cranfield": 0.374, "scifact": 0.645}
COLLECTIONS = ["cranfield", pytest.param("scifact", marks=pytest.mark.slow)]
# Default sizes of pieces and parts: these are claims about the defaults.
DEFAULT_UNITS = ("read.piece_rows=1024", "index.shard_rows=131072", "index.part_bytes=268435456")


def evaluated(monkeypatch: pytest.MonkeyPatch, name: str, root: Path, *settings: str) -> dict[str, Any]:
    folder = collection(name)
    build_in_one_process(monkeypatch, [str(folder / "corpus.parquet")], str(root), *DEFAULT_UNITS, *settings)
    return evaluate(str(root), str(folder / "queries.parquet"), str(folder / "qrels.parquet"))


@pytest.mark.parametrize("name", COLLECTIONS)
def test_default_settings_lose_nothing_against_exact_search(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = evaluated(monkeypatch, name, tmp_path / "root")
    assert found["index_recall@10"] >= 0.95
    assert found["ndcg@10"] == pytest.approx(found["exact_ndcg@10"], abs=0.01)


@pytest.mark.parametrize("name", COLLECTIONS)
def test_truncated_documents_score_as_sentence_transformers_does(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = evaluated(monkeypatch, name, tmp_path / "root", "chunk.mode=truncate")
    assert found["exact_ndcg@10"] == pytest.approx(REFERENCE[name], abs=0.005)
    assert found["index_recall@10"] >= 0.95

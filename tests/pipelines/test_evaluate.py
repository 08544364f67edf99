"""Metrics against values worked out by hand and against scikit-learn; documents from hits; judged files."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from operators.artifact.index import Neighbours
from operators.errors import ConfigError
from pipelines.evaluate import documents_of_hits, first_k, ndcg, rank_documents, read_judged, recall


def test_ndcg_is_the_hand_computed_value() -> None:
    # Ranking: score 1 at rank 1, unjudged at rank 2, score 3 at rank 3; the ideal is 3, 2, 1.
    found = 1 / math.log2(2) + 3 / math.log2(4)
    ideal = 3 / math.log2(2) + 2 / math.log2(3) + 1 / math.log2(4)
    assert ndcg(["a", "x", "c"], {"a": 1, "b": 2, "c": 3}) == pytest.approx(found / ideal)
    assert found == pytest.approx(2.5)
    assert ideal == pytest.approx(4.7618595071)


def test_ndcg_counts_only_its_depth_in_the_ranking_and_in_the_ideal() -> None:
    judgements = {f"d{number}": 1.0 for number in range(20)}
    assert ndcg([f"d{number}" for number in range(20)], judgements) == 1.0
    assert ndcg([*(f"x{number}" for number in range(10)), "d0"], judgements) == 0.0


def test_ndcg_takes_scores_below_zero_as_zero_and_is_zero_without_relevant_documents() -> None:
    assert ndcg(["bad", "good"], {"bad": -1, "good": 1}) == pytest.approx(1 / math.log2(3))
    assert ndcg(["a"], {"a": 0}) == 0.0
    assert ndcg([], {"a": 1}) == 0.0


@pytest.mark.filterwarnings("ignore")
def test_ndcg_agrees_with_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(7)
    for _ in range(20):
        gains = rng.integers(0, 5, 40).astype(float)
        gains[0] = 4.0  # at least one relevant document
        scores = rng.permutation(40).astype(float)
        ranking = [f"d{number}" for number in np.argsort(-scores)]
        judgements = {f"d{number}": gain for number, gain in enumerate(gains.tolist())}
        expected = metrics.ndcg_score(gains[None], scores[None], k=10)
        assert ndcg(ranking, judgements, 10) == pytest.approx(expected, abs=1e-12)


def test_recall_is_the_share_of_documents_judged_above_zero() -> None:
    judgements = {"a": 2, "b": 1, "c": 1, "d": 0, "e": -1}
    assert recall(["a", "d", "e", "c"], judgements) == pytest.approx(2 / 3)
    assert recall(["d", "a"], judgements, depth=1) == 0.0
    assert recall([], {"a": 0}) == 0.0


def test_a_document_ranks_as_its_best_chunk_and_ties_go_to_the_lower_row() -> None:
    scores = np.array([0.5, 0.9, 0.5, 0.7], np.float32)
    rows = np.array([8, 3, 2, 5])
    assert documents_of_hits(scores, rows, ["late", "best", "early", "late"]) == ["best", "late", "early"]
    assert documents_of_hits(scores[[0, 2]], rows[[0, 2]], ["late", "early"]) == ["early", "late"]


class IndexOfChunks:
    """`rank_documents`' view of an index: chunk i belongs to document i // chunks_per_document, in score order."""

    def __init__(self, num_docs: int, chunks_per_document: int) -> None:
        self.per_document = chunks_per_document
        self.manifest: Any = SimpleNamespace(ntotal=num_docs * chunks_per_document, num_docs=num_docs)
        self.asked: list[tuple[int, int]] = []

    def doc_ids_of(self, entries: np.ndarray) -> np.ndarray:
        return np.array([f"d{entry // self.per_document}" for entry in entries.tolist()], dtype=object)

    def find(self, queries_Qd: np.ndarray, k: int, reachable: int | None = None) -> Neighbours:
        self.asked.append((len(queries_Qd), k))
        entries = np.tile(np.arange(k), (len(queries_Qd), 1))
        entries[entries >= (self.manifest.ntotal if reachable is None else reachable)] = -1
        return Neighbours(-entries.astype(np.float32), entries, entries)


def test_queries_are_asked_again_until_they_have_100_documents() -> None:
    index = IndexOfChunks(num_docs=400, chunks_per_document=30)
    rankings = rank_documents(index, np.zeros((3, 2), np.float32), index.find)  # type: ignore[arg-type]
    assert [len(set(ranking)) for ranking in rankings] == [len(ranking) for ranking in rankings]
    assert all(ranking[:100] == [f"d{number}" for number in range(100)] for ranking in rankings)
    assert index.asked == [(3, 800), (3, 1600), (3, 3200)]


def test_a_small_corpus_is_ranked_whole_and_asked_once() -> None:
    index = IndexOfChunks(num_docs=7, chunks_per_document=2)
    assert rank_documents(index, np.zeros((1, 2), np.float32), index.find) == [[f"d{n}" for n in range(7)]]  # type: ignore[arg-type]
    assert index.asked == [(1, 14)]


def test_exhausted_lists_are_not_asked_again() -> None:
    index = IndexOfChunks(num_docs=400, chunks_per_document=10)
    rankings = rank_documents(index, np.zeros((2, 2), np.float32), lambda q, k: index.find(q, k, reachable=35))  # type: ignore[arg-type]
    assert rankings == [["d0", "d1", "d2", "d3"]] * 2
    assert index.asked == [(2, 800)]


def test_the_first_k_grows_with_the_chunks_of_a_document_up_to_eight() -> None:
    def k(num_docs: int, chunks: int) -> int:
        return first_k(IndexOfChunks(num_docs, chunks).manifest)

    assert [k(1000, 1), k(1000, 3), k(1000, 50), k(5, 2)] == [200, 400, 800, 10]


def _write(path: Path, **columns: list[Any]) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def _queries(folder: Path) -> str:
    return _write(folder / "queries.parquet", _id=["1", "2", "3"], text=["one", "two", "three"])


def test_only_queries_with_a_judgement_above_zero_count(tmp_path: Path) -> None:
    qrels = _write(tmp_path / "qrels.parquet", query_id=["3", "1", "2"], doc_id=["a", "b", "c"], score=[1, 2, 0])
    queries, judgements = read_judged(_queries(tmp_path), qrels)
    assert queries == {"1": "one", "3": "three"}
    assert judgements["1"] == {"b": 2.0}
    assert read_judged(_queries(tmp_path), qrels, limit=1)[0] == {"1": "one"}


def test_ids_of_another_type_are_compared_as_text(tmp_path: Path) -> None:
    qrels = _write(tmp_path / "qrels.parquet", query_id=[2], doc_id=[17], score=[1.0])
    assert read_judged(_queries(tmp_path), qrels) == ({"2": "two"}, {"2": {"17": 1.0}})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"query": ["1"], "doc_id": ["a"], "score": [1]}, "must have a column 'query_id', it has query, doc_id, score"),
        ({"query_id": ["1"], "doc_id": ["a"], "score": [None]}, "column 'score' .* must not hold nulls, row 1 does"),
        ({"query_id": ["1"], "doc_id": ["a"], "score": ["high"]}, "score must be a number .*got 'high' in row 1"),
        ({"query_id": ["1", "1"], "doc_id": ["a", "a"], "score": [1, 2]}, "judges document 'a' twice for query '1'"),
        ({"query_id": ["q9"], "doc_id": ["a"], "score": [1]}, "'1', '2', '3'.*'q9'.*--qrels"),
    ],
)
def test_judgements_that_cannot_be_used_are_refused_by_name(
    tmp_path: Path, columns: dict[str, list[Any]], message: str
) -> None:
    qrels = _write(tmp_path / "qrels.parquet", **columns)
    with pytest.raises(ConfigError, match=message):
        read_judged(_queries(tmp_path), qrels)


def test_files_that_are_missing_or_not_parquet_are_refused_by_name(tmp_path: Path) -> None:
    other = tmp_path / "qrels.parquet"
    with pytest.raises(ConfigError, match=r"queries\.parquet' does not exist.*--queries"):
        read_judged(str(tmp_path / "queries.parquet"), str(other))
    other.write_text("query_id\tdoc_id\tscore\n")
    with pytest.raises(ConfigError, match=r"qrels\.parquet' must be a Parquet file.*--qrels"):
        read_judged(_queries(tmp_path), str(other))
    doubled = _write(tmp_path / "doubled.parquet", _id=["1", "1"], text=["one", "two"])
    with pytest.raises(ConfigError, match=r"_id must be unique .*'1' again in row 2"):
        read_judged(doubled, str(other))

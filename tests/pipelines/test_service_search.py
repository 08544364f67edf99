"""What the service answers: the hits of `search`, whatever the form of the query, the batch it fell in, or the filter."""

from __future__ import annotations

import base64
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pipelines.search import encode_queries, search
from pipelines.service.settings import ServiceSettings
from tests.pipelines.nightly_site import Site
from tests.pipelines.running_service import Served, serving

TEXTS = ["the wing of a plane", "قطعة", "吾輩は猫である", "and more of it", "javascript"]


@pytest.fixture(scope="module")
def served(served_site: Site) -> Iterator[Served]:
    with serving(ServiceSettings(served_site.root, poll_s=0.2, max_k=50, max_batch=8, max_hits=200)) as found:
        yield found


def _packed(vectors: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(vectors, "<f4").tobytes()).decode()


def _names(answer: dict) -> list[list[tuple[str, int]]]:
    return [[(hit["doc_id"], hit["chunk_no"]) for hit in result["hits"]] for result in answer["results"]]


def test_text_queries_have_the_hits_of_the_search_command(served: Served, served_site: Site) -> None:
    answer = served.search(queries=TEXTS, k=5)
    expected = search(served_site.root, TEXTS, 5)
    assert answer["version"] == served_site.current.version
    for got, wanted in zip(answer["results"], expected, strict=True):
        assert [hit["rank"] for hit in got["hits"]] == [1, 2, 3, 4, 5]
        assert [(hit["doc_id"], hit["text"]) for hit in got["hits"]] == [
            (h["doc_id"], h["text"]) for h in wanted["hits"]
        ]
        assert np.allclose([hit["score"] for hit in got["hits"]], [h["score"] for h in wanted["hits"]], atol=5e-3)
        assert all(hit["source"] == "docs.jsonl" for hit in got["hits"])


def test_vectors_as_lists_and_in_base64_have_the_same_hits(served: Served, served_site: Site) -> None:
    vectors = encode_queries(served_site.current, TEXTS, None)
    as_lists = served.search(vectors=vectors.tolist(), k=5)
    assert served.search(vectors_b64=_packed(vectors), k=5)["results"] == as_lists["results"]
    assert _names(as_lists) == _names(served.search(queries=TEXTS, k=5))
    assert set(as_lists["took_ms"]) == {"queue", "search", "rows", "total"}


def test_many_requests_at_once_have_the_answers_that_each_has_alone(served: Served, served_site: Site) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((48, served_site.current.d)).astype(np.float32)
    asked = [
        {
            "vectors_b64": _packed(vectors[i : i + 1 + i % 3]),
            "k": 3 + i % 2,
            "nprobe": 1 + i % 2,
            "refine_factor": i % 3,
        }
        for i in range(40)
    ]
    alone = [served.search(**fields)["results"] for fields in asked]
    with ThreadPoolExecutor(20) as pool:
        together = list(pool.map(lambda fields: served.search(**fields)["results"], asked))
    for one, other in zip(alone, together, strict=True):
        assert _names({"results": one}) == _names({"results": other})
        scores = [[[hit["score"] for hit in result["hits"]] for result in results] for results in (one, other)]
        assert np.allclose(np.concatenate(scores[0]), np.concatenate(scores[1]), atol=1e-5)


def test_a_prefix_gives_the_best_of_its_documents_and_no_other(served: Served, served_site: Site) -> None:
    everything = search(served_site.root, TEXTS, 20, nprobe=4, refine_factor=8)
    answer = served.search(queries=TEXTS, k=6, nprobe=1, doc_id_prefix="plain-1")
    for got, wanted in zip(answer["results"], everything, strict=True):
        best = [hit["doc_id"] for hit in wanted["hits"] if hit["doc_id"].startswith("plain-1")]
        assert [hit["doc_id"] for hit in got["hits"]] == best[:6]
    assert _names(served.search(queries=TEXTS[:1], doc_id_prefix="no such")) == [[]]


def test_a_recall_chooses_the_operating_point(served: Served) -> None:
    facts = served.get("/v1/index")
    point = next(point for point in facts["operating_points"] if point["recall"] == 0.9)
    answer = served.search(queries=TEXTS[:1], recall=0.9)
    assert (answer["nprobe"], answer["refine_factor"]) == (point["nprobe"], point["refine_factor"])


def test_hits_without_text_have_none(served: Served) -> None:
    (result,) = served.search(queries=TEXTS[:1], with_text=False)["results"]
    assert all(set(hit) == {"rank", "score", "doc_id", "chunk_no", "source"} for hit in result["hits"])


@pytest.mark.parametrize(
    ("fields", "where", "rule"),
    [
        ({"queries": TEXTS, "k": 51}, "k", "k must be an integer in 1..50 (--max-k)"),
        ({"queries": TEXTS, "k": True}, "k", "k must be an integer"),
        ({"queries": TEXTS * 2}, "queries", "queries must hold 1..8 queries (--max-batch of the service), got 10"),
        ({"queries": TEXTS, "k": 45}, "k", "queries * k must be at most 200 (--max-hits of the service), got 5 * 45"),
        ({"queries": TEXTS, "nprobe": 99}, "nprobe", "nprobe must be an integer in 1..4 (nlist is 4"),
        ({"queries": TEXTS, "refine_factor": 65}, "refine_factor", "in 0..64 (--max-refine-factor)"),
        ({"queries": TEXTS, "recall": 0.9, "nprobe": 1}, "recall", "recall chooses nprobe and refine_factor"),
        ({"queries": TEXTS, "recall": 1}, "recall", "between 0 and 1, both excluded"),
        ({"queries": [" \n"]}, "queries[0]", "a query must have text"),
        ({"queries": ["a", 7]}, "queries[1]", "a query must be a string, got a number"),
        ({"queries": ["a" * 8193]}, "queries[0]", "at most 8192 characters (--max-query-chars of the service)"),
        (
            {"queries": TEXTS, "vectors": []},
            "body",
            "give exactly one of queries, vectors, vectors_b64; got queries and",
        ),
        ({"k": 3}, "body", "give exactly one of queries, vectors, vectors_b64; got none"),
        ({"querys": TEXTS}, "body", "unknown field 'querys'; did you mean 'queries'?"),
        ({"vectors": [[1.0, 2.0]]}, "vectors[0]", "a vector must have d = 384 numbers, as the index has, got 2"),
        ({"vectors": [[0.0] * 383 + ["x"]]}, "vectors[0][383]", "a vector must hold numbers, got a string"),
        ({"vectors": [[0.0] * 384, [1e39] * 384]}, "vectors[1]", "a vector must be finite"),
        ({"vectors": [[1e20] * 384]}, "vectors[0]", "a squared norm under 1e+30"),
        (
            {"vectors_b64": "AAAA"},
            "vectors_b64",
            "d = 384 little-endian float32, a multiple of 1536 bytes, got 3 bytes",
        ),
        ({"vectors_b64": _packed(np.full(384, np.nan))}, "vectors_b64[0]", "a vector must be finite"),
        ({"vectors_b64": "no base64"}, "vectors_b64", "must be base64"),
        ({"queries": TEXTS, "doc_id_prefix": ""}, "doc_id_prefix", "a string of 1 to 1024 characters"),
        ({"queries": TEXTS, "with_text": 1}, "with_text", "with_text must be true or false"),
    ],
)
def test_what_breaks_a_rule_is_refused_with_the_rule_and_the_place(
    served: Served, fields: dict, where: str, rule: str
) -> None:
    error = served.search(**fields)["error"]
    assert (error["code"], error["where"]) == ("invalid_request", where)
    assert rule in error["message"]


def test_metrics_count_answers_refusals_and_batches(served: Served, served_site: Site) -> None:
    served.search(queries=TEXTS)
    served.search(queries=[])
    with urllib.request.urlopen(served.url + "/metrics", timeout=30) as answer:
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        lines = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if not line.startswith("#"))
    assert float(lines['vectormill_requests_total{route="/v1/search",status="200"}']) >= 1
    assert float(lines['vectormill_refused_total{code="invalid_request"}']) >= 1
    assert float(lines['vectormill_queries_total{form="text"}']) >= 5
    assert float(lines['vectormill_batch_queries_count{stage="encode"}']) >= 1
    assert float(lines['vectormill_stage_seconds_count{stage="search"}']) >= 1
    assert float(lines[f'vectormill_index_info{{version="{served_site.current.version}"}}']) == 1
    assert float(lines["vectormill_index_vectors"]) == served_site.current.ntotal
    assert float(lines["vectormill_index_version_age_seconds"]) > 0
    assert float(lines["vectormill_queue_queries"]) == 0
    assert float(lines['vectormill_row_groups_total{found="cache"}']) >= 1
    assert float(lines["vectormill_row_cache_bytes"]) > 0

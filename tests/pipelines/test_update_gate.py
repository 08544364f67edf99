"""What `update` measures before it publishes, and refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from operators.artifact.manifest import candidate_key, read_candidate
from operators.errors import QualityError
from operators.storage.store import open_store
from pipelines import cli, gate
from pipelines.search import search
from pipelines.verify import verify
from tests.pipelines.nightly_site import A, B, Site

COARSE = (
    "index.nlist=8",
    "index.nbits=4",
    "index.refine_factor=1",
    "index.target_recall=0.3",
    "index.min_recall=0",
    "index.query_sample=64",
    "read.piece_bytes=4000",
)


@pytest.fixture
def coarse(tiny_model: Path, tmp_path: Path) -> Site:
    """A version of low recall, by the choice of its settings."""
    made = Site(tmp_path, tiny_model)
    rng = np.random.default_rng(0)
    words = ["wing", "flow", "heat", "shock", "plate", "drag", "lift", "jet", "nozzle", "wake", "tail", "rudder"]
    made.put("a.jsonl", [(f"a-{n}", " ".join(rng.choice(words, 6).tolist())) for n in range(90)])
    made.build(*COARSE)
    return made


def test_a_candidate_of_low_recall_is_kept_and_not_published(
    coarse: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coarse.put("b.jsonl", B)
    before = coarse.current
    arguments = ["update", str(coarse.docs), "--index", coarse.root, "--quiet", "--set", "cluster.where=process"]
    assert cli.run(arguments) == 10
    said = " ".join(capsys.readouterr().err.split())
    assert "recall@10 on the query sample must be at least 0.95 (--min-recall), got 0." in said
    assert "nothing was published, v000001 stays" in said
    assert coarse.current == before
    store = open_store(coarse.root)
    (run_id,) = {key.split("/")[1] for key in store.list_keys("runs")}
    assert store.size_bytes(candidate_key(run_id))
    candidate = read_candidate(store, run_id)
    assert candidate.quality["recall@10"] < 0.95
    assert set(coarse.live(candidate)) >= {name for name, _ in B}
    hits = search(coarse.root, [B[3][1]], k=1, nprobe=8, refine_factor=50, version="candidate")[0]["hits"]
    assert hits[0]["doc_id"] == "b-3"
    assert verify(coarse.root, "candidate")["ok"]
    assert candidate.quality["recall@10"] > before.quality["recall@10"] - gate.MAX_RECALL_LOSS
    published = coarse.update(min_recall=0.5)
    assert (published.published, published.texts_encoded) == (True, 0)
    assert published.manifest.content_digest == candidate.content_digest
    assert store.list_keys("runs") == []


def test_a_candidate_far_below_its_parent_is_not_published(tiny_model: Path, tmp_path: Path) -> None:
    site = Site(tmp_path, tiny_model)
    site.put("a.jsonl", [(f"a-{n}", text) for n, (_, text) in enumerate(A[:4] + B[:4])])
    site.build(*COARSE, "index.target_recall=0.9")
    rng = np.random.default_rng(1)
    words = ["plate", "drag", "lift", "jet", "tail", "rudder", "漢字", "крыло", "and", "of", "the", "number", "case"]
    site.put("b.jsonl", [(f"n-{n}", " ".join(rng.choice(words, 5).tolist())) for n in range(120)])
    with pytest.raises(QualityError, match=r"at most 0\.02 under the published version's .* v000001 stays"):
        site.update(min_recall=0.0)
    assert site.current.version == "v000001"


def test_own_queries_gate_both_versions_and_the_stored_sample_goes_on(site: Site) -> None:
    before = site.current
    site.put("d.jsonl", [("d", "one more")])
    manifest = site.update(queries=["wing and flow", "heat", "the nozzle"]).manifest
    given = manifest.quality["given_queries"]
    assert given["queries"] == 3
    assert 0 < given["recall@10"] <= 1
    assert 0 < given["parent_recall@10"] <= 1
    assert manifest.quality["queries"] == 8
    assert manifest.quality["trained_recall@10"] == before.quality["recall@10"]
    assert manifest.queries == before.queries
    site.put("d.jsonl", [("d", "edited")])
    assert "given_queries" not in site.update().manifest.quality


def test_own_queries_that_are_found_badly_refuse_a_candidate(coarse: Site) -> None:
    coarse.put("b.jsonl", B)
    with pytest.raises(QualityError, match=r"recall@10 on the queries given \(--queries\) must be at least 0\.99"):
        coarse.update(min_recall=0.99, queries=[text for _, text in B])

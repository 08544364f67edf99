from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from operators.artifact.deletions import live_rows
from operators.artifact.index import Index
from operators.artifact.list_run import RunReader
from operators.artifact.manifest import (
    Manifest,
    candidate_key,
    open_current,
    read_part_record,
)
from operators.documents import read_ledger, read_sources
from operators.errors import ConfigError, IndexNotFoundError, QualityError
from operators.storage.store import Store, open_store
from operators.trainer import sample_pieces, train_quantizer
from pipelines import compact_candidate
from pipelines.compact import compact
from pipelines.config import RunConfig
from pipelines.runs import unfinished_runs
from pipelines.verify import verify
from tests.artifact_maker import Version, commit_corpus, delete_rows, make_version
from tests.pipelines.compact_versions import copied, make_versions, settings


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Version:
    return make_versions(tmp_path_factory.mktemp("versions"))


@pytest.fixture
def version(template: Version, tmp_path: Path) -> Version:
    """A copy of the template."""
    return copied(template, tmp_path / "root")


def entries_of(store: Store, manifest: Manifest) -> dict[int, dict[str, Any]]:
    """What the parts hold, by row id."""
    found = {}
    for segment in manifest.segments:
        for ref in segment.parts:
            record = read_part_record(store, ref)
            entries = RunReader(store, "part", record.objects, record.facts).read_lists(
                ref.first_list, ref.first_list + ref.num_lists
            )
            for i, line in enumerate(entries.rows.to_pylist()):
                assert line.pop("row_id") == entries.row_ids[i]
                vector, code = entries.vectors[i].tobytes(), entries.codes[i].tobytes()
                found[int(entries.row_ids[i])] = {**line, "vector": vector, "code": code}
    return found


@pytest.mark.parametrize("fan_in", [2, 3, 64])
@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_the_new_segment_holds_the_live_rows_in_their_order(tmp_path: Path, metric: str, fan_in: int) -> None:
    made = make_versions(tmp_path, metric=metric)
    store, before, live_N = made.store, entries_of(made.store, made.manifest), made.live_N
    done = compact(store.url, settings(f"index.merge_fan_in={fan_in}"))
    assert done.published
    manifest = open_current(store)
    assert manifest == done.manifest
    assert (manifest.kind, manifest.parent, len(manifest.segments)) == ("compact", made.manifest.version, 1)
    assert (manifest.ntotal, manifest.num_docs) == (made.manifest.ntotal, made.manifest.num_docs)
    assert manifest.segments[0].deleted is None
    assert len(manifest.segments[0].parts) > 2
    after = entries_of(store, manifest)
    assert list(range(manifest.ntotal)) == sorted(after)
    assert [after[i] for i in range(manifest.ntotal)] == [before[row] for row in np.flatnonzero(live_N).tolist()]
    assert verify(store.url)["problems"] == []
    assert unfinished_runs(store) == []


def test_the_ledger_says_the_same_of_every_document_with_the_new_row_ids(version: Version) -> None:
    store, old = version.store, version.manifest
    entries = read_sources(store, old)
    before, new_ids = read_ledger(store, old, entries), np.cumsum(live_rows(store, old)) - 1
    new = compact(store.url, settings()).manifest
    found = read_sources(store, new)
    after = read_ledger(store, new, found)
    assert [(e.obj, e.num_docs, e.num_rows_read) for e in found] == [
        (e.obj, e.num_docs, e.num_rows_read) for e in entries
    ]
    assert new.amended is None
    assert sum(table["num_rows"] for table in new.documents) == len(before)
    assert (before.row_id_N < 0).any()
    expected = np.where(before.row_id_N >= 0, new_ids[before.row_id_N], -1)
    assert after.row_id_N.tolist() == expected.tolist()
    assert after.num_chunks_N.tolist() == np.where(expected >= 0, before.num_chunks_N, 0).tolist()
    assert after.state_N.tolist() == before.state_N.tolist()
    assert np.array_equal(after.doc_hash_N2, before.doc_hash_N2)
    assert np.array_equal(after.text_hash_N2, before.text_hash_N2)


def answers(store: Store, queries_Qd: np.ndarray, nprobe: int, refine_factor: int) -> list[Any]:
    index = Index.open(store)
    found = index.search(queries_Qd, 10, nprobe=nprobe, refine_factor=refine_factor)
    hits = [index.rows_of(entries[entries >= 0]) for entries in found.entries_Qk]
    ids = [[(hit["doc_id"], hit["chunk_no"]) for hit in line] for line in hits]
    return [[*zip(line, scores.tolist(), strict=False)] for line, scores in zip(ids, found.scores_Qk, strict=True)]


def test_answers_are_the_same_before_and_after(store: Store, tmp_path: Path) -> None:
    made = make_versions(store.url)
    cases = [(1, 0), (3, 2), (8, 4)]
    before = [answers(store, made.corpus.queries_Qd, *case) for case in cases]
    assert compact(store.url, settings()).published
    assert [answers(store, made.corpus.queries_Qd, *case) for case in cases] == before
    assert verify(store.url)["problems"] == []


def test_published_bytes_depend_neither_on_buffers_nor_on_waves(template: Version, tmp_path: Path) -> None:
    digests = set()
    for number, (buffer_bytes, fan_in) in enumerate([(1, 64), (6_000, 2), (10**9, 64)]):
        made = copied(template, tmp_path / str(number))
        chosen = settings(f"index.merge_buffer_bytes={buffer_bytes}", f"index.merge_fan_in={fan_in}")
        digests.add(compact(made.store.url, chosen).manifest.content_digest)
    assert len(digests) == 1


def test_a_compact_version_is_left_as_it_is(version: Version) -> None:
    store = version.store
    first = compact(store.url, settings())
    keys = [key for folder in ("segments", "versions", "runs", "quantizers") for key in store.list_keys(folder)]
    again = compact(store.url, settings())
    assert not again.published
    assert again.manifest == first.manifest
    assert keys == [key for folder in ("segments", "versions", "runs", "quantizers") for key in store.list_keys(folder)]


def test_deleted_rows_alone_are_a_reason_to_compact(tmp_path: Path) -> None:
    made = delete_rows(make_version(tmp_path, num_docs=60, num_pieces=1, num_shards=1), [5, 6, 7, 90])
    done = compact(str(tmp_path), settings())
    assert done.published
    assert done.manifest.ntotal == made.manifest.ntotal < 120


def test_no_index_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(IndexNotFoundError, match="no index is published"):
        compact(str(tmp_path), settings())


def test_settings_that_a_compaction_cannot_change_are_refused(version: Version) -> None:
    with pytest.raises(ConfigError, match=r"version v000004 was made with, got index\.metric: was 'ip', now 'l2'"):
        compact(version.store.url, settings("index.metric=l2"), retrain=True)
    with pytest.raises(ConfigError, match=r"got index\.nlist: was 0, now 4: .* \(--retrain may change"):
        compact(version.store.url, settings("index.nlist=4"))
    with pytest.raises(ConfigError, match=r"got chunk\.mode"):
        compact(version.store.url, settings("chunk.mode=truncate"), retrain=True)


def test_a_list_without_a_live_row_makes_an_empty_part(tmp_path: Path) -> None:
    made = make_version(tmp_path, num_docs=60, nlist=4, num_pieces=1, num_shards=1)
    in_list = [row for row, entry in entries_of(made.store, made.manifest).items() if entry["list_no"] == 3]
    made = delete_rows(made, in_list)
    done = compact(str(tmp_path), settings("index.part_bytes=1"))
    assert 0 in [part.num_entries for part in done.manifest.segments[0].parts]
    assert verify(str(tmp_path))["problems"] == []
    assert len(answers(made.store, made.corpus.queries_Qd, 4, 2)[0]) == 10


# Retraining


def test_a_retrained_index_is_that_of_a_quantizer_trained_on_the_live_texts(version: Version, tmp_path: Path) -> None:
    store, corpus, live_N = version.store, version.corpus, version.live_N
    before = entries_of(store, version.manifest)
    done = compact(store.url, settings(), retrain=True)
    manifest = done.manifest
    # What a build would train: the same sample, whatever pieces or parts the rows come in.
    rows = np.flatnonzero(live_N)
    live = dataclasses.replace(
        corpus,
        vectors_Nd=corpus.vectors_Nd[live_N],
        doc_ids=[corpus.doc_ids[i] for i in rows],
        chunk_no=corpus.chunk_no[live_N],
        texts=[corpus.texts[i] for i in rows],
    )
    config = settings()(RunConfig()).index
    other = open_store(str(tmp_path / "other"))
    sample = sample_pieces(other, [(record, []) for record in commit_corpus(other, live, 3)], share=1.0)
    sizes = compact_candidate.resolve_sizes(config, len(rows), version.manifest.d)
    expected = train_quantizer(other, "train", sample.vectors, config, sizes, "inputs")
    assert manifest.quantizer["sha256"] == expected.digest != version.manifest.quantizer["sha256"]
    assert manifest.nlist == sizes.nlist
    after = entries_of(store, manifest)
    list_no, codes = expected.encode(live.vectors_Nd)
    for i, row in enumerate(rows.tolist()):
        assert after[i] == {**before[row], "list_no": list_no[i], "code": codes[i].tobytes()}
    assert verify(store.url)["problems"] == []
    exact = Index.open(store).exact_search(corpus.queries_Qd, 10)
    found = Index.open(store).search(corpus.queries_Qd, 10, nprobe=manifest.nlist, refine_factor=100)
    assert np.array_equal(found.row_ids_Qk, exact.row_ids_Qk)


def test_a_retrained_index_does_not_depend_on_the_size_of_shards(template: Version, tmp_path: Path) -> None:
    digests = set()
    for shard_rows in (20, 10_000):
        made = copied(template, tmp_path / str(shard_rows))
        chosen = settings(f"index.shard_rows={shard_rows}", "index.merge_fan_in=3")
        digests.add(compact(made.store.url, chosen, retrain=True).manifest.content_digest)
    assert len(digests) == 1


def test_a_retrained_index_of_low_recall_is_kept_as_a_candidate_and_not_published(version: Version) -> None:
    store = version.store
    poor = settings("index.M=1", "index.nbits=4", "index.refine_factor=1", "index.target_recall=0.2")
    with pytest.raises(QualityError, match=r"recall@10 .* nothing was published, v000004 stays"):
        compact(store.url, poor, retrain=True, min_recall=0.9)
    assert open_current(store).version == "v000004"
    (run,) = unfinished_runs(store)
    assert store.size_bytes(candidate_key(run.run_id))
    # Other settings begin anew.
    assert compact(store.url, settings(), retrain=True).published


def test_ray_and_one_process_make_the_same_bytes(template: Version, tmp_path: Path, ray_cluster: str) -> None:
    digests = set()
    for where in ("process", "ray"):
        made = copied(template, tmp_path / where)
        # Few units: each worker of the cluster takes seconds to start.
        chosen = [f"cluster.where={where}", "index.shard_rows=1000", "index.part_bytes=100000"]
        chosen += [f"cluster.address={ray_cluster}"] if where == "ray" else []
        digests.add(compact(made.store.url, settings(*chosen), retrain=True).manifest.content_digest)
    assert len(digests) == 1

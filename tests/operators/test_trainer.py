from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import kmeans
from kernels.assign import assign_nearest
from operators import trainer
from operators.artifact.list_assignment import NEAREST, ListAssignment
from operators.artifact.quantizer import read_quantizer
from operators.errors import IntegrityError
from operators.index_config import IndexConfig, IndexSizes
from operators.query_sample import QUERY_WORDS, excerpt
from operators.storage.commits import CommitRecord, read_record
from operators.storage.store import Store, open_store
from operators.trainer import SampledRows, join_samples, sample_pieces, train_quantizer
from tests.artifact_maker import commit_corpus, flip_bit, make_corpus

NUM_PIECES = 6
CONFIG = IndexConfig(metric="ip", coarse_iterations=4, pq_iterations=2, seed=3, checkpoint_s=0)
SIZES = IndexSizes(d=16, nlist=8, M=4, nbits=4, train_points=500)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, list[tuple[CommitRecord, list[int]]]]:
    store = open_store(str(tmp_path_factory.mktemp("pieces")))
    records = commit_corpus(store, make_corpus(400), NUM_PIECES)
    dropped = [[], [0, 3], [], [], list(range(20)), []]
    return store, list(zip(records, dropped, strict=True))


def assert_same(found: SampledRows, expected: SampledRows) -> None:
    assert np.array_equal(found.order, expected.order)
    assert np.array_equal(found.vectors.view(np.uint16), expected.vectors.view(np.uint16))


@settings(max_examples=12)
@given(cuts=st.lists(st.integers(0, NUM_PIECES), max_size=4), share=st.sampled_from([0.0, 0.1, 0.6, 1.0]))
def test_samples_do_not_depend_on_how_pieces_are_grouped(
    pieces: tuple[Store, list[tuple[CommitRecord, list[int]]]], cuts: list[int], share: float
) -> None:
    store, records = pieces
    whole = sample_pieces(store, records, share=share)
    bounds = sorted({0, NUM_PIECES, *cuts})
    groups = [sample_pieces(store, records[lo:hi], share=share) for lo, hi in itertools.pairwise(bounds)]
    assert_same(join_samples(groups), whole)
    assert_same(join_samples(groups[::-1]), whole)


def test_samples_are_of_the_size_asked_for_and_a_larger_one_holds_a_smaller(
    pieces: tuple[Store, list[tuple[CommitRecord, list[int]]]],
) -> None:
    store, records = pieces
    sizes = {}
    for share in (0.0, 0.25, 0.5, 1.0):
        found = sample_pieces(store, records, share=share)
        sizes[share] = set(found.order.tolist())
        assert len(found.order) == len(found.vectors)
        assert (found.order[1:] > found.order[:-1]).all()
    dropped = [67, 70, *range(268, 288)]  # of 67, 67, 67, 67, 66, 66 documents a piece
    everything = sum(1 + i % 3 for i in range(400) if i not in dropped)
    assert len(sizes[1.0]) == everything
    assert sizes[0.0] == set()
    for small, large in ((0.25, 0.5), (0.5, 1.0)):
        assert sizes[small] < sizes[large]
    # Four standard deviations of a binomial draw of about 760 rows.
    assert abs(len(sizes[0.5]) - everything / 2) < 4 * np.sqrt(everything) / 2


def test_dropped_documents_are_in_no_sample(pieces: tuple[Store, list[tuple[CommitRecord, list[int]]]]) -> None:
    store, records = pieces
    record = records[2][0]
    whole = sample_pieces(store, [(record, [])], share=1.0)
    less = sample_pieces(store, [(record, [1])], share=1.0)
    lost = {tuple(v) for v in whole.vectors.tolist()} - {tuple(v) for v in less.vectors.tolist()}
    assert 1 <= len(lost) <= 3
    assert len(less.order) == len(whole.order) - len(lost)


def sample_of(store: Store, records: list[tuple[CommitRecord, list[int]]]) -> np.ndarray:
    return sample_pieces(store, records, share=1.0).vectors


@pytest.mark.parametrize("assign_share", [1.0, 0.9])
@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_training_resumed_from_any_checkpoint_gives_the_same_bytes(
    pieces: tuple[Store, list[tuple[CommitRecord, list[int]]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    metric: str,
    assign_share: float,
) -> None:
    config = dataclasses.replace(CONFIG, metric=metric, assign_share=assign_share)
    sizes = dataclasses.replace(SIZES, nlist=60)
    monkeypatch.setattr(kmeans, "MAX_EXACT", 20)  # on two levels an iteration depends on the lists of the one before
    sample = sample_of(*pieces)
    whole = train_quantizer(open_store(str(tmp_path / "whole")), "t", sample, config, sizes, "corpus")
    iterations: list[int] = []
    keep = trainer.commit

    def counting_commit(store: Store, key: str, record: CommitRecord) -> CommitRecord:
        iterations.append(int(record.unit.split()[1]))
        if len(iterations) == stop_after:
            raise KeyboardInterrupt  # the checkpoint's data is there, its record is not
        return keep(store, key, record)

    monkeypatch.setattr(trainer, "commit", counting_commit)
    for stop_after in range(1, 5):
        store = open_store(str(tmp_path / str(stop_after)))
        iterations.clear()
        with pytest.raises(KeyboardInterrupt):
            train_quantizer(store, "t", sample, config, sizes, "corpus")
        iterations.clear()
        iterations.extend([0] * 10)  # beyond stop_after
        resumed = train_quantizer(store, "t", sample, config, sizes, "corpus")
        assert resumed.serialized == whole.serialized
        assert resumed.assignment == whole.assignment
        assert iterations[10:] == list(range(stop_after, 5))


def test_checkpoints_of_another_corpus_are_refused_by_name(
    pieces: tuple[Store, list[tuple[CommitRecord, list[int]]]], tmp_path: Path
) -> None:
    sample = sample_of(*pieces)
    store = open_store(str(tmp_path / "a"))
    train_quantizer(store, "t", sample[:300], CONFIG, SIZES, "corpus 1")
    with pytest.raises(IntegrityError, match=r"coarse-001\.json .*made from other inputs"):
        train_quantizer(store, "t", sample, CONFIG, SIZES, "corpus 2")


@pytest.mark.parametrize("role", ["centroids", "lists"])
def test_a_damaged_checkpoint_is_named(
    pieces: tuple[Store, list[tuple[CommitRecord, list[int]]]], tmp_path: Path, role: str
) -> None:
    store = open_store(str(tmp_path))
    train_quantizer(store, "t", sample_of(*pieces), CONFIG, SIZES, "corpus")
    record = read_record(store, "t/coarse-004.json")
    assert record is not None
    flip_bit(store, record.objects[role].key, 77)
    with pytest.raises(IntegrityError, match="coarse-004"):
        train_quantizer(store, "t", sample_of(*pieces), CONFIG, SIZES, "corpus")


@pytest.mark.parametrize(("metric", "nbits"), [("ip", 8), ("ip", 4), ("l2", 8), ("l2", 4)])
def test_a_quantizer_reads_back_with_the_same_bytes_and_codes(
    pieces: tuple[Store, list[tuple[CommitRecord, list[int]]]], tmp_path: Path, metric: str, nbits: int
) -> None:
    sample = sample_of(*pieces)
    config = IndexConfig(metric=metric, nbits=nbits, coarse_iterations=2, pq_iterations=1)
    sizes = IndexSizes(d=16, nlist=8, M=4, nbits=nbits, train_points=500)
    store = open_store(str(tmp_path))
    made = train_quantizer(store, "t", sample, config, sizes, "corpus")
    read = read_quantizer(store, made.write(store))
    assert read.digest == made.digest
    assert (read.metric, read.d, read.nlist, read.M, read.nbits) == (metric, 16, 8, 4, nbits)
    for found, expected in zip(read.encode(sample), made.encode(sample), strict=True):
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_the_share_asked_for_goes_to_the_nearest_list_and_a_read_quantizer_assigns_alike(
    pieces: tuple[Store, list[tuple[CommitRecord, list[int]]]], tmp_path: Path, metric: str
) -> None:
    sample = sample_of(*pieces)
    config = dataclasses.replace(CONFIG, metric=metric, assign_share=0.9)
    sizes = dataclasses.replace(SIZES, nlist=64)
    store = open_store(str(tmp_path))
    made = train_quantizer(store, "t", sample, config, sizes, "corpus")
    assert np.isfinite(made.assignment.slack)
    assert made.assignment.seed == config.seed
    list_no, codes = made.encode(sample)
    nearest = assign_nearest(sample, made.centroids_Kd, metric=metric)
    # The sample is small enough to be measured as a whole.
    assert (list_no == nearest).mean() == made.assignment.share
    assert 0.9 <= made.assignment.share < 1
    read = read_quantizer(store, made.write(store), ListAssignment.from_json(made.assignment.to_json()))
    for rows in (sample, sample[:7], sample[500:].astype(np.float32)):
        first = len(sample) - len(rows) if len(rows) > 7 else 0
        for found, expected in zip(read.encode(rows), (list_no, codes), strict=True):
            assert np.array_equal(found, expected[first : first + len(rows)])


def test_an_assignment_comes_back_from_json_with_the_same_bits() -> None:
    for assignment in (NEAREST, ListAssignment(0.1 + 0.2, 0.9700000000000001, 7), ListAssignment(0.0, 1.0, 2**63)):
        text = json.dumps(assignment.to_json(), allow_nan=False)
        assert ListAssignment.from_json(json.loads(text)) == assignment


@given(words=st.lists(st.sampled_from(["flow", "été", "層", "x"]), max_size=40), seed=st.integers(0, 2**64 - 1))
def test_an_excerpt_is_some_words_of_the_text_in_a_row(words: list[str], seed: int) -> None:
    found = excerpt(" \n".join(words), seed)
    assert len(found.split()) == min(len(words), QUERY_WORDS)
    assert f" {found} " in f" {' '.join(words)} " or not words
    assert excerpt(" \n".join(words), seed) == found


def test_excerpts_begin_at_every_place_that_leaves_enough_words() -> None:
    text = " ".join(str(i) for i in range(QUERY_WORDS + 2))
    assert {excerpt(text, seed).split()[0] for seed in range(9)} == {"0", "1", "2"}
    assert excerpt("  two \n words ", 5) == "two words"
    assert excerpt("   ", 5) == ""

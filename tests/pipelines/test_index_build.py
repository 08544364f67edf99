"""The second half of a build without Ray: its counts are checked, and attempts with other sizes never mix."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from operators.artifact.manifest import PartRef
from operators.errors import IntegrityError
from operators.index_config import IndexConfig
from operators.row_ids import RowIds
from operators.storage.commits import CommitRecord
from operators.storage.store import Store
from pipelines import index_build, index_stages
from tests.artifact_maker import Version, make_shards, make_version


def contents(refs: list[PartRef]) -> list[Any]:
    return [(ref.first_list, ref.num_lists, ref.num_entries, ref.content) for ref in refs]


def context_of(store: Store, run: str, tasks: Any = None, **settings: Any) -> Any:
    """What the second half of a build needs of its context; tasks run in this process, one after the other."""
    return SimpleNamespace(
        store=store,
        config=SimpleNamespace(
            index=IndexConfig(part_bytes=20_000, **settings), encode=SimpleNamespace(threads_per_worker=1)
        ),
        run=SimpleNamespace(prefix=run),
        session=SimpleNamespace(node_cpus=3),
        progress=SimpleNamespace(stage=lambda *_, **__: None),
        tasks=tasks or (lambda function, calls, **_: [function(*call) for call in calls]),
    )


def trained_record(made: Version) -> CommitRecord:
    facts = {"assignment": made.quantizer.assignment.to_json()}
    return CommitRecord("train quantizer", "x", "a", {"quantizer": made.quantizer.write(made.store)}, facts)


def parts_of_build(
    context: Any, made: Version, shards: list[CommitRecord], segment: str = "s", corpus: str = "c" * 64
) -> list[PartRef]:
    trained = trained_record(made)
    return index_build.merge_parts(context, shards, trained, made.pieces, segment, corpus)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Version:
    return make_version(tmp_path_factory.mktemp("build"), num_shards=5, publish=False)


def test_a_merge_killed_and_resumed_with_another_fan_in_gives_the_same_parts(made: Version) -> None:
    expected = parts_of_build(context_of(made.store, "runs/p0"), made, made.shards, "p0")
    assert len(expected) > 2
    wave_done: list[str] = []

    def killed_after_a_wave(function: Any, calls: list[tuple[Any, ...]], **_: Any) -> list[Any]:
        if wave_done:
            raise KeyboardInterrupt
        wave_done.append(calls[0][1])
        return [function(*call) for call in calls]

    with pytest.raises(KeyboardInterrupt):
        parts_of_build(context_of(made.store, "runs/p1", killed_after_a_wave, merge_fan_in=2), made, made.shards, "p1")
    assert "wave1-00000" in wave_done[0]
    found = parts_of_build(context_of(made.store, "runs/p1", merge_fan_in=3), made, made.shards, "p1")
    assert contents(found) == contents(expected)


def test_parts_with_fewer_entries_than_the_shards_are_not_published(made: Version) -> None:
    def without_one(function: Any, calls: list[tuple[Any, ...]], **_: Any) -> list[Any]:
        """Merge tasks that, by a bug, do not see the last shard."""
        return [function(*call[:2], call[2][:-1], *call[3:]) for call in calls]

    with pytest.raises(IntegrityError, match=r"the shards hold \d+ entries, the merged parts \d+"):
        parts_of_build(context_of(made.store, "runs/q", without_one), made, made.shards, "q")


def test_parts_with_other_row_ids_than_the_shards_are_not_published(made: Version) -> None:
    shifted = dataclasses.replace(made.rows, bases=[base + 1 for base in made.rows.bases])
    others = make_shards(made.store, made.pieces, shifted, made.quantizer, 5, prefix="runs/shifted")
    parts_of_build(context_of(made.store, "runs/r"), made, others, "r")
    with pytest.raises(IntegrityError, match="the merged parts hold other row ids than the shards"):
        parts_of_build(context_of(made.store, "runs/r"), made, made.shards, "r")


def test_a_part_that_was_committed_for_other_inputs_is_refused_by_name(made: Version) -> None:
    parts_of_build(context_of(made.store, "runs/t"), made, made.shards, "t", corpus="a" * 64)
    with pytest.raises(IntegrityError, match="part 00000 was made from other inputs"):
        parts_of_build(context_of(made.store, "runs/t"), made, made.shards, "t", corpus="b" * 64)


def test_a_shard_that_was_committed_for_other_inputs_is_refused_by_name(made: Version) -> None:
    trained = trained_record(made)
    groups = index_build.group_pieces(made.pieces, made.rows, 300)
    context = context_of(made.store, "runs/u")
    shards = index_build.build_shards(context, groups, trained, "c" * 64)
    assert sum(shard.facts["num_entries"] for shard in shards) == made.manifest.ntotal

    def foreign(function: Any, calls: list[tuple[Any, ...]], **_: Any) -> list[CommitRecord]:
        """A store in which the second shard's record was replaced by the first's."""
        records = [function(*call) for call in calls]
        return [records[0], records[0], *records[2:]]

    with pytest.raises(IntegrityError, match=r"shard shard-00000.* was made from other inputs"):
        index_build.build_shards(context_of(made.store, "runs/u", foreign), groups, trained, "c" * 64)


def test_shards_cut_otherwise_on_resume_are_built_again_not_mixed(made: Version) -> None:
    trained = trained_record(made)
    expected = None
    for shard_rows in (200, 330, 10_000):
        context = context_of(made.store, "runs/v", shard_rows=shard_rows)
        groups = index_build.group_pieces(made.pieces, made.rows, shard_rows)
        shards = index_build.build_shards(context, groups, trained, "c" * 64)
        found = contents(parts_of_build(context, made, shards, f"v{shard_rows}"))
        expected = expected or found
        assert found == expected


def test_groups_keep_pieces_in_order_and_leave_out_empty_ones(made: Version) -> None:
    rows = RowIds([0, 100, 100, 400], [100, 0, 300, 50], 4, {0: [3]}, made.rows.duplicates)
    groups = index_build.group_pieces(made.pieces[:4], rows, 250)
    assert [[(p.first_row_id, p.num_rows, p.dropped_docs) for p in g] for g in groups] == [
        [(0, 100, [3])],
        [(100, 300, [])],
        [(400, 50, [])],
    ]


def test_samples_drawn_with_another_grouping_are_drawn_again(made: Version) -> None:
    """index.shard_rows may change between attempts: the sample of a resumed run is that of an uninterrupted one."""
    drawn: dict[int, list[CommitRecord]] = {}

    def until_trained(function: Any, calls: list[tuple[Any, ...]], **_: Any) -> list[Any]:
        if function is index_stages.train:
            drawn[len(drawn)] = calls[0][2]
            return [None]
        return [function(*call) for call in calls]

    sizes = SimpleNamespace(train_points=200)
    for shard_rows in (200, 330, 10_000):
        context = context_of(made.store, "runs/y", until_trained, shard_rows=shard_rows)
        context.spec = SimpleNamespace(fingerprint="f")
        groups = index_build.group_pieces(made.pieces, made.rows, shard_rows)
        index_build._train(context, groups, sizes, made.manifest.ntotal, "c" * 64)  # type: ignore[arg-type]
    samples = [
        index_stages.join_samples([index_stages._read_sample(made.store, record) for record in records])
        for records in drawn.values()
    ]
    assert len(samples) == 3
    for sample in samples[1:]:
        assert np.array_equal(sample.order, samples[0].order)
        assert np.array_equal(sample.vectors, samples[0].vectors)

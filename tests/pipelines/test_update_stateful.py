"""Random nights: whatever happens to the corpus and to the commands, the index holds what the plain rule says.

hypothesis draws sequences of edits, updates, kills, rollbacks, compactions and collections of garbage, and sets the
published version against tests/pipelines/plain_corpus.py after each of them. VECTORMILL_STATEFUL_EXAMPLES runs more.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from operators.artifact import exact_neighbours
from operators.artifact.index import Index
from operators.artifact.manifest import Manifest, open_current
from operators.errors import ConfigError, SourceError
from operators.storage.store import open_store
from pipelines import gate, update_plan
from pipelines.build import build
from pipelines.compact import compact
from pipelines.config import load_config
from pipelines.garbage import collect_garbage
from pipelines.rollback import rollback
from pipelines.update import UpdateOptions, update
from pipelines.verify import verify
from pipelines.versions import history
from tests.pipelines.crashes import Killed, killed_at
from tests.pipelines.from_scratch import check_against_one_from_scratch, check_exact_neighbours
from tests.pipelines.nightly_site import HERE, OVERLAP_TOKENS, UNITS, configured
from tests.pipelines.plain_corpus import (
    NO_TOKENS,
    Doc,
    Exhaustive,
    Placed,
    State,
    next_state,
    outcome_of,
)
from tests.pipelines.random_nights import NAMES, TEXTS, Disk, Night, nights_st

EXAMPLES = int(os.environ.get("VECTORMILL_STATEFUL_EXAMPLES", "6"))  # of each of the two ways with equal texts
STEPS = 25
VERIFY_EVERY = 4

QUERIES = ["wing and flow", "the nozzle of a jet", "漢字"]


class Base:
    """The first version, built once, and the corpus that it is of."""

    def __init__(self, folder: Path, model: Path, duplicates: str) -> None:
        self.folder, self.model, self.duplicates = folder, model, duplicates
        self.corpus, self.root = folder / "corpus", folder / "base"
        docs: list[Doc] = [(f"doc-{number % 9}", TEXTS[number % 7]) for number in range(18)]
        self.objects: dict[str, list[Doc]] = {"a.jsonl": docs[:7], "b.parquet": docs[7:12], "c.csv.gz": docs[12:]}
        Disk(self.corpus, self.objects)
        chosen = [*UNITS, f"encode.model={model}", f"clean.duplicates={duplicates}"]
        build([str(self.corpus)], str(self.root), load_config(None, [*chosen, *HERE]))
        self.exhaustive = Exhaustive(model, QUERIES, OVERLAP_TOKENS, precision="float32")
        self.num_examples = 0
        self.seen: Counter[str] = Counter()  # what happened in all examples together

    def state(self) -> State:
        """What the first version was made of."""
        nothing = State(())
        placed = [Placed(name, 1, tuple(docs)) for name, docs in self.objects.items()]
        state = next_state(nothing, placed, (), self.duplicates).state
        # A build numbers the rows of its winners only.
        return State(state.objects, state.deleted, frozenset(outcome_of(state, self.duplicates).places.values()))


class Nights(RuleBasedStateMachine):
    """The corpus on disk, the index, and of each version what it was made of."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.base = base
        base.num_examples += 1
        self.root = str(base.folder / f"root-{base.num_examples}")
        self.steps_since_verify = 0
        self.was_killed = False  # the next command may go on with what a killed one left

    @initialize()
    def first_version(self) -> None:
        shutil.copytree(self.base.root, self.root)
        self.disk = Disk(self.base.corpus, self.base.objects)
        self.states = {self.current.version: self.base.state()}

    @property
    def current(self) -> Manifest:
        return open_current(open_store(self.root))

    @property
    def state(self) -> State:
        return self.states[self.current.version]

    @rule(night=nights_st)
    def a_night(self, night: Night) -> None:
        """The corpus changes, then a command runs."""
        self.base.seen["steps"] += 1
        for change in night.changes:
            self.disk.change(change)
        getattr(self, night.command)(night)

    # What is run

    def update(self, night: Night) -> None:
        self.run_update(self.disk.listed(), [str(self.base.corpus)], UpdateOptions(min_recall=0), night.kill)

    def update_and_delete(self, night: Night) -> None:
        options = UpdateOptions(deletes=night.deletes, min_recall=0)
        self.run_update(self.disk.listed(), [str(self.base.corpus)], options, night.kill)

    def append(self, night: Night) -> None:
        """What is not listed may have to be read again: the index is brought to what is there first."""
        self.run_update(self.disk.listed(), [str(self.base.corpus)], UpdateOptions(min_recall=0), None)
        name = NAMES[night.place % len(NAMES)]
        self.disk.put(name, night.docs)
        options = UpdateOptions(append=True, deletes=night.deletes, min_recall=0)
        others = [other for other in self.state.objects if other.name != name]
        placed = Placed(name, self.disk.stamps[name], tuple(night.docs))
        self.run_update([placed, *others], [str(self.base.corpus / name)], options, night.kill)

    def delete_only(self, night: Night) -> None:
        self.run_update(self.disk.listed(), [str(self.base.corpus)], UpdateOptions(min_recall=0), None)
        options = UpdateOptions(append=True, deletes=[*night.deletes, "unknown"], min_recall=0)
        self.run_update(list(self.state.objects), [], options, night.kill)

    def compact(self, night: Night) -> None:
        before, state = self.current, self.state
        after = State(state.objects, state.deleted, frozenset(outcome_of(state, self.base.duplicates).places.values()))

        def run() -> None:
            result = compact(self.root, configured)
            self.base.seen[f"compact: {result.published}"] += 1
            if result.published and result.manifest.version != before.version:
                assert len(result.manifest.segments) == 1
                assert result.manifest.segments[0].num_deleted == 0

        self.attempt(run, night.kill, before, after)

    def roll_back(self, night: Night) -> None:
        names = sorted(self.states)
        target = names[night.place % len(names)]
        assert rollback(self.root, target)["version"] == target
        self.check_published()

    def collect(self, night: Night) -> None:
        keep = 1 + night.place % 3
        there = [line["version"] for line in history(self.root)["versions"]]
        kept = {self.current.version, *sorted(there)[-keep:]}
        facts = collect_garbage(self.root, keep, 0, delete=True)
        assert set(facts["kept"]) == kept
        self.states = {version: state for version, state in self.states.items() if version in kept}
        self.check_published()

    def run_update(
        self, objects: Sequence[Placed], sources: list[str], options: UpdateOptions, kill: int | None
    ) -> None:
        before, state = self.current, self.state
        step = next_state(state, objects, options.deletes or (), self.base.duplicates)
        after, to_encode = step.state, step.num_to_encode
        expected = outcome_of(after, self.base.duplicates)
        is_same = list(objects) == list(state.objects) and not options.deletes

        # An object that was written again as it was is not remembered: nothing is published for it.
        is_stale = options.append and any(
            placed.stamp != self.disk.stamps.get(placed.name) for placed in state.objects if placed in objects
        )

        def run() -> None:
            try:
                result = update(sources, self.root, configured, options)
            except SourceError as error:
                if not is_stale or "could not be read again" not in str(error):
                    raise
                self.base.seen["append that needed a full update"] += 1
                self.was_killed = True
                return
            if not self.was_killed and not has_late_tokenless(state, objects):
                assert result.texts_encoded == result.changes["texts_to_encode"] == to_encode
            else:
                assert result.texts_encoded <= len(expected.winners) + to_encode
            self.base.seen["encoded"] += result.texts_encoded
            self.base.seen["revived"] += result.changes["revived"]
            self.was_killed = False
            if is_same:
                assert not result.published
                assert result.texts_encoded == 0
            if not result.published:
                # What was not published need not be remembered, but nothing of it may be lost.
                assert self.current.version == before.version
                assert outcome_of(state, self.base.duplicates).winners == expected.winners
                assert not step.newly_deleted

        if not expected.winners:
            with pytest.raises((SourceError, ConfigError), match="at least one usable text"):
                update(sources, self.root, configured, options)
            self.was_killed = True  # its scan is kept
            return
        self.attempt(run, kill, before, after)

    def attempt(self, run: Callable[[], None], kill: int | None, before: Manifest, after: State) -> None:
        """Run a command that may be killed on the way; CURRENT must name its version or the one before."""
        with killed_at(kill):
            try:
                run()
            except Killed as point:
                self.base.seen["killed"] += 1
                self.base.seen[f"killed at {point}"] += 1
                self.was_killed = True
        if self.current.version != before.version:
            self.base.seen[f"published by {self.current.kind}"] += 1
            self.states[self.current.version] = after
        self.check_published()

    # What must be true

    def check_published(self) -> None:
        self.base.seen["checks"] += 1
        manifest = self.current
        found = outcome_of(self.state, self.base.duplicates)
        assert manifest.rows["read"] == found.num_rows
        assert manifest.rows["indexed"] == len(found.winners)
        left_out = Counter(manifest.rows["dropped"]) + Counter(manifest.rows["rejected"])
        bad = sum(left_out.pop(reason, 0) for reason in ("bad_json", "null_text", "empty_text"))
        assert bad == found.left_out.pop("bad", 0)
        assert left_out.total() == found.left_out.total()
        # A text without tokens is found to be one when it is to be encoded: a duplicate, or what is deleted, never is.
        if NO_TOKENS not in {text for placed in self.state.objects for _, text in placed.docs}:
            assert left_out == found.left_out
        index = Index.open(open_store(self.root))
        self.base.exhaustive.check(index, found.winners)
        check_exact_neighbours(index)
        # A run that was killed between its manifest and CURRENT leaves a version that was never published.
        whole = {line["version"] for line in history(self.root)["versions"] if line["state"] == "whole"}
        assert set(self.states) <= whole, f"{sorted(set(self.states) - whole)} can no longer be rolled back to"
        self.steps_since_verify += 1
        if self.steps_since_verify >= VERIFY_EVERY:
            self.steps_since_verify = 0
            assert verify(self.root)["problems"] == []
            queries_Qd = self.base.exhaustive.queries_Qd
            check_against_one_from_scratch(index, list(found.winners), queries_Qd, self.base.folder)

    def teardown(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)


def has_late_tokenless(state: State, objects: Sequence[Placed]) -> bool:
    """Whether a text without tokens is read for the first time: what it stood before is encoded in a further round."""
    return any(text == NO_TOKENS for placed in objects for _, text in placed.docs if placed not in state.objects)


@pytest.fixture
def base_of(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Base]:
    monkeypatch.setattr(gate, "MAX_RECALL_LOSS", 1.0)  # the gate is not the subject: few documents, coarse recall
    return lambda duplicates: Base(tmp_path, tiny_model, duplicates)


def test_random_nights_leave_an_index_that_holds_what_the_plain_rule_says(base_of: Callable[[str], Base]) -> None:
    base = base_of("keep")

    def nights_that_keep_equal_texts() -> Nights:
        return Nights(base)

    run_nights(base, nights_that_keep_equal_texts)


def test_random_nights_that_drop_equal_texts_leave_what_the_plain_rule_says(
    base_of: Callable[[str], Base], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several groups of pieces are scanned, and pieces that are all new go to the encoder as they are.
    monkeypatch.setattr(update_plan, "SCAN_PIECES", 2)
    monkeypatch.setattr(update_plan, "WHOLE_PIECE_DOCUMENTS", 2)
    monkeypatch.setattr(exact_neighbours, "KEPT", 12)  # fewer than there are rows
    base = base_of("drop")

    def nights_that_drop_equal_texts() -> Nights:
        return Nights(base)

    run_nights(base, nights_that_drop_equal_texts)


def run_nights(base: Base, nights: Callable[[], Nights]) -> None:
    """Runs EXAMPLES sequences of STEPS nights each. Which ones follows from the source text of the function `nights`."""
    chosen = settings(
        max_examples=EXAMPLES,
        stateful_step_count=STEPS,
        derandomize=True,
        deadline=None,
        phases=[Phase.generate] + ([Phase.shrink] if "VECTORMILL_STATEFUL_SHRINK" in os.environ else []),
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(cast(type[Nights], nights), settings=chosen)
    assert base.seen["steps"] >= 100  # in each of the two ways
    assert base.seen["killed"] > 0
    for kind in ("update", "compact"):
        assert base.seen[f"published by {kind}"] > 0
    print(dict(base.seen))

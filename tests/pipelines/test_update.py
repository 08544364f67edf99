"""`update`, one claim at a time; sequences of everything are in test_update_stateful.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from operators.errors import ConfigError, FingerprintError, SourceError
from operators.sources.readers import PieceReader
from operators.storage.store import open_store
from pipelines import update as update_module
from pipelines.commands.update_output import show_update, update_facts
from pipelines.compact import compact
from pipelines.rollback import rollback
from pipelines.verify import verify
from tests.operators.encoding.tiny_models import save_family
from tests.pipelines.nightly_site import A, B, C, Site, configured
from tests.pipelines.plain_corpus import NO_TOKENS


def test_without_a_change_nothing_is_written_encoded_or_published(site: Site) -> None:
    before = site.files()
    result = site.update()
    assert (result.published, result.texts_encoded, result.manifest.version) == (False, 0, "v000001")
    assert result.objects == {"unchanged": 3, "changed": 0, "added": 0, "vanished": 0}
    assert result.changes["unchanged"] == 24
    assert site.files() == before


def test_only_new_and_edited_texts_are_encoded_and_every_change_is_counted(site: Site) -> None:
    site.put("a.jsonl", [(A[0][0], "an edited text"), *A[3:], ("a-new", "a new document")])  # 1 edited, 2 gone, 1 new
    (site.docs / "b.parquet").unlink()
    site.put("d.jsonl", [("d-0", "in a new object"), *B[:2]])  # two documents moved here
    result = site.update()
    assert result.published
    assert result.objects == {"unchanged": 1, "changed": 1, "added": 1, "vanished": 1}
    expected = {"added": 2, "edited": 1, "deleted": 8, "revived": 0, "unchanged": 15, "texts_to_encode": 3}
    assert result.changes == expected
    assert result.texts_encoded == 3
    assert result.manifest.changes == {"objects": result.objects, "documents": expected}
    wanted = {A[0][0]: "an edited text", **dict(A[3:]), "a-new": "a new document", "d-0": "in a new object"}
    assert site.live() == {**wanted, **dict(B[:2]), **dict(C)}
    manifest = result.manifest
    assert (manifest.parent, manifest.kind, len(manifest.segments)) == ("v000001", "update", 2)
    assert [(s.num_rows, s.num_deleted) for s in manifest.segments] == [(24, 9), (3, 0)]
    assert verify(site.root)["ok"]


def test_unchanged_objects_are_not_read(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    honest = PieceReader.read

    def counted(self: PieceReader, piece: Any) -> Any:
        read.extend(obj.source for obj in piece.objects)
        return honest(self, piece)

    monkeypatch.setattr(PieceReader, "read", counted)
    site.put("b.parquet", [*B[:7], ("b-7", "another text")])
    site.update()
    assert set(read) == {"b.parquet"}


def test_documents_that_move_or_come_back_cost_nothing(site: Site) -> None:
    site.put("a.jsonl", A[4:])
    site.put("c.csv.gz", [*C, *A[:4]])
    moved = site.update()
    assert not moved.published  # the same documents with the same rows
    site.put("c.csv.gz", C[:4])
    site.put("a.jsonl", A)
    assert site.update().changes["deleted"] == 4
    site.put("d.jsonl", [*C[4:], A[0]])
    again = site.update()
    assert (again.published, again.texts_encoded) == (True, 4)  # the version forgot documents that no object holds
    rollback(site.root, "v000001")
    back = site.update()
    assert (back.texts_encoded, back.changes["unchanged"]) == (0, 24)


def test_a_duplicate_takes_over_when_what_stood_for_it_goes_and_is_read_again(site: Site) -> None:
    site.put("a.jsonl", [*A, (B[0][0], "stands before b")])
    site.update()
    assert site.live()["b-0"] == "stands before b"
    site.put("a.jsonl", A)
    revived = site.update()
    assert (revived.texts_encoded, revived.changes["revived"]) == (0, 1)  # b's own rows are still there
    assert site.live()["b-0"] == B[0][1]
    site.put("0.jsonl", [("n-0", "first of two"), ("n-1", "alone")])
    site.put("e.jsonl", [("n-0", "second of two")])
    site.update()
    site.put("0.jsonl", [("n-1", "alone")])
    taken = site.update()  # e.jsonl did not change, and holds what was never encoded
    assert (taken.texts_encoded, taken.objects["unchanged"]) == (1, 4)
    assert site.live()["n-0"] == "second of two"


def test_appended_documents_replace_those_of_equal_id_and_nothing_else_is_looked_at(site: Site, tmp_path: Path) -> None:
    other = Site(tmp_path / "other", site.model)
    one = other.put("2026-01-01.jsonl", [("a-0", "the first correction"), ("n-0", "new"), ("n-0", "new again")])
    for path in site.docs.iterdir():
        path.unlink()  # what is not listed need not be there
    result = site.update(one, append=True)
    assert result.objects == {"unchanged": 3, "changed": 0, "added": 1, "vanished": 0}
    assert (result.changes["edited"], result.changes["added"], result.texts_encoded) == (1, 1, 2)
    two = other.put("2026-01-02.jsonl", [("a-0", "the second correction")])
    site.update(two, append=True)
    expected = {**dict(A + B + C), "a-0": "the second correction", "n-0": "new"}
    assert site.live() == expected
    assert not site.update(one, append=True).published  # it did not change and keeps its place
    other.put("2026-01-01.jsonl", [("a-0", "the third correction")])
    site.update(one, append=True)
    assert site.live() == {**dict(A + B + C), "a-0": "the third correction"}


def test_an_appended_object_with_the_name_of_another_is_told_apart(site: Site, tmp_path: Path) -> None:
    other = Site(tmp_path / "other", site.model)
    one = other.put("a.jsonl", [("x-0", "an object of the same name"), ("a-1", "replaced")])
    site.update(one, append=True)
    assert site.live() == {**dict(A + B + C), "x-0": "an object of the same name", "a-1": "replaced"}
    assert verify(site.root)["ok"]


def test_a_dry_run_writes_nothing_and_says_what_an_update_then_does(site: Site) -> None:
    site.put("a.jsonl", [(A[0][0], "an edited text"), *A[2:]])
    site.put("e.csv.gz", [("e-0", "new"), ("e-1", "new too")])
    before = site.files()
    said = site.update(dry_run=True, deletes=["c-0"])
    assert site.files() == before
    assert (said.dry_run, said.published, said.texts_encoded) == (True, False, 0)
    assert said.cost is not None
    assert all((said.cost[name] or 0) > 0 for name in ("tokens", "size_bytes"))
    done = site.update(deletes=["c-0"])
    assert (done.objects, done.changes) == (said.objects, said.changes)
    assert done.changes == {
        "added": 2, "edited": 1, "deleted": 2, "revived": 0, "unchanged": 21, "texts_to_encode": 3
    }  # fmt: skip


def test_a_dry_run_with_nothing_changed_says_that_it_would_cost_nothing(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    said = site.update(dry_run=True)
    assert said.cost is not None
    assert (said.cost["tokens"], said.cost["size_bytes"]) == (0, 0)
    show_update(update_facts(said, "root"))
    assert "would encode" in capsys.readouterr().out


def test_settings_that_differ_from_the_version_s_are_refused_by_name(site: Site) -> None:
    site.put("a.jsonl", A[1:])
    with pytest.raises(FingerprintError, match=r"chunk\.overlap_tokens: was 8, now 4"):
        site.update(settings=["chunk.overlap_tokens=4"])
    with pytest.raises(FingerprintError, match=r"clean\.duplicates"):
        site.update(settings=["clean.duplicates=drop"])
    assert site.current.version == "v000001"
    assert open_store(site.root).list_keys("runs") == []


def test_another_model_is_refused(site: Site, tmp_path: Path) -> None:
    other = save_family("roberta", tmp_path / "other")
    site.put("a.jsonl", A[1:])
    with pytest.raises(FingerprintError, match="version v000001 was made with other settings, code or model"):
        site.update(settings=[f"encode.model={other}"])


def test_a_corpus_that_lost_most_of_its_documents_needs_a_higher_bound(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b.parquet", "c.csv.gz"):
        (site.docs / name).unlink()
    monkeypatch.setattr(update_module, "GUARDED_DOCUMENTS", 24)
    with pytest.raises(SourceError, match=r"at most 50% .* got 16 of 24 \(67%\); nothing was published"):
        site.update()
    assert site.current.version == "v000001"
    assert site.update(max_deleted=0.7).changes["deleted"] == 16


def test_a_corpus_without_a_usable_text_is_refused(site: Site) -> None:
    for name in ("b.parquet", "c.csv.gz"):
        (site.docs / name).unlink()
    site.put("a.jsonl", [("a", NO_TOKENS)])
    with pytest.raises(SourceError, match="at least one usable text"):
        site.update(deletes=["a"])
    assert site.live() == dict(A + B + C)


def test_update_needs_a_source_or_ids_to_delete(site: Site) -> None:
    with pytest.raises(ConfigError, match="got no SOURCE"):
        site.update(append=True)
    with pytest.raises(ConfigError, match="retrain must be never or auto"):
        site.update(retrain="always")


def test_an_object_that_cannot_be_read_is_named_and_nothing_is_published(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.stream.READ_BACKOFF_S", 0.0)
    site.put("d.jsonl", [("d", "good")])
    (site.docs / "b.parquet").write_bytes((site.docs / "b.parquet").read_bytes()[:-20])
    with pytest.raises(SourceError, match=r"1 of 2 changed objects could not be read.*b\.parquet"):
        site.update()
    assert site.current.version == "v000001"
    site.put("b.parquet", B[1:])
    assert site.update().changes["deleted"] == 1


def test_texts_without_tokens_leave_their_id_and_text_to_the_next(tiny_model: Path, tmp_path: Path) -> None:
    site = Site(tmp_path, tiny_model)
    site.put("a.jsonl", A)
    site.build("clean.duplicates=drop")
    # z is encoded first, as the first with its text; then x is found to be free, and stands before it.
    site.put("0.jsonl", [("x", NO_TOKENS), ("x", "a text of two"), ("z", "a text of two")])
    result = site.update()
    assert site.live() == {**dict(A), "x": "a text of two"}
    assert result.manifest.rows["dropped"] == {"duplicate_text": 1, "no_tokens": 1}
    assert verify(site.root)["ok"]
    deleted = site.update(append=True, deletes=["x"]).manifest  # a document without tokens is counted once
    assert deleted.rows["dropped"] == {"deleted_by_request": 1, "no_tokens": 1}
    assert site.live() == {**dict(A), "z": "a text of two"}


def test_folders_of_text_files_are_followed(tiny_model: Path, tmp_path: Path) -> None:
    site = Site(tmp_path, tiny_model)
    for number in range(6):
        (site.docs / f"{number}.txt").write_text(f"the text of file {number}")
    site.build()
    (site.docs / "2.txt").write_text("the edited text of file 2")
    (site.docs / "3.txt").unlink()
    (site.docs / "6.txt").write_text("the text of file 6")
    result = site.update()
    assert result.changes["texts_to_encode"] == result.texts_encoded == 2
    numbers = [0, 1, 2, 4, 5, 6]
    expected = sorted(f"the {'edited ' if number == 2 else ''}text of file {number}" for number in numbers)
    assert sorted(site.live().values()) == expected


def test_an_update_follows_a_compaction_and_a_rollback(site: Site) -> None:
    site.put("a.jsonl", A[2:])
    site.put("d.jsonl", [("d-0", "new"), ("d-1", "new too")])
    site.update()
    compacted = compact(site.root, configured).manifest
    assert len(compacted.segments) == 1
    site.put("d.jsonl", [("d-0", "new"), ("d-1", "edited")])
    assert site.update().texts_encoded == 1
    expected = {**dict(A[2:] + B + C), "d-0": "new", "d-1": "edited"}
    assert site.live() == expected
    rollback(site.root, compacted.version)
    again = site.update()
    assert (again.texts_encoded, again.manifest.parent) == (1, compacted.version)
    assert site.live() == expected

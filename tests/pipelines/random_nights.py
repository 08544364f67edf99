"""What can happen in a night: changes of a small corpus on disk, and commands on its index; drawn by hypothesis."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st

from tests.pipelines.plain_corpus import BAD, NO_TOKENS, Doc, Placed, write_object

NAMES = ["a.jsonl", "b.parquet", "c.csv.gz", "d.jsonl", "e.parquet", "f.jsonl"]
IDS = [f"doc-{number}" for number in range(12)]
WORDS = [
    "wing",
    "flow",
    "heat",
    "shock",
    "plate",
    "drag",
    "lift",
    "jet",
    "nozzle",
    "wake",
    "漢字",
    "крыло",
    "tail",
    "rudder",
]
TEXTS = [" ".join(WORDS[(number * step) % len(WORDS)] for step in range(1, 4 + number % 7)) for number in range(24)]
TEXTS += [f"{text} goes on and on " * 9 for text in TEXTS[:3]]  # several chunks each
CHANGES = ["add", "edit", "delete", "move", "write again", "remove object", "replace object"]
CHANGES += ["same id elsewhere", "same text elsewhere"]
COMMANDS = ["update"] * 4 + ["update_and_delete", "append", "append", "delete_only", "compact", "roll_back", "collect"]


@dataclass(frozen=True)
class Change:
    """Something that happens to the corpus; `place` chooses the document, `other` is another object."""

    what: str
    place: int
    other: str
    doc: Doc


@dataclass(frozen=True)
class Night:
    """What happens to the corpus, and then what is run."""

    changes: list[Change]
    command: str
    place: int
    deletes: list[str]
    docs: list[Doc]
    kill: int | None  # at which crash point the command ends


places_st = st.integers(0, 40)
ids_st = st.lists(st.sampled_from(IDS), min_size=1, max_size=2)
texts_st = st.one_of(st.sampled_from(TEXTS), st.sampled_from(TEXTS), st.sampled_from([NO_TOKENS, BAD]))
docs_st = st.tuples(st.sampled_from(IDS), texts_st)
changes_st = st.builds(Change, st.sampled_from(CHANGES), places_st, st.sampled_from(NAMES), docs_st)
nights_st = st.builds(
    Night,
    st.lists(changes_st, max_size=4),
    st.sampled_from(COMMANDS),
    places_st,
    ids_st,
    st.lists(docs_st, min_size=1, max_size=4),
    st.one_of(st.none(), st.integers(1, 12), st.integers(1, 50)),
)


class Disk:
    """A corpus in a folder, and what a listing of it says."""

    def __init__(self, folder: Path, objects: dict[str, list[Doc]]) -> None:
        """All at the stamp 1. Other files of the folder are removed."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            path.unlink()
        self.docs: dict[str, list[Doc]] = {}
        self.stamps: dict[str, int] = {}
        self.stamp = 1
        for name, docs in objects.items():
            self.docs[name], self.stamps[name] = list(docs), 1
            write_object(folder, name, docs, 1)

    def listed(self) -> list[Placed]:
        """The objects in corpus order."""
        return [Placed(name, self.stamps[name], tuple(self.docs[name])) for name in sorted(self.docs)]

    def change(self, change: Change) -> None:
        """Let it happen, where there is what it needs."""
        name = sorted(self.docs)[change.place % len(self.docs)]
        docs = self.docs[name]
        at = (change.place * 7) % max(1, len(docs))
        other = self.docs.get(change.other, [])
        if change.what == "add":
            self.put(change.other, [*other[: at + 1], change.doc, *other[at + 1 :]])
        elif change.what == "replace object":
            self.put(change.other, [change.doc, *docs[:3]])
        elif change.what == "write again":
            self.put(name, docs)
        elif change.what == "remove object" and len(self.docs) > 1:
            del self.docs[name], self.stamps[name]
            (self.folder / name).unlink()
        elif docs and change.what == "edit":
            self.put(name, [*docs[:at], (docs[at][0], change.doc[1]), *docs[at + 1 :]])
        elif docs and change.what in ("delete", "move"):
            self.put(name, docs[:at] + docs[at + 1 :])
            if change.what == "move":
                self.put(change.other, [*self.docs.get(change.other, []), docs[at]])
        elif docs and change.what == "same id elsewhere":
            self.put(change.other, [(docs[at][0], change.doc[1]), *other])
        elif docs and change.what == "same text elsewhere":
            self.put(change.other, [(change.doc[0], docs[at][1]), *other])

    def put(self, name: str, docs: list[Doc]) -> None:
        """Write an object, at a time of its own."""
        self.stamp += 1
        self.docs[name], self.stamps[name] = docs, self.stamp
        write_object(self.folder, name, docs, self.stamp)

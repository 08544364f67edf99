"""The demo's corpus, made from the packages that are installed here, and from a small package with known contents."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from operators.errors import SourceError
from pipelines import demo_corpus
from pipelines.demo_corpus import MAX_CHARS, MIN_CHARS, collect_documents, write_demo_corpus

LONG = "Says something of use. " * 20


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's corpus at its full size."""
    path = tmp_path_factory.mktemp("demo") / "made" / "corpus.parquet"
    assert write_demo_corpus(path) == pq.read_metadata(path).num_rows
    return path


def test_the_corpus_has_unique_ids_and_texts_long_enough_from_several_packages(corpus: Path) -> None:
    table = pq.read_table(corpus)
    assert table.schema.equals(demo_corpus.SCHEMA)
    # 4000 with the pinned packages; the floor leaves room for a Python whose standard library has no sources.
    assert 2000 <= table.num_rows <= 4000
    ids, texts = table.column("id").to_pylist(), table.column("text").to_pylist()
    assert len(set(ids)) == len(set(texts)) == table.num_rows
    assert all(MIN_CHARS <= len(text) <= MAX_CHARS for text in texts)
    assert not any(part.startswith("_") for name in ids for part in name.split("."))
    packages = Counter(name.split(".")[0] for name in ids)
    assert min(packages["numpy"], packages["torch"], packages["ray"]) >= 200
    assert {"numpy.concatenate", "numpy.linalg.norm", "torch.matmul", "ray.data.Dataset", "ray.init"} <= set(ids)


def test_another_process_writes_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    code = "import sys, pathlib; from pipelines.demo_corpus import write_demo_corpus as w; w(pathlib.Path(sys.argv[1]))"
    other_seed = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "again")], env=other_seed, check=True)
    assert (tmp_path / "again").read_bytes() == corpus.read_bytes()


def test_a_smaller_corpus_keeps_several_packages() -> None:
    docs = collect_documents(max_documents=40)
    assert len(docs) == 40
    assert {"numpy", "torch", "ray"} <= {doc.name.split(".")[0] for doc in docs}


@pytest.fixture
def made_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of one private and one public module, alone in the corpus."""
    package = tmp_path / "made_package"
    package.mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(demo_corpus, "SHARES", {"made_package": 10})
    monkeypatch.setattr(demo_corpus, "_stdlib_root", lambda: None)
    (package / "__init__.py").write_text(
        "from ._inner import shown\nfrom .open import *\nraise SystemExit('imported')\n"
    )
    (package / "_inner.py").write_text(
        f'def shown():\n    """Shown. {LONG}"""\n\ndef hidden():\n    """Hidden. {LONG}"""\n\n'
        f'add_newdoc("made_package._inner", "shown", ("part", """Part. {LONG}"""))\n'
    )
    (package / "open.py").write_text(
        f'"""Module. {LONG}"""\nclass Thing:\n    """Thing. {LONG}"""\n    def use(self):\n        """Use. {LONG}"""\n'
        f'    def _private(self):\n        """No. {LONG}"""\ndef short():\n    """Too short."""\n'
        f'def again():\n    """Thing. {LONG}"""\n'
    )
    return package


@pytest.mark.usefixtures("made_package")
def test_names_are_public_ones_and_methods_come_last_and_nothing_is_imported() -> None:
    found = {doc.name: doc.title for doc in collect_documents()}
    assert found == {
        "made_package.shown": "made_package: shown",
        "made_package.open": "made_package.open",
        "made_package.Thing": "made_package: Thing",
        "made_package.shown.part": "made_package: shown.part",
        "made_package.Thing.use": "made_package: Thing.use",
    }
    assert list(found)[-1] == "made_package.Thing.use"
    assert "made_package" not in sys.modules


def test_a_file_that_cannot_be_parsed_is_left_out(made_package: Path) -> None:
    (made_package / "broken.py").write_text(f'"""Broken. {LONG}"""\ndef (\n')
    assert "made_package.broken" not in {doc.name for doc in collect_documents()}


def test_no_docstrings_at_all_is_an_error(made_package: Path, tmp_path: Path) -> None:
    for file in made_package.glob("*.py"):
        file.unlink()
    with pytest.raises(
        SourceError, match=r"needs installed Python packages with docstrings, found none of made_package"
    ):
        write_demo_corpus(tmp_path / "corpus.parquet")
    assert not (tmp_path / "corpus.parquet").exists()

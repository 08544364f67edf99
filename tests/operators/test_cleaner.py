from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators import schemas
from operators.cleaner import CleanConfig, Cleaner, clean_text, plugin_fingerprints
from operators.errors import ConfigError, FingerprintError
from pipelines.config import load_config

PLUGINS = """
import pyarrow.compute as pc

def is_short(rows):
    return pc.less(pc.utf8_length(rows["text"]), 20)

def has_vowel(rows):
    return pc.match_substring_regex(pc.field("text"), "[aeiou]")

odd_row = pc.equal(pc.bit_wise_and(pc.field("row"), 1), 1)

def null_or_true(rows):
    return pc.if_else(pc.equal(rows["doc_id"], "1"), None, True)

def raises(rows):
    return rows["no such column"]

def bad_expression(rows):
    return pc.field("no such column") > 1

def not_boolean(rows):
    return rows["row"]

def python_list(rows):
    return [True] * len(rows)

def too_few(rows):
    return pc.is_valid(rows["text"]).slice(1)

a_number = 7
"""


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Names of functions of PLUGINS, as `clean.keep` takes them; the module can be imported for one test."""
    (tmp_path / "quality_rules.py").write_text(PLUGINS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "quality_rules", raising=False)
    return lambda name: f"quality_rules:{name}"


def rows_of(texts: Sequence[str]) -> pa.Table:
    numbers = range(len(texts))
    columns = [[str(n) for n in numbers], list(texts), ["a.csv"] * len(texts), list(numbers)]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, schemas.ROWS, strict=True)], schema=schemas.ROWS)


def clean(texts: Sequence[str], **config: object) -> tuple[list[str], list[tuple[int, str, str]]]:
    """Texts that are kept, and (row, reason, detail) of the dropped ones."""
    rows = rows_of(texts)
    cleaned, dropped = Cleaner(CleanConfig(**config))(rows)  # type: ignore[arg-type]
    assert (cleaned.schema, dropped.schema) == (schemas.CLEANED, schemas.REJECTS)
    assert sorted(cleaned["row"].to_pylist() + dropped["row"].to_pylist()) == list(range(len(texts)))
    assert dropped["row"].to_pylist() == sorted(dropped["row"].to_pylist())
    assert set(dropped["outcome"].to_pylist()) <= {"dropped"}
    hashes = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in cleaned["text"].to_pylist()]
    assert cleaned["text_hash"].to_pylist() == hashes
    names = ("row", "reason", "detail")
    return cleaned["text"].to_pylist(), [tuple(line[name] for name in names) for line in dropped.to_pylist()]


def test_nothing_is_changed_unless_it_is_asked_for() -> None:
    texts = ["a\u200bb\x07 ﬁ e\u0301", " x ", "x" * 100_000]
    assert clean(texts) == (texts, [])
    rows = rows_of(texts)
    assert Cleaner(CleanConfig())(rows)[0].drop_columns(["text_hash"]).equals(rows)


@pytest.mark.parametrize(
    ("config", "text", "expected"),
    [
        ({"unicode": "NFC"}, "e\u0301 ﬁ", "é ﬁ"),
        ({"unicode": "NFKC"}, "e\u0301 ﬁ １", "é fi 1"),
        ({"unicode": "NFD"}, "é", "e\u0301"),
        ({"unicode": "NFKD"}, "éﬁ", "e\u0301fi"),
        ({"control_characters": "remove"}, "a\x00b\x1b[0m\x7f\x85\x9fc\td\r\ne\u200bf", "ab[0mc\td\r\ne\u200bf"),
        ({"control_characters": "space"}, "one page\x0canother", "one page another"),
        ({"invisible_characters": "remove"}, "\ufeffhy\u00adphen \u202eabc\u202c \x07", "hyphen abc \x07"),
        ({"invisible_characters": "space"}, "ภาษา\u200bไทย", "ภาษา ไทย"),
        ({"invisible_characters": "remove"}, "👩\u200d🔬 می\u200cخواهم", "👩\u200d🔬 می\u200cخواهم"),
        ({"invisible_characters": "remove", "unicode": "NFC"}, "e\u2060\u0301", "é"),
    ],
)
def test_texts_are_normalised_as_the_settings_say(config: dict[str, str], text: str, expected: str) -> None:
    assert clean([text], **config) == ([expected], [])
    assert clean_text(CleanConfig(**config), text) == expected  # type: ignore[arg-type]


# Marks that reorder and compose, Hangul jamo, compatibility forms, everything that is taken away.
awkward = st.text(st.sampled_from("ae\u0301\u0327\u0323ﬁ１ᄀ\u1161\u11a8각Åé\u200b\u200d\u2060\ufeff\x00\x0c\x85\n 語"))


@settings(max_examples=200)
@given(
    text=awkward | st.text(),
    unicode=st.sampled_from(["none", "NFC", "NFD", "NFKC", "NFKD"]),
    control=st.sampled_from(["keep", "remove", "space"]),
    invisible=st.sampled_from(["keep", "remove", "space"]),
)
def test_cleaning_a_clean_text_changes_nothing(text: str, unicode: str, control: str, invisible: str) -> None:
    config = CleanConfig(unicode=unicode, control_characters=control, invisible_characters=invisible)
    once = clean_text(config, text)
    assert clean_text(config, once) == once


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_no_normal_form_brings_back_what_is_taken_away_or_leaves_nothing(form: str) -> None:
    taken_away = CleanConfig(control_characters="remove", invisible_characters="remove")
    every = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000 and chr(code) not in "\r\n"]
    before = clean_text(taken_away, "\n".join(every)).split("\n")
    after = clean_text(CleanConfig(unicode=form), "\n".join(before)).split("\n")
    assert clean_text(taken_away, "\n".join(after)).split("\n") == after
    assert [not text.strip() for text in after] == [not text.strip() for text in before]


def test_what_is_dropped_has_a_reason_with_the_value_and_the_rule() -> None:
    texts = ["\x00\x01", "ab", "abc", "語語語語", "é" * 5, "e\u0301" * 5, "  \x00\n "]
    kept, dropped = clean(texts, control_characters="remove", unicode="NFC", min_chars=3, max_chars=4)
    assert kept == ["abc", "語語語語"]
    assert dropped == [
        (0, "empty_after_cleaning", "2 characters before cleaning, none but white space after it"),
        (1, "too_short", "2 characters, the least is 3 (clean.min_chars)"),
        (4, "too_long", "5 characters, the most is 4 (clean.max_chars)"),
        (5, "too_long", "5 characters, the most is 4 (clean.max_chars)"),
        (6, "empty_after_cleaning", "5 characters before cleaning, none but white space after it"),
    ]


def test_tables_of_any_layout_are_cleaned_alike() -> None:
    texts = ["one", "two\x00", "", "drei", "四"]
    rows = rows_of(texts)
    pieces = pa.concat_tables([rows.slice(0, 1), rows.slice(1, 0), rows.slice(1, 3), rows.slice(4)])
    cleaner = Cleaner(CleanConfig(min_chars=1))
    assert [t.combine_chunks() for t in cleaner(pieces)] == [t.combine_chunks() for t in cleaner(rows)]
    assert cleaner(rows.slice(3))[0]["text_hash"].to_pylist() == cleaner(rows)[0]["text_hash"].to_pylist()[2:]
    assert [t.num_rows for t in cleaner(rows.slice(0, 0))] == [0, 0]
    assert cleaner(schemas.ROWS.empty_table())[0].schema == schemas.CLEANED


def test_plug_ins_drop_the_rows_where_they_are_not_true(plugins: Callable[[str], str]) -> None:
    texts = ["rhythm", "a vowel", "another vowel", "a very long text with vowels", "ﬁ"]
    for name, lost in (("is_short", [3]), ("has_vowel", [0, 4]), ("odd_row", [0, 2, 4]), ("null_or_true", [1])):
        kept, dropped = clean(texts, keep=(plugins(name),))
        assert kept == [text for n, text in enumerate(texts) if n not in lost]
        detail = f"quality_rules:{name} is not true for it (clean.keep)"
        assert dropped == [(n, name, detail) for n in lost]


def test_plug_ins_see_clean_texts_that_all_before_them_kept(plugins: Callable[[str], str]) -> None:
    texts = ["ﬁ", "rhythm", "a very long text with vowels", "xx"]
    keep = (plugins("has_vowel"), plugins("is_short"), plugins("odd_row"))
    kept, dropped = clean([*texts, "a text"], unicode="NFKC", max_chars=100, min_chars=2, keep=keep)
    assert kept == []
    assert [(row, reason) for row, reason, _ in dropped] == [
        (0, "odd_row"),
        (1, "has_vowel"),
        (2, "is_short"),
        (3, "has_vowel"),
        (4, "odd_row"),
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "failed on 2 rows from a.csv: KeyError"),
        ("bad_expression", "failed on 2 rows from a.csv: ArrowInvalid"),
        ("not_boolean", "must give a pyarrow BooleanArray .* got Int64Array of int64"),
        ("python_list", "must give a pyarrow BooleanArray .* got list"),
        ("too_few", "must give one boolean for each of 2 rows, got 1"),
        ("a_number", "must be a function or a pyarrow.compute.Expression .* got 7"),
        ("absent", "must be a function or a pyarrow.compute.Expression .* got None"),
    ],
)
def test_a_plug_in_that_cannot_be_used_is_named(plugins: Callable[[str], str], name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"quality_rules:{name} .*{message}"):
        clean(["one", "two"], keep=(plugins(name),))


def test_a_module_that_cannot_be_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"absent_rules:keep .*ModuleNotFoundError.*PYTHONPATH"):
        Cleaner(CleanConfig(keep=("absent_rules:keep",))).setup()
    (tmp_path / "broken_rules.py").write_text("import pyarrow\n1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"broken_rules:keep .*ZeroDivisionError"):
        plugin_fingerprints(CleanConfig(keep=("broken_rules:keep",)))


def test_a_plug_in_is_known_by_the_source_of_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    config = CleanConfig(keep=("versioned_rules:keep",))
    found = []
    for source in (
        "def keep(rows): return rows['row'].is_valid()\n",
        "def keep(rows): return rows['text'].is_valid()\n",
    ):
        (tmp_path / "versioned_rules.py").write_text(source)
        monkeypatch.delitem(sys.modules, "versioned_rules", raising=False)
        found.append(plugin_fingerprints(config))
    assert found[0].keys() == found[1].keys() == {"clean.keep.versioned_rules:keep"}
    assert found[0] != found[1]
    assert plugin_fingerprints(CleanConfig()) == {}
    Cleaner(config, found[1].items()).setup()
    with pytest.raises(FingerprintError, match="versioned_rules:keep on this worker"):
        Cleaner(config, found[0].items()).setup()


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("clean.unicode=nfc", "clean.unicode must be one of none, NFC, .* got 'nfc'"),
        ("clean.control_characters=drop", "clean.control_characters must be one of keep, remove, space"),
        ("clean.duplicates=first", "clean.duplicates must be one of keep, drop"),
        ("clean.min_chars=-1", "clean.min_chars must be at least 0, got -1"),
        ("clean.keep=rules.keep", "clean.keep must name functions as package.module:function, got 'rules.keep'"),
        ("clean.keep=a:keep,b:keep", "must name functions of different names"),
        ("clean.keep=a:too_short", "must name functions of different names"),
        ("clean.minchars=3", "did you mean clean.min_chars"),
    ],
)
def test_settings_that_cannot_be_are_refused(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.compile(message)):
        load_config(None, [assignment])


def test_bounds_that_cross_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"clean.min_chars must be at most clean.max_chars \(3\), got 4"):
        load_config(None, ["clean.min_chars=4", "clean.max_chars=3"])

"""Chunks: exact slices, the tokens of their own text, every token of the document covered."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators import schemas
from operators.chunker import ChunkConfig, Chunker
from operators.errors import ConfigError
from operators.model import load_spec, load_tokenizer, resolve_model
from tests.data_paths import collection

SENTENCES = "The cat sat on the mat. It was a sunny day! Why not? " * 40
JAPANESE = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。" * 20
ODD = [
    SENTENCES,
    JAPANESE,
    "w" * 3000,
    "don't " * 300,
    "🙂👩‍👩‍👧‍👦 " * 150,
    "unbelievability" * 50,
    "a\nb\n" * 200,
    "한국어 텍스트 " * 80,
]


def rows(texts: Sequence[str]) -> pa.Table:
    count = len(texts)
    columns = [[f"d{n}" for n in range(count)], list(texts), ["file"] * count, list(range(count))]
    return pa.table([pa.array(c, t.type) for c, t in zip(columns, schemas.ROWS, strict=True)], schema=schemas.ROWS)


@functools.cache
def chunker(mode: str = "window", max_tokens: int = 0, overlap: int = 32) -> Chunker:
    config = ChunkConfig(mode=mode, max_tokens=max_tokens, overlap_tokens=overlap)
    return Chunker(config, resolve_model("all-MiniLM-L6-v2"))


@functools.cache
def tokenizer() -> Any:
    return load_tokenizer(load_spec(resolve_model("all-MiniLM-L6-v2")))


def token_spans(text: str) -> list[tuple[int, int]]:
    encoding = tokenizer().encode(text)
    return [span for span, special in zip(encoding.offsets, encoding.special_tokens_mask, strict=True) if not special]


def check(texts: list[str], max_tokens: int, overlap: int) -> pa.Table:
    """Asserts everything that must hold for any texts in window mode; returns the chunks."""
    chunks, rejects = chunker("window", max_tokens, overlap)(rows(texts))
    assert chunks.schema == schemas.CHUNKS
    assert rejects.schema == schemas.REJECTS
    listed = chunks.to_pylist()
    numbers = [(chunk["row"], chunk["chunk_no"]) for chunk in listed]
    assert numbers == sorted(set(numbers))
    for index, text in enumerate(texts):
        own = [chunk for chunk in listed if chunk["row"] == index]
        spans = token_spans(text)
        assert [chunk["chunk_no"] for chunk in own] == list(range(len(own)))
        assert bool(own) == bool(spans) == (index not in rejects["row"].to_pylist())
        for chunk in own:
            assert chunk["text"] == text[chunk["start"] : chunk["end"]]
            assert 0 <= chunk["start"] < chunk["end"] <= len(text)
            ids = tokenizer().encode(chunk["text"]).ids
            if len(ids) > max_tokens:  # only where one character has more tokens than a chunk
                assert len(chunk["text"]) == 1
                ids = [*ids[: max_tokens - 1], ids[-1]]
            assert chunk["input_ids"] == ids
            assert 3 <= len(chunk["input_ids"]) <= max_tokens
        if len(own) == 1 and len(spans) <= max_tokens - 2:
            assert (own[0]["start"], own[0]["end"]) == (0, len(text))
        for start, end in spans:
            assert any(chunk["start"] <= start and end <= chunk["end"] for chunk in own), (start, end)
    return chunks


@given(st.lists(st.text(max_size=200), max_size=4), st.integers(6, 40))
@settings(max_examples=150, deadline=None)
def test_any_text_is_cut_in_exact_slices_that_cover_it(texts: list[str], max_tokens: int) -> None:
    check(texts, max_tokens, overlap=(max_tokens - 2) // 2)


@pytest.mark.parametrize(("max_tokens", "overlap"), [(3, 0), (8, 2), (64, 0), (64, 31), (256, 32)])
def test_odd_texts_are_cut_in_exact_slices_that_cover_them(max_tokens: int, overlap: int) -> None:
    check(ODD, max_tokens, overlap)


def test_real_documents_are_cut_in_exact_slices_that_cover_them() -> None:
    table = pq.read_table(collection("scifact") / "corpus.parquet").slice(0, 300)
    texts = [
        f"{title} {text}" for title, text in zip(table["title"].to_pylist(), table["text"].to_pylist(), strict=True)
    ]
    chunks = check(texts, 256, 32)
    assert len(chunks) > len(texts)


def test_windows_end_at_sentences_and_overlap() -> None:
    for text, ends in ((SENTENCES, ".!?"), (JAPANESE, "。")):
        chunks = chunker("window", 64, 8)(rows([text]))[0].to_pylist()
        assert len(chunks) > 3
        assert all(chunk["text"][-1] in ends for chunk in chunks[:-1])
        for left, right in itertools.pairwise(chunks):
            shared = len(tokenizer().encode(text[right["start"] : left["end"]], add_special_tokens=False).ids)
            assert 4 <= shared <= 8


def test_windows_without_sentences_end_at_words() -> None:
    chunks = chunker("window", 64, 8)(rows(["immeasurably unbelievable " * 100]))[0].to_pylist()
    words = {word for chunk in chunks for word in chunk["text"].split()}
    assert words == {"immeasurably", "unbelievable"}


def test_truncate_mode_keeps_the_tokens_of_the_truncated_text() -> None:
    texts = [SENTENCES, JAPANESE, "short text ", "unbelievability" * 50]
    chunks = chunker("truncate", 64)(rows(texts))[0].to_pylist()
    assert [chunk["chunk_no"] for chunk in chunks] == [0, 0, 0, 0]
    for text, chunk in zip(texts, chunks, strict=True):
        whole = tokenizer().encode(text).ids
        kept = whole if len(whole) <= 64 else [*whole[:63], whole[-1]]
        assert chunk["input_ids"] == kept == tokenizer().encode(chunk["text"]).ids
        assert (chunk["start"], chunk["text"]) == (0, text[: chunk["end"]])
    assert chunks[2]["text"] == "short text "


def test_rows_without_tokens_are_dropped_by_name() -> None:
    chunks, rejects = chunker()(rows(["a", "\u200b", "b", "\u0301 \u200d"]))
    assert chunks["doc_id"].to_pylist() == ["d0", "d2"]
    assert rejects.select(["row", "doc_id", "outcome", "reason"]).to_pylist() == [
        {"row": n, "doc_id": f"d{n}", "outcome": "dropped", "reason": "no_tokens"} for n in (1, 3)
    ]
    assert [part.num_rows for part in chunker()(rows([]))] == [0, 0]


def test_chunks_do_not_depend_on_the_batch_or_the_instance() -> None:
    whole = chunker("window", 64, 8)(rows(ODD))[0]
    config = ChunkConfig(max_tokens=64, overlap_tokens=8, tokenize_chars=1)
    assert Chunker(config, resolve_model("all-MiniLM-L6-v2"))(rows(ODD))[0].equals(whole)
    chunked = pa.concat_tables([rows(ODD).slice(0, 3), rows(ODD).slice(3)])
    assert chunker("window", 64, 8)(chunked)[0].equals(whole)


def test_a_megabyte_is_cut_in_seconds() -> None:
    text = "Words of the longest text, 長い。 " * 31_000
    chunks = chunker()(rows([text, "x" * 1_000_000]))[0]
    assert len(chunks) > 1_000
    assert len(text) - 3 <= chunks["end"][len(chunks) - 2].as_py() <= len(text)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"max_tokens": 2}, r"chunk\.max_tokens must be in 3\.\.512"),
        ({"max_tokens": 513}, r"chunk\.max_tokens must be in 3\.\.512"),
        ({"max_tokens": 34, "overlap_tokens": 17}, r"chunk\.overlap_tokens must be in 0\.\.16"),
        ({"mode": "middle"}, r"chunk\.mode must be window or truncate, got 'middle'"),
        ({"overlap_tokens": -1}, r"chunk\.overlap_tokens must be at least 0"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Chunker(ChunkConfig(**settings_), resolve_model("all-MiniLM-L6-v2")).setup()

"""Chunks: exact slices, the tokens of their own text, every token of the document covered."""

from __future__ import annotations

import itertools
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators import schemas
from operators.chunker import ChunkConfig, Chunker
from operators.errors import ConfigError
from tests.data_paths import collection
from tests.operators.chunk_texts import JAPANESE, MIXED, ODD, SENTENCES, TOKENIZERS, chunker, rows, spec, tokenizer


def token_spans(text: str, kind: str) -> list[tuple[int, int]]:
    encoding = tokenizer(kind).encode(text)
    return [span for span, special in zip(encoding.offsets, encoding.special_tokens_mask, strict=True) if not special]


def check(texts: list[str], max_tokens: int, overlap: int, kind: str = "wordpiece", prompt: str = "") -> pa.Table:
    """Asserts everything that must hold for any texts in window mode; returns the chunks."""
    chunks, rejects, facts = chunker("window", max_tokens, overlap, kind=kind, prompt=prompt)(rows(texts))
    assert chunks.schema == schemas.CHUNKS
    assert rejects.schema == schemas.REJECTS
    listed = chunks.to_pylist()
    numbers = [(chunk["row"], chunk["chunk_no"]) for chunk in listed]
    assert numbers == sorted(set(numbers))
    encode = tokenizer(kind).encode
    num_truncated = 0
    for index, text in enumerate(texts):
        own = [chunk for chunk in listed if chunk["row"] == index]
        spans = token_spans(text, kind)
        assert [chunk["chunk_no"] for chunk in own] == list(range(len(own)))
        assert bool(own) == bool(spans) == (index not in rejects["row"].to_pylist())
        for chunk in own:
            assert chunk["text"] == text[chunk["start"] : chunk["end"]]
            assert 0 <= chunk["start"] < chunk["end"] <= len(text)
            ids = encode(prompt + chunk["text"]).ids
            if len(ids) > max_tokens:  # only where one character has more tokens than a chunk
                assert len(chunk["text"]) == 1
                num_truncated += len(ids) - max_tokens
                ids = [*ids[: max_tokens - 1], ids[-1]]
            assert chunk["input_ids"] == ids
            assert (chunk["pool_start"], chunk["pool_end"]) == (0, len(ids))
            assert len(encode(prompt).ids) < len(chunk["input_ids"]) <= max_tokens
        fits = len(encode(prompt + text).ids) <= max_tokens
        if own and fits:
            assert [(chunk["start"], chunk["end"]) for chunk in own] == [(0, len(text))]
        covered = {place for chunk in own for place in range(chunk["start"], chunk["end"])}
        assert covered.issuperset(place for start, end in spans for place in range(start, end))
    num_over_length = sum(len(encode(prompt + text).ids) > max_tokens for text in texts)
    assert facts == {"num_over_length": num_over_length, "num_truncated_tokens": num_truncated}
    return chunks


@given(st.lists(MIXED | st.text(max_size=200), max_size=4), st.integers(6, 40), st.sampled_from(["", "passage: "]))
@settings(max_examples=60, deadline=None)
def test_any_text_is_cut_in_exact_slices_that_cover_it(texts: list[str], max_tokens: int, prompt: str) -> None:
    num_prompt = len(tokenizer().encode(prompt).ids) - 2
    check(texts, max_tokens + num_prompt, overlap=(max_tokens - 2) // 2, prompt=prompt)


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


@pytest.mark.parametrize("prompt", ["", "passage: "])
def test_truncate_mode_keeps_the_tokens_of_the_truncated_text(prompt: str) -> None:
    texts = [SENTENCES, JAPANESE, "short text ", "unbelievability" * 5]
    chunks, _, facts = chunker("truncate", 64, prompt=prompt)(rows(texts))
    wholes = [tokenizer().encode(prompt + text).ids for text in texts]
    for text, whole, chunk in zip(texts, wholes, chunks.to_pylist(), strict=True):
        kept = whole if len(whole) <= 64 else [*whole[:63], whole[-1]]
        assert chunk["input_ids"] == kept == tokenizer().encode(prompt + chunk["text"]).ids
        assert (chunk["chunk_no"], chunk["start"], chunk["text"]) == (0, 0, text[: chunk["end"]])
    assert chunks["text"][2].as_py() == "short text "
    assert facts == {
        "num_over_length": 2,
        "num_truncated_tokens": sum(len(whole) - 64 for whole in wholes[:2]),
    }


@given(MIXED, st.integers(5, 40), st.sampled_from(TOKENIZERS), st.sampled_from(["", "passage: "]))
@settings(max_examples=60, deadline=None)
def test_truncating_any_text_keeps_an_exact_beginning(text: str, max_tokens: int, kind: str, prompt: str) -> None:
    max_tokens += len(tokenizer(kind).encode(prompt).ids)
    chunks, _, facts = chunker("truncate", max_tokens, kind=kind, prompt=prompt)(rows([text]))
    whole = tokenizer(kind).encode(prompt + text).ids
    left_out = max(0, len(whole) - max_tokens)
    assert facts == {"num_over_length": int(left_out > 0), "num_truncated_tokens": left_out}
    for chunk in chunks.to_pylist():
        assert chunk["input_ids"] == (whole if not left_out else [*whole[: max_tokens - 1], whole[-1]])
        assert (chunk["start"], chunk["text"]) == (0, text[: chunk["end"]])
        assert chunk["end"] == len(text) if not left_out else 1 <= chunk["end"] <= len(text)


@pytest.mark.parametrize("include_prompt", [True, False])
def test_tokens_and_pooled_part_behind_a_prompt_are_those_of_sentence_transformers(include_prompt: bool) -> None:
    from sentence_transformers import SentenceTransformer

    prompt = "Represent this passage: "
    peer: Any = SentenceTransformer(str(spec().path), device="cpu")[0]
    chunks = chunker(mode="truncate", prompt=prompt, include_prompt=include_prompt)(rows(ODD))[0].to_pylist()
    expected = peer.preprocess(ODD, prompt=prompt)
    for chunk, ids, mask in zip(chunks, expected["input_ids"], expected["attention_mask"], strict=True):
        assert chunk["input_ids"] == ids[mask == 1].tolist()
        assert chunk["pool_start"] == (0 if include_prompt else expected["prompt_length"])
        assert chunk["pool_end"] == len(chunk["input_ids"])


def test_rows_without_tokens_are_dropped_by_name() -> None:
    chunks, rejects, _ = chunker()(rows(["a", "\u200b", "b", "\u0301 \u200d"]))
    assert chunks["doc_id"].to_pylist() == ["d0", "d2"]
    assert rejects.select(["row", "doc_id", "outcome", "reason"]).to_pylist() == [
        {"row": n, "doc_id": f"d{n}", "outcome": "dropped", "reason": "no_tokens"} for n in (1, 3)
    ]
    assert [part.num_rows for part in chunker()(rows([]))[:2]] == [0, 0]


def test_chunks_do_not_depend_on_the_batch_or_the_instance() -> None:
    whole = chunker("window", 64, 8)(rows(ODD))[0]
    config = ChunkConfig(max_tokens=64, overlap_tokens=8, tokenize_chars=1)
    assert Chunker(config, spec())(rows(ODD))[0].equals(whole)
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
        ({"mode": "middle"}, r"chunk\.mode must be window, truncate or late, got 'middle'"),
        ({"overlap_tokens": -1}, r"chunk\.overlap_tokens must be at least 0"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Chunker(ChunkConfig(**settings_), spec()).setup()

"""Late chunks: exact slices in order, every token pooled once, from a sequence of the document's own tokens."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators import schemas
from operators.chunker import ChunkConfig, Chunker
from operators.encoding.model_folder import load_spec, resolve_model
from operators.errors import ConfigError
from tests.data_paths import collection
from tests.operators.chunk_texts import JAPANESE, MIXED, ODD, SENTENCES, TOKENIZERS, chunker, rows, spec, tokenizer


def check(text: str, late: Chunker, kind: str = "wordpiece", prompt: str = "") -> list[dict[str, Any]]:
    """Asserts what must hold for the late chunks of any text; returns them, each with its sequence."""
    table, rejects, facts = late(rows([text]))
    assert table.schema == schemas.CHUNKS
    chunks: list[dict[str, Any]] = table.to_pylist()
    whole = tokenizer(kind).encode(prompt + text)
    assert facts["num_over_length"] == int(len(whole.ids) > late.max_sequence)
    assert [chunk["chunk_no"] for chunk in chunks] == list(range(len(chunks)))
    assert len(rejects) == int(not chunks)
    if not chunks:
        assert whole.ids == tokenizer(kind).encode(prompt).ids
        return []
    # The text's own tokens: those of the prompt end at its end or before it.
    own = [n for n, m in enumerate(whole.special_tokens_mask) if not m and whole.offsets[n][1] > len(prompt)]
    begin, behind = own[0], len(whole.ids) - own[-1] - 1
    pooled: list[int] = []
    sequence: list[int] = []
    for chunk in chunks:
        assert chunk["text"] == text[chunk["start"] : chunk["end"]] != ""
        if chunk["input_ids"] is not None:
            sequence = chunk["input_ids"]
            assert len(sequence) <= late.max_sequence
            assert sequence[:begin] == whole.ids[:begin]
            assert sequence[-behind:] == whole.ids[-behind:]
            assert _holds(whole.ids[begin:-behind], sequence[begin:-behind])
        chunk["sequence"] = sequence
        chunk["context"] = (chunk["pool_start"] - begin, len(sequence) - behind - chunk["pool_end"])
        assert 0 <= chunk["pool_start"] < chunk["pool_end"] <= len(sequence)
        pooled += sequence[max(begin, chunk["pool_start"]) : min(len(sequence) - behind, chunk["pool_end"])]
    assert all(left["end"] <= right["start"] for left, right in itertools.pairwise(chunks))
    if not facts["num_truncated_tokens"]:
        assert pooled == whole.ids[begin:-behind]
        covered = {place for chunk in chunks for place in range(chunk["start"], chunk["end"])}
        spans = [whole.offsets[n] for n in range(begin, len(whole.ids) - behind)]
        assert covered.issuperset(p - len(prompt) for s, e in spans for p in range(max(s, len(prompt)), e))
    else:
        assert len(whole.ids) - begin - behind == len(pooled) + facts["num_truncated_tokens"]
    assert chunks[0]["pool_start"] == 0
    assert chunks[-1]["pool_end"] == len(chunks[-1]["sequence"])
    if len(chunks) == 1:
        assert (chunks[0]["start"], chunks[0]["end"]) == (0, len(text))
    return chunks


def _holds(ids: list[int], part: list[int]) -> bool:
    return any(ids[n : n + len(part)] == part for n in range(len(ids) - len(part) + 1))


@given(MIXED, st.integers(1, 30), st.integers(0, 60), st.sampled_from(TOKENIZERS), st.sampled_from(["", "passage: "]))
@settings(max_examples=120, deadline=None)
def test_any_text_is_cut_in_exact_slices_and_every_token_is_pooled_once(
    text: str, max_tokens: int, more: int, kind: str, prompt: str
) -> None:
    num_added = len(tokenizer(kind).encode(prompt).ids)
    context = max_tokens + more
    late = Chunker(
        ChunkConfig("late", max_tokens, overlap_tokens=context // 2, context_tokens=context + num_added),
        spec(kind, prompt),
    )
    check(text, late, kind, prompt)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(("max_tokens", "context", "overlap"), [(1, 3, 0), (20, 62, 15), (128, 256, 32)])
def test_odd_texts_are_cut_in_exact_slices(kind: str, max_tokens: int, context: int, overlap: int) -> None:
    for text in ODD:
        check(text, chunker("late", max_tokens, overlap, context, kind=kind), kind)


def test_spans_hold_the_tokens_of_the_chunks_characters_in_the_encoding_of_the_whole_document() -> None:
    from transformers import AutoTokenizer

    wrapper = AutoTokenizer.from_pretrained(str(spec().path), local_files_only=True)
    late = chunker("late", max_tokens=40, context=512)
    for text in (SENTENCES[:1500], JAPANESE[:300], ODD[7][:200], ODD[10][:250]):
        whole = wrapper(text, return_offsets_mapping=True)
        chunks = check(text, late)
        assert len(chunks) > 2
        assert [chunk["input_ids"] for chunk in chunks] == [whole["input_ids"]] + [None] * (len(chunks) - 1)
        for number, chunk in enumerate(chunks):
            inside = [
                token
                for token, (start, end) in enumerate(whole["offset_mapping"])
                if start < end and chunk["start"] <= start and end <= chunk["end"]
            ]
            inside = [0] * (number == 0) + inside + [len(whole["input_ids"]) - 1] * (number == len(chunks) - 1)
            assert inside == list(range(chunk["pool_start"], chunk["pool_end"]))


@pytest.mark.parametrize(("prompt", "include"), [("", True), ("passage: ", True), ("passage: ", False)])
def test_a_document_of_one_chunk_is_the_same_in_every_mode(prompt: str, include: bool) -> None:
    texts = rows([" A short text. ", "短い。", "\u200b", "a"])
    late, dropped, facts = chunker("late", prompt=prompt, include_prompt=include)(texts)
    assert (len(late), len(dropped)) == (3, 1)
    assert facts == {"num_over_length": 0, "num_truncated_tokens": 0}
    for mode in ("window", "truncate"):
        chunks, others_dropped, others_facts = chunker(mode, prompt=prompt, include_prompt=include)(texts)
        assert late.equals(chunks)
        assert dropped.equals(others_dropped)
        assert facts == others_facts


def test_chunks_end_at_sentences_and_are_not_tiny() -> None:
    for text, ends in ((SENTENCES, ".!?"), (JAPANESE, "。")):
        chunks = check(text, chunker("late", 60, 32, 256))
        assert all(chunk["text"][-1] in ends for chunk in chunks[:-1])
        assert all(20 <= chunk["pool_end"] - chunk["pool_start"] <= 62 for chunk in chunks)


def test_chunks_of_a_long_document_have_context_on_both_sides() -> None:
    table = pq.read_table(collection("scifact") / "corpus.parquet").slice(0, 60)
    for text in table["text"].to_pylist():
        chunks = check(text, chunker("late", 40, 32, 128))
        assert all(left >= 8 for left, _ in (chunk["context"] for chunk in chunks[1:]))
        assert all(right >= 8 for _, right in (chunk["context"] for chunk in chunks[:-1]))
        num_tokens = len(tokenizer().encode(text).ids)
        num_sequences = sum(chunk["input_ids"] is not None for chunk in chunks)
        assert num_sequences <= 1 + num_tokens / (126 * 0.5)  # at most twice the work, on sentences' ends


def test_a_prompt_stands_before_every_sequence_and_is_pooled_by_its_first_chunk_alone() -> None:
    prompt = "Represent this passage: "
    num_prompt = len(tokenizer().encode(prompt).ids) - 1  # with [CLS]
    for include in (True, False):
        chunks = check_prompted(prompt, include)
        assert chunks[0]["pool_start"] == (0 if include else num_prompt)
        assert all(chunk["pool_start"] >= num_prompt for chunk in chunks[1:])
        sequences = [chunk["input_ids"] for chunk in chunks if chunk["input_ids"] is not None]
        assert len(sequences) > 2
        assert all(ids[:num_prompt] == tokenizer().encode(prompt).ids[:-1] for ids in sequences)


def check_prompted(prompt: str, include: bool) -> list[dict[str, Any]]:
    late = chunker("late", 40, 32, 128, prompt=prompt, include_prompt=include)
    chunks: list[dict[str, Any]] = late(rows([SENTENCES]))[0].to_pylist()
    return chunks


def test_late_chunks_do_not_depend_on_the_batch_or_the_instance() -> None:
    texts = [text for text in ODD for _ in range(2)]
    late = chunker("late", 40, 16, 128)
    whole, _, facts = late(rows(texts))
    assert facts["num_over_length"] == 2 * sum(len(tokenizer().encode(text).ids) > 128 for text in ODD)
    config = dataclasses.replace(late.config, tokenize_chars=1)
    assert Chunker(config, spec())(rows(texts))[0].equals(whole)
    assert [part.num_rows for part in late(rows([]))[:2]] == [0, 0]


def test_the_defaults_are_the_models_length_and_128_tokens() -> None:
    chunks = check(SENTENCES, chunker("late"))
    assert max(len(chunk["sequence"]) for chunk in chunks) in range(240, 257)
    assert max(chunk["pool_end"] - chunk["pool_start"] for chunk in chunks) in range(110, 130)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"context_tokens": 513}, r"chunk\.context_tokens must be in 3\.\.512 for .*, got 513"),
        ({"context_tokens": 2}, r"chunk\.context_tokens must be in 3\.\.512 for .*, got 2"),
        ({"max_tokens": 255}, r"chunk\.max_tokens must be in 1\.\.254 \(chunk\.context_tokens 256 less 2 .*, got 255"),
        ({"overlap_tokens": 128}, r"chunk\.overlap_tokens must be in 0\.\.127"),
        ({"mode": "window", "context_tokens": 300}, r"chunk\.context_tokens is for chunk\.mode late, got 300"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Chunker(ChunkConfig(**{"mode": "late", **settings_}), spec()).setup()


@pytest.mark.parametrize("pooling", ["cls", "last"])
def test_poolings_of_one_token_are_refused(pooling: str) -> None:
    model = dataclasses.replace(load_spec(resolve_model("all-MiniLM-L6-v2")), poolings=("mean", pooling))
    with pytest.raises(ConfigError, match=rf"pools all tokens .*, got '{pooling}' .*set chunk\.mode to window"):
        Chunker(ChunkConfig(mode="late"), model).setup()

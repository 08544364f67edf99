"""Rows in, chunks with their tokens out. Boundaries are found on tokens, so both come from one operator."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from operators import schemas
from operators.errors import ConfigError
from operators.model import load_spec, load_tokenizer
from operators.settings import operational, semantic

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

Span = tuple[int, int]  # character offsets [start, end)
Chunk = tuple[int, int, npt.NDArray[np.int32]]  # start, end, input_ids with special tokens

_SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s)|[。！？]+[」』”’）]*|\n+")


@dataclasses.dataclass(frozen=True)
class ChunkConfig:
    """Section `chunk` of the configuration."""

    mode: str = semantic("window", "window: long documents are cut in windows; truncate: one chunk a document")
    max_tokens: int = semantic(0, "tokens of a chunk, special ones included; 0: the model's max_seq_length")
    overlap_tokens: int = semantic(32, "tokens that neighbouring windows share, about")
    tokenize_chars: int = operational(1 << 20, "characters that go to the tokenizer at once")

    def __post_init__(self) -> None:
        if self.mode not in ("window", "truncate"):
            raise ConfigError(f"chunk.mode must be window or truncate, got {self.mode!r}")
        for name, least in (("max_tokens", 0), ("overlap_tokens", 0), ("tokenize_chars", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"chunk.{name} must be at least {least}, got {getattr(self, name)}")


class Chunker:
    """Operator from a table of ROWS to a table of CHUNKS and one of REJECTS (rows without a token).

    Pure and deterministic: what becomes of a document depends on its text, the settings and the model alone.
    """

    def __init__(self, config: ChunkConfig, model_path: str | Path, pooling: str = "") -> None:
        self.config = config
        self.model_path = model_path
        self.pooling = pooling  # only passed on: a plain transformers folder does not load without it
        self._tokenizer: Tokenizer | None = None

    def setup(self) -> None:
        """Loads the tokenizer. Turns off its threads in this process: a worker owns one CPU."""
        if self._tokenizer is not None:
            return
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        spec = load_spec(self.model_path, self.pooling)
        tokenizer = load_tokenizer(spec)
        self.max_tokens = self.config.max_tokens or spec.max_seq_length
        self._num_special = tokenizer.num_special_tokens_to_add(False)
        self._budget = self.max_tokens - self._num_special  # tokens of the text itself
        if not 1 <= self._budget <= spec.max_positions - self._num_special:
            raise ConfigError(
                f"chunk.max_tokens must be in {self._num_special + 1}..{spec.max_positions} for {spec.name}, "
                f"got {self.config.max_tokens}"
            )
        if self.config.mode == "truncate":
            tokenizer.enable_truncation(self.max_tokens)
        elif self.config.overlap_tokens > self._budget // 2:
            raise ConfigError(
                f"chunk.overlap_tokens must be in 0..{self._budget // 2} (half of the {self._budget} tokens of text in "
                f"a chunk), got {self.config.overlap_tokens}"
            )
        self._tokenizer = tokenizer

    def __call__(self, rows: pa.Table) -> tuple[pa.Table, pa.Table]:
        """Chunks in the order of `rows`, chunk_no from 0, and the rows dropped with reason `no_tokens`.

        input_ids hold the special tokens and are what tokenizing the chunk's text gives, truncated to max_tokens.
        A document that fits is one chunk over its whole text; each token of a longer one lies in one of its chunks
        (mode window), or one chunk ends at its last kept token (mode truncate).
        """
        self.setup()
        texts: list[str] = rows.column("text").to_pylist()
        chunks_of = [chunks for batch in _batches(texts, self.config.tokenize_chars) for chunks in self._chunks(batch)]
        counts = np.array([len(chunks) for chunks in chunks_of], dtype=np.int64)
        return _chunk_table(rows, texts, chunks_of, counts), _no_token_rows(rows.filter(pa.array(counts == 0)))

    def _chunks(self, texts: list[str]) -> list[list[Chunk]]:
        """Chunks of each text; an empty list for a text without tokens."""
        assert self._tokenizer is not None
        result: list[list[Chunk]] = []
        long: dict[int, list[Span]] = {}
        # encode_batch_fast leaves out the offsets: only documents that do not fit need them, and are tokenized again.
        for index, encoding in enumerate(self._tokenizer.encode_batch_fast(texts)):
            text, ids = texts[index], encoding.ids
            end = len(text)
            if self.config.mode == "truncate" and encoding.overflowing:
                with_offsets = self._tokenizer.encode(text)
                end = with_offsets.offsets[_content_of(with_offsets)[-1]][1]
            if len(ids) > self.max_tokens:
                long[index] = self._windows(text, self._tokenizer.encode(text))
                ids = []
            result.append([(0, end, np.array(ids, dtype=np.int32))] if len(ids) > self._num_special else [])
        if long:
            spans = [(index, span) for index, spans in long.items() for span in spans]
            for (index, _), chunks in zip(spans, self._fit([(texts[i], span) for i, span in spans]), strict=True):
                result[index] += chunks
        return result

    def _windows(self, text: str, encoding: Encoding) -> list[Span]:
        """Spans of a long text that hold at most `budget` of its tokens each and together all of them."""
        content = _content_of(encoding)
        offsets = np.array(encoding.offsets, dtype=np.int64)[content]
        starts, ends = offsets[:, 0], np.maximum.accumulate(offsets[:, 1])
        sentence_ends = np.array([match.end() for match in _SENTENCE_END.finditer(text)], dtype=np.int64)
        tokens_before = np.searchsorted(np.maximum.accumulate(starts), sentence_ends)
        num_tokens, budget, overlap = len(content), self._budget, self.config.overlap_tokens
        spans: list[Span] = []
        first = 0
        while True:
            stop = min(first + budget, num_tokens)
            if stop < num_tokens:
                stop = _snap(text, starts, ends, tokens_before, first + 2 * budget // 3, stop)
            span = (int(starts[first]), int(ends[stop - 1]))
            if not spans or span != spans[-1]:  # a character may have more tokens than a chunk
                spans.append(span)
            if stop == num_tokens:
                return spans
            first = next(
                (token for token in range(stop - overlap, stop) if _begins_word(text, starts, ends, token)),
                stop - overlap,
            )

    def _fit(self, windows: list[tuple[str, Span]]) -> list[list[Chunk]]:
        """Chunks of each window. One that has more tokens by itself than in its document's context is cut further."""
        assert self._tokenizer is not None
        chunks: list[list[Chunk]] = []
        for batch in _batches([text[start:end] for text, (start, end) in windows], self.config.tokenize_chars):
            for encoding in self._tokenizer.encode_batch(batch):
                text, (start, end) = windows[len(chunks)]
                ids = np.array(encoding.ids, dtype=np.int32)
                if len(ids) <= self.max_tokens:
                    chunks.append([(start, end, ids)] if len(ids) > self._num_special else [])
                    continue
                offsets = [encoding.offsets[token] for token in _content_of(encoding)]
                cuts = [
                    token
                    for token in range(1, len(offsets))
                    if 0 < offsets[token - 1][1] <= offsets[token][0] < end - start
                ]
                if cuts:
                    cut = max((token for token in cuts if token <= self._budget), default=cuts[0])
                    halves = [(text, (start, start + offsets[cut - 1][1])), (text, (start + offsets[cut][0], end))]
                    chunks.append([chunk for part in self._fit(halves) for chunk in part])
                else:  # one character with more tokens than a chunk can hold
                    chunks.append([(start, end, self._truncated(text[start:end]))])
        return chunks

    def _truncated(self, text: str) -> npt.NDArray[np.int32]:
        assert self._tokenizer is not None
        self._tokenizer.enable_truncation(self.max_tokens)
        ids = self._tokenizer.encode(text).ids
        self._tokenizer.no_truncation()
        return np.array(ids, dtype=np.int32)


def _content_of(encoding: Encoding) -> npt.NDArray[np.int64]:
    """Indices of the tokens that are not added around the text."""
    return np.flatnonzero(np.array(encoding.special_tokens_mask) == 0)


def _snap(
    text: str,
    starts: npt.NDArray[np.int64],
    ends: npt.NDArray[np.int64],
    sentence_cuts: npt.NDArray[np.int64],
    low: int,
    high: int,
) -> int:
    """Where to end a window, in low+1..high: after the last sentence, else before the last word, else at a token."""
    at = int(np.searchsorted(sentence_cuts, high, side="right")) - 1
    if at >= 0 and sentence_cuts[at] > low:
        return int(sentence_cuts[at])
    tokens = range(high, low, -1)
    words = (token for token in tokens if _begins_word(text, starts, ends, token))
    whole = (token for token in tokens if starts[token] >= ends[token - 1])  # not inside a character (Korean: jamo)
    return next(itertools.chain(words, whole), high)


def _begins_word(text: str, starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64], token: int) -> bool:
    """Whether a gap or white space stands before the token, or the token itself begins with white space."""
    start = int(starts[token])
    return token == 0 or start > ends[token - 1] or (start < len(text) and text[start].isspace())


def _batches(texts: list[str], max_chars: int) -> Iterator[list[str]]:
    """Runs of texts of about `max_chars` characters: the tokenizer needs some 100 bytes a token while it works."""
    begin, chars = 0, 0
    for index, text in enumerate(texts):
        chars += len(text)
        if chars >= max_chars:
            yield texts[begin : index + 1]
            begin, chars = index + 1, 0
    if begin < len(texts):
        yield texts[begin:]


def _chunk_table(
    rows: pa.Table, texts: list[str], chunks_of: list[list[Chunk]], counts: npt.NDArray[np.int64]
) -> pa.Table:
    flat = [chunk for chunks in chunks_of for chunk in chunks]
    of_row = np.repeat(np.arange(len(counts)), counts)
    starts = np.fromiter((start for start, _, _ in flat), dtype=np.int32, count=len(flat))
    ends = np.fromiter((end for _, end, _ in flat), dtype=np.int32, count=len(flat))
    slices = [texts[row][start:end] for row, (start, end, _) in zip(of_row.tolist(), flat, strict=True)]
    offsets = np.zeros(len(flat) + 1, dtype=np.int32)
    np.cumsum([len(ids) for _, _, ids in flat], out=offsets[1:])
    values = np.concatenate([ids for _, _, ids in flat]) if flat else np.empty(0, dtype=np.int32)
    taken = rows.select(["doc_id", "source", "row"]).take(pa.array(of_row))
    columns = {
        "doc_id": taken.column("doc_id"),
        "chunk_no": pa.array(np.arange(len(flat)) - np.repeat(np.cumsum(counts) - counts, counts), pa.int32()),
        "start": pa.array(starts),
        "end": pa.array(ends),
        "text": pa.array(slices, pa.large_string()),
        "source": taken.column("source"),
        "row": taken.column("row"),
        "input_ids": pa.ListArray.from_arrays(pa.array(offsets), pa.array(values)),
    }
    return pa.table([columns[name] for name in schemas.CHUNKS.names], schema=schemas.CHUNKS)


def _no_token_rows(rows: pa.Table) -> pa.Table:
    details = [f"{len(text)} characters, none of them a token" for text in rows.column("text").to_pylist()]
    columns = {
        "source": rows.column("source"),
        "row": rows.column("row"),
        "doc_id": rows.column("doc_id"),
        "outcome": pa.array(["dropped"] * len(rows), pa.string()),
        "reason": pa.array(["no_tokens"] * len(rows), pa.string()),
        "detail": pa.array(details, pa.string()),
    }
    return pa.table([columns[name] for name in schemas.REJECTS.names], schema=schemas.REJECTS)

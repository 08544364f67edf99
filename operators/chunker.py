"""Rows in, chunks with their tokens out. Boundaries are found on tokens, so both come from one operator."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from operators import schemas
from operators.chunking.late import DEFAULT_CHUNK_TOKENS, SINGLE_TOKEN_POOLINGS, late_chunks
from operators.chunking.tokens import Chunk, DocumentTokenizer, Ids
from operators.chunking.windows import truncated_chunk, window_chunks
from operators.encoding.model_folder import ModelSpec
from operators.errors import ConfigError
from operators.settings import operational, semantic

MODES = ("window", "truncate", "late")


@dataclasses.dataclass(frozen=True)
class ChunkConfig:
    """Section `chunk` of the configuration."""

    mode: str = semantic(
        "window",
        "window: long documents are cut in windows; truncate: one chunk a document; late: each chunk's vector pools its "
        "own tokens of the whole document's encoding",
    )
    max_tokens: int = semantic(
        0,
        "tokens of a chunk, special ones included; 0: the model's max_seq_length. In mode late: tokens of the chunk's "
        f"text alone; 0: {DEFAULT_CHUNK_TOKENS}, or as many as fit",
    )
    overlap_tokens: int = semantic(32, "tokens that neighbouring windows (mode late: sequences) share, about")
    context_tokens: int = semantic(0, "mode late: tokens that are encoded together; 0: the model's max_seq_length")
    tokenize_chars: int = operational(1 << 20, "characters that go to the tokenizer at once")

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"chunk.mode must be window, truncate or late, got {self.mode!r}")
        for name, least in (("max_tokens", 0), ("overlap_tokens", 0), ("context_tokens", 0), ("tokenize_chars", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"chunk.{name} must be at least {least}, got {getattr(self, name)}")
        if self.context_tokens and self.mode != "late":
            raise ConfigError(
                f"chunk.context_tokens is for chunk.mode late, got {self.context_tokens} with mode {self.mode!r}: "
                "leave it out, or set chunk.max_tokens"
            )


class Chunker:
    """Operator from a table of CLEANED rows to a table of CHUNKS, one of REJECTS (rows without a token), and facts.

    spec: from `configured_model`; its document prompt stands before every text that is tokenized. Pure and
    deterministic: what becomes of a document depends on its text, the settings and the model alone.
    """

    def __init__(self, config: ChunkConfig, spec: ModelSpec) -> None:
        self.config = config
        self.spec = spec
        self._tokenizer: DocumentTokenizer | None = None

    def setup(self) -> None:
        """Loads the tokenizer and checks the settings against the model (ConfigError).

        Turns off the tokenizer's threads in this process: a worker owns one CPU.
        """
        if self._tokenizer is not None:
            return
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        if self.config.mode == "late":
            _check_late_pooling(self.spec)
        tokenizer = DocumentTokenizer(self.spec)
        late = self.config.mode == "late"
        name = "chunk.context_tokens" if late else "chunk.max_tokens"
        asked = self.config.context_tokens if late else self.config.max_tokens
        # The longest sequence there is, and what of it the text may have.
        self.max_sequence = asked or self.spec.max_seq_length
        budget = self.max_sequence - tokenizer.num_added
        if budget < 1 or self.max_sequence > self.spec.max_positions:
            raise ConfigError(
                f"{name} must be in {tokenizer.num_added + 1}..{self.spec.max_positions} for {self.spec.name}"
                f"{' with its document prompt' if tokenizer.prompt else ''}, got {self.max_sequence}"
            )
        self.max_tokens = self.config.max_tokens or min(DEFAULT_CHUNK_TOKENS, budget) if late else self.max_sequence
        if late and self.max_tokens > budget:
            raise ConfigError(
                f"chunk.max_tokens must be in 1..{budget} (chunk.context_tokens {self.max_sequence} less "
                f"{tokenizer.num_added} of the prompt and special ones) in mode late, got {self.max_tokens}"
            )
        if self.config.mode != "truncate" and self.config.overlap_tokens > budget // 2:
            raise ConfigError(
                f"chunk.overlap_tokens must be in 0..{budget // 2} (half of the {budget} tokens of text in a "
                f"{'sequence' if late else 'chunk'}), got {self.config.overlap_tokens}"
            )
        self._tokenizer = tokenizer

    def __call__(self, rows: pa.Table) -> tuple[pa.Table, pa.Table, dict[str, int]]:
        """Chunks in the order of `rows`, chunk_no from 0; the rows dropped with reason `no_tokens`; the facts.

        input_ids hold the tokens of prompt and text with the special ones; [pool_start, pool_end) are those that the
        vector pools: all, but not the prompt's where the model's settings say so.
        A document that fits is one chunk over its whole text. Of a longer one
        - mode window: each token's characters lie in its chunks, and input_ids are what tokenizing the chunk's text gives;
        - mode truncate: one chunk ends at its last kept token;
        - mode late: see `late_chunks`; input_ids are null where a chunk shares the sequence of the row before.
        Facts: num_over_length, documents longer than a sequence; num_truncated_tokens, their tokens in no chunk.
        """
        self.setup()
        texts: list[str] = rows.column("text").to_pylist()
        chunk = self._late if self.config.mode == "late" else self._apart
        facts = {"num_over_length": 0, "num_truncated_tokens": 0}
        flat: list[Chunk] = []  # one list: lists of a chunk each are so many that the garbage collector is felt
        num_chunks: list[int] = []
        for batch in _batches(texts, self.config.tokenize_chars):
            for chunks in chunk(batch, facts):
                flat += chunks
                num_chunks.append(len(chunks))
        counts = np.array(num_chunks, dtype=np.int64)
        dropped = _no_token_rows(rows.filter(pa.array(counts == 0)))
        return _chunk_table(rows, texts, flat, counts), dropped, facts

    def _apart(self, texts: list[str], facts: dict[str, int]) -> Iterator[list[Chunk]]:
        """Chunks of each text that are sequences of their own; an empty list for a text without tokens."""
        assert self._tokenizer is not None
        whole, max_tokens = self._tokenizer.whole, self.max_tokens  # most texts are short: this loop is felt
        for text, encoding in zip(texts, self._tokenizer.encode(texts), strict=True):
            if len(encoding) <= max_tokens:
                yield whole(text, encoding)
                continue
            facts["num_over_length"] += 1
            if self.config.mode == "truncate":
                chunk, num_left_out = truncated_chunk(self._tokenizer, text, self.max_tokens)
                chunks = [chunk]
            else:
                chunks, num_left_out = window_chunks(self._tokenizer, text, self.max_tokens, self.config.overlap_tokens)
            facts["num_truncated_tokens"] += num_left_out
            yield chunks

    def _late(self, texts: list[str], facts: dict[str, int]) -> Iterator[list[Chunk]]:
        """Chunks of each text that share its sequences; an empty list for a text without tokens."""
        assert self._tokenizer is not None
        for text, encoding in zip(texts, self._tokenizer.encode(texts, offsets=True), strict=True):
            if len(encoding) - self._tokenizer.num_added <= self.max_tokens:
                yield self._tokenizer.whole(text, encoding)
                continue
            facts["num_over_length"] += len(encoding) > self.max_sequence
            tokens = self._tokenizer.placed(encoding)
            chunks, num_left_out = late_chunks(
                self._tokenizer, text, tokens, self.max_tokens, self.max_sequence, self.config.overlap_tokens
            )
            facts["num_truncated_tokens"] += num_left_out
            yield chunks


def _check_late_pooling(spec: ModelSpec) -> None:
    refused = [pooling for pooling in spec.poolings if pooling in SINGLE_TOKEN_POOLINGS]
    if refused:
        raise ConfigError(
            f"chunk.mode late needs a model that pools all tokens (mean, max, ...), got {refused[0]!r} ({spec.name}): a "
            "chunk within a document has no first or last token of its own; set chunk.mode to window"
        )


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


def _chunk_table(rows: pa.Table, texts: list[str], flat: list[Chunk], counts: npt.NDArray[np.int64]) -> pa.Table:
    of_row = np.repeat(np.arange(len(counts)), counts)
    slices = [texts[row][chunk.start : chunk.end] for row, chunk in zip(of_row.tolist(), flat, strict=True)]
    taken = rows.select(["doc_id", "source", "row", "text_hash"])
    if len(flat) != len(rows) or not np.all(counts == 1):
        taken = taken.take(pa.array(of_row))
    columns = {
        **{name: taken.column(name) for name in taken.column_names},
        "chunk_no": pa.array(np.arange(len(flat)) - np.repeat(np.cumsum(counts) - counts, counts), pa.int32()),
        "start": pa.array([chunk.start for chunk in flat], pa.int32()),
        "end": pa.array([chunk.end for chunk in flat], pa.int32()),
        "text": pa.array(slices, pa.large_string()),
        "input_ids": _id_lists([chunk.ids for chunk in flat]),
        "pool_start": pa.array([chunk.pool_start for chunk in flat], pa.int32()),
        "pool_end": pa.array([chunk.pool_end for chunk in flat], pa.int32()),
    }
    return pa.table([columns[name] for name in schemas.CHUNKS.names], schema=schemas.CHUNKS)


def _id_lists(sequences: list[Ids | None]) -> pa.ListArray:
    offsets = np.zeros(len(sequences) + 1, dtype=np.int32)
    np.cumsum([0 if ids is None else len(ids) for ids in sequences], out=offsets[1:])
    values = np.concatenate([np.empty(0, dtype=np.int32), *(ids for ids in sequences if ids is not None)])
    shared = pa.array([ids is None for ids in sequences], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), mask=shared)


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

"""Real texts for benchmarks: passages of the docstrings that every machine has, cut to a varied number of tokens."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from operators.encoding.model_folder import load_spec, resolve_model
from operators.encoding.tokenizer import load_tokenizer
from operators.errors import SourceError
from pipelines.demo_corpus import collect_documents

MIN_TOKENS = 10
MAX_TOKENS = 60
SEED = 20_000
ALL_DOCUMENTS = 1_000_000
SCHEMA = pa.schema([("id", pa.string()), ("text", pa.string())])


def short_texts(count: int, model: str) -> list[str]:
    """`count` distinct texts of about 10 to 60 tokens of `model` (special ones included): see `texts_of_lengths`."""
    return texts_of_lengths(count, model, MIN_TOKENS, MAX_TOKENS)


def texts_of_lengths(
    count: int, model: str, min_tokens: int, max_tokens: int, documents: Sequence[str] | None = None
) -> list[str]:
    """`count` distinct texts of about so many tokens of `model` (special ones included), in random order.

    They are passages of the documents, or of the docstrings; they begin and end at words, so some are a few tokens longer
    or shorter. Deterministic for the same documents or installed packages. SourceError when these do not have so many.
    """
    found: dict[str, None] = {}
    rng = np.random.default_rng(SEED)
    tokenizer = load_tokenizer(load_spec(resolve_model(model)))
    num_special = tokenizer.num_special_tokens_to_add(False)
    kind = "docstrings of the installed packages" if documents is None else "documents"
    documents = _documents() if documents is None else documents
    for begin in range(0, len(documents), 512):
        batch = documents[begin : begin + 512]
        for text, encoding in zip(batch, tokenizer.encode_batch(batch, add_special_tokens=False), strict=True):
            limits = min_tokens - num_special, max_tokens - num_special
            found.update(dict.fromkeys(_passages(text, encoding.offsets, *limits, rng)))
    if len(found) < count:
        raise SourceError(
            f"the {kind} give {len(found)} distinct texts of {min_tokens} to {max_tokens}"
            f" tokens, {count} were asked for; ask for fewer (--documents, --texts-per-round)"
        )
    texts = list(found)
    return [texts[number] for number in rng.permutation(len(texts))[:count].tolist()]


@functools.lru_cache(maxsize=1)
def _documents() -> list[str]:
    """All docstrings that there are; finding them takes seconds."""
    return [document.text for document in collect_documents(ALL_DOCUMENTS)]


def _passages(
    text: str, offsets: Sequence[tuple[int, int]], min_tokens: int, max_tokens: int, rng: np.random.Generator
) -> Iterator[str]:
    """Consecutive passages of the text that begin and end at words."""
    word_starts = [token for token in range(1, len(offsets)) if offsets[token - 1][1] < offsets[token][0]]
    ends = np.array([*word_starts, len(offsets)])
    first = 0
    while first < len(offsets):
        wanted = int(rng.integers(min_tokens, max_tokens + 1))
        stop = int(ends[max(0, int(np.searchsorted(ends, first + wanted, side="right")) - 1)])
        if stop <= first:  # a word of more tokens than that
            stop = int(ends[int(np.searchsorted(ends, first, side="right"))])
        elif stop - first >= min_tokens:
            yield text[offsets[first][0] : offsets[stop - 1][1]]
        first = stop


def write_corpus(path: Path, texts: Sequence[str], num_documents: int, row_group_rows: int) -> None:
    """Parquet with `num_documents` rows of distinct ids (d0000000 ...) at `path`; the texts in turn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        for begin in range(0, num_documents, row_group_rows):
            numbers = range(begin, min(begin + row_group_rows, num_documents))
            rows = [[f"d{number:07d}" for number in numbers], [texts[number % len(texts)] for number in numbers]]
            writer.write_table(pa.table(rows, schema=SCHEMA))

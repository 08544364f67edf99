"""What the encoder costs here: tasks on the session, as many at once as a build has encoders.

Texts are passages of so many words of a real text; the tokens that they have are counted.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from cluster.capacity.stages import LENGTHS
from cluster.process_memory import mapped_bytes, private_bytes
from operators import schemas
from operators.chunker import ChunkConfig, Chunker
from operators.cleaner import CleanConfig, Cleaner
from operators.encoder import Encoder, pooled_spans
from operators.encoding.encode_config import EncodeConfig, configured_model, resolve_device
from operators.encoding.parity import plain_vectors
from operators.encoding.text_encoder import Spans
from pipelines.planning.plan_inputs import model_weights

CPU_TOKENS, GPU_TOKENS = 24_000, 2_000_000  # encoded at each length
PLAIN_SEQUENCES = 4


def passages(words: Sequence[str], num_words: int, count: int) -> list[str]:
    """`count` stretches of so many words from seeded places."""
    draw = random.Random(num_words)
    places = [draw.randrange(max(1, len(words) - num_words)) for _ in range(count)]
    return [" ".join(words[place : place + num_words]) for place in places]


def measure_encoder(encode: EncodeConfig, words: Sequence[str]) -> dict[str, float]:
    """Task: seconds by coefficient of one encoder."""
    found: dict[str, float] = {}
    spec = configured_model(encode)
    encoder, chunker, cleaner = (
        Encoder(encode, spec),
        Chunker(ChunkConfig(mode="truncate"), spec),
        Cleaner(CleanConfig()),
    )
    chunker.setup()
    encoder.setup()
    on_cpu = resolve_device(encode) == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter  # on a CPU what else the machine does hardly counts
    budget = CPU_TOKENS if on_cpu else GPU_TOKENS
    chunking: list[tuple[float, float, float]] = []  # rows, tokens, seconds
    encoding: list[tuple[float, float]] = []  # tokens of a text, seconds a token
    for length in sorted({min(length, spec.max_seq_length) for length in LENGTHS}):
        texts = passages(words, max(1, round(length / tokens_per_word(chunker, words))), max(1, budget // length))
        cleaned, _ = cleaner(rows_of(texts))
        began = time.process_time()
        chunks, *_ = chunker(cleaned)
        chunk_s = time.process_time() - began
        tokens = len(pooled_spans(chunks)[0][0])
        chunking.append((chunks.num_rows, tokens, chunk_s))
        encoder(chunks.slice(0, max(1, chunks.num_rows // 4)))  # the first pass of new shapes compiles
        began = clock()
        encoder(chunks)
        encoding.append((tokens / chunks.num_rows, (clock() - began) / tokens))
    found["encoder_bytes"], found["libraries_bytes"] = float(private_bytes()), float(mapped_bytes())
    found["encoder_weights"] = model_weights(spec)
    lengths, seconds = zip(*sorted(encoding), strict=True)
    for length in LENGTHS:
        found[f"encode_s_per_token_{length}"] = float(np.interp(length, lengths, seconds))
    found["bytes_per_token"] = sum(len(word) + 1 for word in words) / len(words) / tokens_per_word(chunker, words)
    found["chunk_s_per_row"], found["chunk_s_per_token"] = two_costs(chunking)
    found["plain_s_per_token"] = plain_s_per_token(encode, words, chunker)
    return found


def tokens_per_word(chunker: Chunker, words: Sequence[str]) -> float:
    """Mean over the text, special tokens apart."""
    sample = passages(words, 40, 50)
    cleaned, _ = Cleaner(CleanConfig())(rows_of(sample))
    chunks, *_ = chunker(cleaned)
    return (len(pooled_spans(chunks)[0][0]) / chunks.num_rows - 2) / 40


def rows_of(texts: Sequence[str]) -> pa.Table:
    """schemas.ROWS of the texts."""
    numbers = range(len(texts))
    columns = [
        pa.array([f"d{number:015d}" for number in numbers]),
        pa.array(list(texts), pa.large_string()),
        pa.array(["corpus.parquet"] * len(texts)),
        pa.array(list(numbers), pa.int64()),
    ]
    return pa.table(columns, schema=schemas.ROWS)


def two_costs(points: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Seconds of a row and of a token from the two corpora of the shortest and of the longest texts."""
    (rows_a, tokens_a, a), (rows_b, tokens_b, b) = points[0], points[-1]
    token = max(0.0, (b * rows_a - a * rows_b) / (tokens_b * rows_a - tokens_a * rows_b))
    return max(0.0, (a - token * tokens_a) / rows_a), token


def plain_s_per_token(encode: EncodeConfig, words: Sequence[str], chunker: Chunker) -> float:
    """Seconds a token of the plain float32 model, a text at a time, from texts of two lengths."""
    times = []
    for num_words in (8, 120):
        cleaned, _ = Cleaner(CleanConfig())(rows_of(passages(words, num_words, PLAIN_SEQUENCES)))
        chunks, *_ = chunker(cleaned)
        (flat, offsets), spans = pooled_spans(chunks)
        ids = [flat[offsets[s] : offsets[s + 1]] for s in range(len(offsets) - 1)]
        plain_vectors(encode, chunker.spec, ids[:1], Spans(spans.sequence_N[:1], spans.start_N[:1], spans.end_N[:1]))
        began = time.process_time()
        plain_vectors(encode, chunker.spec, ids, spans)
        times.append((len(flat), time.process_time() - began))
    (few, a), (many, b) = times
    return max(0.0, (b - a) / (many - few))

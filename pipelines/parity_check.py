"""The check before a run: a sample of its own texts through the encoder as the run uses it, against plain float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.stream import StreamJob, chunker_of, cleaner_of
from operators.encoder import Encoder
from operators.encoding.encode_config import configured_model, resolve_device
from operators.piece_store import doc_hashes
from operators.sources.pieces import Piece
from operators.sources.readers import PieceReader
from operators.storage.store import open_store

PIECES_SAMPLED = 4
ROWS_A_PIECE = 256
# Each compared sequence goes through the model alone, in float32: some seconds on a CPU.
SEQUENCES_COMPARED = 32
# Tokens of the sample: the compared texts share their batch with others, as in the run. A CPU's batches are worked
# through in blocks of a quarter of that (operators/encoding/forward.py); a GPU's batch is filled.
CPU_TOKENS = 8192


def sample_of(pieces: Sequence[Piece]) -> list[Piece]:
    """Evenly spaced ones, the first among them."""
    places = np.linspace(0, len(pieces), PIECES_SAMPLED, endpoint=False).astype(int)
    return [pieces[place] for place in sorted(set(places.tolist()))]


def check_parity(job: StreamJob, pieces: Sequence[Piece]) -> dict[str, Any]:
    """Task: what the manifest says of the check, and of how the encoder works here.

    Raises ConfigError that names the worst text when a bound is not kept, SourceError that names one with NaN.
    """
    spec = configured_model(job.encode)
    encoder = Encoder(job.encode, spec)
    encoder.setup()
    how = {"attention": encoder.text_encoder.attention, "attention_reason": encoder.text_encoder.attention_reason}
    on_cpu = resolve_device(job.encode) == "cpu"
    tokens_each = (min(CPU_TOKENS, job.encode.batch_tokens) if on_cpu else job.encode.batch_tokens) // len(pieces)
    chunks = [found for piece in pieces if (found := _chunks(job, piece, tokens_each)) is not None and found.num_rows]
    if not chunks:
        return {**how, "num_vectors": 0}
    table = pa.concat_tables(chunks)
    parity = encoder.check_parity(table, SEQUENCES_COMPARED)
    return {**how, "num_vectors": parity.num_vectors, "cosine_mean": parity.mean, "cosine_min": parity.minimum}


def _chunks(job: StreamJob, piece: Piece, max_tokens: int) -> pa.Table | None:
    """Chunks of the documents of lowest hash, until they have `max_tokens` tokens; at least one document's.

    None for a piece that cannot be read, cleaned or chunked: the run has retries for it, and names it if they fail.
    """
    try:
        rows = PieceReader(job.read, open_store(job.store_url)).read(piece).rows
        lowest = np.argsort(doc_hashes(rows.column("doc_id").to_pylist()), kind="stable")[:ROWS_A_PIECE]
        chunks, *_ = chunker_of(job)(cleaner_of(job)(rows.take(pa.array(lowest)))[0])
    except Exception:
        return None
    lengths = np.array([len(ids or ()) for ids in chunks.column("input_ids").to_pylist()])
    document = np.cumsum(chunks.column("chunk_no").to_numpy() == 0) - 1
    before = np.cumsum(lengths) - lengths
    first_of_document = np.searchsorted(document, document)
    return chunks.filter(pa.array((before[first_of_document] < max_tokens) | (document == 0)))

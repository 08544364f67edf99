"""A vector source in place of a model: vectors that are sums of fixed pseudo-random ones, one for each token.

For claims about bookkeeping: all else (tokenizer, cleaning, chunking, ledger, index) is real. Texts with words in common
get near vectors, so that the index has something to find; the same text gets the same bits in any batch.

Shapes: T tokens, S sequences, N vectors, D dimensions, V size of the vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt

import operators.encoder
from cluster import in_process
from operators.encoding.text_encoder import Ints, Spans, TextEncoder

SEED = 20_000


class HashedEncoder(TextEncoder):
    """A TextEncoder without a model. float32 [N, D] of unit length."""

    attention = "packed"
    attention_reason = ""

    def setup(self) -> None:
        """Nothing to load."""

    def encode_ids(self, ids: Any, spans: Spans | None = None) -> npt.NDArray[np.float32]:
        """As TextEncoder.encode_ids; sums are of whole numbers, so that neighbours do not change a bit."""
        flat_T, offsets = ids if isinstance(ids, tuple) else _flattened(ids)
        if spans is None:
            spans = Spans(np.arange(len(offsets) - 1), np.zeros(len(offsets) - 1, np.int64), np.diff(offsets))
        table_VD = _token_vectors(self.spec.d)
        sums_TD = np.zeros((len(flat_T) + 1, self.spec.d), np.int64)
        np.cumsum(table_VD[flat_T % len(table_VD)], axis=0, out=sums_TD[1:])
        start_N = offsets[spans.sequence_N]
        found_ND = (sums_TD[start_N + spans.end_N] - sums_TD[start_N + spans.start_N]).astype(np.float64)
        norm_N1 = np.linalg.norm(found_ND, axis=1, keepdims=True)
        return (found_ND / np.maximum(norm_N1, 1.0)).astype(np.float32)


def plain_vectors(config: Any, spec: Any, ids: Sequence[Ints], spans: Spans) -> npt.NDArray[np.float32]:
    """In place of operators.encoding.parity.plain_vectors."""
    return HashedEncoder(config, spec).encode_ids(_flattened(ids), spans)


@contextmanager
def hashed_vectors() -> Iterator[None]:
    """Runs in this process (`cluster.where=process`) take their vectors from here."""
    in_process.forget_encoder()
    try:
        with (
            mock.patch.object(operators.encoder, "TextEncoder", HashedEncoder),
            mock.patch.object(operators.encoder, "plain_vectors", plain_vectors),
        ):
            yield
    finally:
        in_process.forget_encoder()


def _flattened(ids: Sequence[Ints]) -> tuple[Ints, Ints]:
    offsets = np.concatenate([[0], np.cumsum([len(sequence) for sequence in ids])]).astype(np.int64)
    return np.concatenate([np.empty(0, np.int64), *(np.asarray(i, np.int64) for i in ids)]), offsets


@functools.lru_cache(maxsize=1)
def _token_vectors(d: int) -> npt.NDArray[np.int64]:
    """[V, D]; the special tokens that every text has (up to id 105) are 0."""
    table_VD = np.random.default_rng(SEED).integers(-1000, 1000, (30_522, d))
    table_VD[:106] = 0
    return table_VD

"""The bookkeeping of a small corpus: benchmarks/limits.py runs the same with 2,000,000 rows, 10,000 pieces and 100 deltas."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks import limits
from benchmarks.hashed_vectors import HashedEncoder, hashed_vectors
from operators.encoding.encode_config import EncodeConfig
from operators.encoding.model_folder import load_spec


@pytest.fixture(autouse=True)
def without_model() -> Iterator[None]:
    with hashed_vectors():
        yield


def test_time_and_memory_of_a_piece_do_not_grow_with_the_pieces_before_it(tmp_path: Path) -> None:
    found = limits.ingest(tmp_path, num_rows=1200, num_pieces=60)
    assert found["pieces"] == 60
    # What grows with the square of their number shows in the last of 60 already; the machine may be busy with other work.
    assert found["piece_cpu_s"]["ratio"] < 2
    # What allocators keep; a megabyte for each piece would be 54.
    assert found["stream_memory"]["end_mb"] - found["stream_memory"]["after_first_tenth_mb"] < 20
    assert found["recall@10"] > 0.9


def test_an_index_of_deltas_answers_and_is_one_segment_after_compaction(tmp_path: Path) -> None:
    found = limits.deltas(tmp_path, num_updates=4, num_rows=200, changed=20)
    assert found["deltas"] == 4
    assert [at["deltas"] for at in found["search"]] == [1, 2, 4]


def test_hashed_vectors_have_unit_length_and_the_same_bits_in_any_batch(minilm: Path) -> None:
    encoder = HashedEncoder(EncodeConfig(), load_spec(minilm))
    texts = [limits.text_of(number) for number in range(50)]
    together = encoder.encode_texts(texts)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-6)
    assert (together[30:31] == encoder.encode_texts(texts[30:31])).all()
    assert len(np.unique(together, axis=0)) == 50

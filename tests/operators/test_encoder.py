"""The encoder operator: chunks in, vectors and further outputs out, and the check before a run."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from operators import schemas
from operators.chunker import ChunkConfig, Chunker
from operators.cleaner import CleanConfig, Cleaner
from operators.encoder import Encoder
from operators.encoding.encode_config import EncodeConfig, configured_model
from operators.encoding.outputs import RESERVED, Output
from operators.encoding.text_encoder import TextEncoder
from operators.errors import ConfigError, SourceError
from operators.piece_store import vectors_of

TEXTS = [
    "The cat sat on the mat.",
    "吾輩は猫である。名前はまだ無い。",
    "السلام عليكم ورحمة الله",
    " ",
    "one two three four five " * 20,
    "A text that is longer than what the model takes at once. " * 60,
    *(f"A sentence about the number {n} and {'very ' * (n % 17)}little else." for n in range(20)),
]


@functools.cache
def operator(**settings: Any) -> Encoder:
    config = EncodeConfig(**{"precision": "float32", **settings})
    return Encoder(config, configured_model(config))


def chunked(texts: list[str], **settings: Any) -> pa.Table:
    """CHUNKS of documents d0, d1, ..."""
    count = len(texts)
    columns: list[Any] = [[f"d{n}" for n in range(count)], texts, ["file"] * count, list(range(count))]
    rows = pa.table([pa.array(c, t.type) for c, t in zip(columns, schemas.ROWS, strict=True)], schema=schemas.ROWS)
    spec = configured_model(EncodeConfig())
    return Chunker(ChunkConfig(**settings), spec)(Cleaner(CleanConfig())(rows)[0])[0]


def test_truncated_chunks_have_the_vectors_of_the_whole_text() -> None:
    chunks = chunked(TEXTS, mode="truncate")
    table = operator()(chunks)
    assert table.schema == schemas.encoded(384)
    kept = [name for name in table.schema.names if name != "vector"]
    assert table.select(kept).equals(chunks.select(kept))
    whole = TextEncoder(operator().config, operator().text_encoder.spec)
    want = whole.encode_texts([text for text in TEXTS if text.strip()])
    assert np.array_equal(vectors_of(table), want.astype(np.float16))


def test_slices_of_tables_give_the_same_bits() -> None:
    chunks = chunked(TEXTS, max_tokens=40, overlap_tokens=4)
    part = chunks.slice(3, 8)
    assert operator()(part).equals(operator()(pa.concat_tables([chunks.slice(3, 2), chunks.slice(5, 6)])))
    empty = schemas.CHUNKS.empty_table()
    assert operator()(empty).equals(schemas.encoded(384).empty_table())


def test_late_chunks_pool_spans_of_one_pass_over_the_document() -> None:
    chunks = chunked(TEXTS, mode="late", max_tokens=32)
    lists = chunks.column("input_ids").to_pylist()
    assert sum(ids is None for ids in lists) > 5
    vectors = vectors_of(operator()(chunks)).astype(np.float32)
    from transformers import AutoModel

    model = AutoModel.from_pretrained(str(operator().text_encoder.spec.path)).eval()
    states_TD = np.empty(0)
    for n, (ids, start, end) in enumerate(
        zip(lists, chunks.column("pool_start").to_pylist(), chunks.column("pool_end").to_pylist(), strict=True)
    ):
        if ids is not None:
            with torch.inference_mode():
                states_TD = model(torch.tensor([ids])).last_hidden_state[0].numpy()
        want_D = states_TD[start:end].mean(axis=0)
        assert vectors[n] @ (want_D / np.linalg.norm(want_D)) >= 0.9999  # float16 keeps 11 bits
    with pytest.raises(ValueError, match="cut inside of a document"):
        operator()(chunks.slice(next(n for n, ids in enumerate(lists) if ids is None)))


def test_further_outputs_cannot_take_the_name_of_a_column() -> None:
    assert {*schemas.committed(1).names, *schemas.ROW_STORE.names, *schemas.CHUNKS.names} <= set(RESERVED)


def test_further_outputs_come_from_the_same_vectors() -> None:
    outputs = ("vector_128=128:float16", "bits=384:binary", "small=64:int8")
    chunks = chunked(TEXTS)
    table = operator(outputs=outputs)(chunks)
    made = (Output("vector_128", 128, "float16"), Output("bits", 384, "binary"), Output("small", 64, "int8"))
    assert table.schema == schemas.encoded(384, made)
    full = vectors_of(operator()(chunks)).astype(np.float32)
    assert np.array_equal(vectors_of(table), full.astype(np.float16))
    leading = full[:, :128] / np.linalg.norm(full[:, :128], axis=1, keepdims=True)
    found = np.array(table["vector_128"].to_pylist())
    np.testing.assert_allclose(found, leading, atol=2e-3)
    bits = np.frombuffer(b"".join(table["bits"].to_pylist()), np.uint8).reshape(len(full), 48)
    seen = full != 0  # a float16 of a tiny value is 0
    assert np.array_equal(np.unpackbits(bits, axis=1)[seen], (full > 0)[seen])
    scaled = np.array(table["small"].to_pylist()) * np.array(table["small_scale"].to_pylist())[:, None]
    small = full[:, :64] / np.linalg.norm(full[:, :64], axis=1, keepdims=True)
    np.testing.assert_allclose(scaled, small, atol=5e-3)


def broken(word: int, change: Any) -> Encoder:
    """An operator whose forward pass has `change` done to the states of the token `word`."""
    made = Encoder(operator().config, operator().text_encoder.spec)
    made.setup()
    inner: Any = made.text_encoder._forward

    def forward(flat_T: Any, offsets: Any) -> torch.Tensor:
        states: torch.Tensor = inner(flat_T, offsets).clone()
        hit = torch.from_numpy(flat_T == word)
        states[hit] = change(states[hit])
        return states

    made.text_encoder._forward = forward  # type: ignore[assignment]
    return made


def test_nan_is_an_error_that_names_the_document() -> None:
    chunks = chunked(["one cat", "two dogs", "a zebra", "my zebra"])
    zebra = chunks["input_ids"].to_pylist()[2][2]
    for encode in (Encoder.__call__, functools.partial(Encoder.check_parity, num_compared=4)):
        with pytest.raises(SourceError, match=r"doc_id 'd2' chunk_no 0 \(file\)"):
            encode(broken(zebra, lambda states: states * float("nan")), chunks)


def test_check_before_a_run_compares_with_plain_float32() -> None:
    chunks = chunked(TEXTS)
    parity = operator(precision="bfloat16").check_parity(chunks, 16)
    assert parity.num_vectors == 16
    assert 0.999 <= parity.minimum <= parity.mean <= 1.0000001
    assert parity.minimum < 1  # two ways of computing, or nothing is compared


def test_check_before_a_run_refuses_and_names_the_worst_text() -> None:
    texts = [*(f"plain words about the number {n}" for n in range(20)), "here a zebra stands"]
    chunks = chunked(texts)
    zebra = chunks["input_ids"].to_pylist()[20][3]
    wrong = broken(zebra, lambda states: -9 * states)
    with pytest.raises(ConfigError, match=r"encode.min_parity.* doc_id 'd20' chunk_no 0 \(file, cosine") as error:
        wrong.check_parity(chunks, len(texts))
    assert "encode.precision=float32" in str(error.value)
    lenient = dataclasses.replace(wrong.config, min_parity=-1.0)
    wrong.config = lenient
    with pytest.raises(ConfigError, match=r"encode\.min_mean_parity"):
        wrong.check_parity(chunks, len(texts))

"""Vectors: the same as sentence-transformers', the same bits every time, never NaN."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch

from operators import schemas
from operators.chunker import ChunkConfig, Chunker
from operators.encoder import Encoder
from operators.errors import ConfigError, SourceError
from operators.model import load_spec, resolve_model
from operators.text_encoder import EncodeConfig, NonFiniteVectorError, TextEncoder, _pool, resolve_precision

ROOT = Path(__file__).resolve().parents[2]
MODEL = resolve_model("all-MiniLM-L6-v2")
TEXTS = [
    "The cat sat on the mat.",
    "a",
    ".",
    " ",
    "",
    "吾輩は猫である。名前はまだ無い。",
    "Быстрая коричневая лиса",
    "السلام عليكم ورحمة الله",
    "한국어 문장입니다",
    "🙂👩‍👩‍👧‍👦 emoji 🎉",
    "naïve café Ünïcödé",
    "one two three four five " * 20,
    "The longest text of all, far beyond what the model takes. " * 200,
    *(f"A sentence about the number {n} and {'very ' * (n % 17)}little else." for n in range(60)),
]


@functools.cache
def encoder(precision: str = "float32", batch_tokens: int = 4096) -> TextEncoder:
    return TextEncoder(EncodeConfig(precision=precision, batch_tokens=batch_tokens), load_spec(MODEL))


@functools.cache
def expected() -> npt.NDArray[np.float32]:
    """What sentence-transformers gives for TEXTS in float32."""
    from sentence_transformers import SentenceTransformer

    peer = SentenceTransformer(str(MODEL), device="cpu")
    return np.asarray(peer.encode(TEXTS, normalize_embeddings=True, show_progress_bar=False), dtype=np.float32)


def rows(texts: list[str]) -> pa.Table:
    count = len(texts)
    columns: list[Any] = [[f"d{n}" for n in range(count)], texts, ["file"] * count, list(range(count))]
    return pa.table([pa.array(c, t.type) for c, t in zip(columns, schemas.ROWS, strict=True)], schema=schemas.ROWS)


def test_float32_vectors_are_those_of_sentence_transformers() -> None:
    vectors = encoder().encode_texts(TEXTS)
    assert vectors.dtype == np.float32
    assert (vectors * expected()).sum(axis=1).min() >= 0.99999


def test_bfloat16_vectors_are_close_to_those_of_sentence_transformers() -> None:
    vectors = encoder("bfloat16").encode_texts(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    assert (vectors * expected()).sum(axis=1).min() >= 0.999  # measured: 0.9999 on scifact


def test_truncated_chunks_have_the_vectors_of_the_whole_text() -> None:
    chunks, rejects = Chunker(ChunkConfig(mode="truncate"), MODEL)(rows(TEXTS))
    assert rejects["row"].to_pylist() == [3, 4]
    table = Encoder(EncodeConfig(precision="float32"), MODEL)(chunks)
    assert table.schema == schemas.encoded(384)
    assert table.drop_columns(["vector"]).equals(chunks.drop_columns(["input_ids"]))
    vectors = np.stack(table["vector"].to_numpy(zero_copy_only=False)).astype(np.float32)
    want = expected()[table["row"].to_numpy()]
    assert (vectors * want).sum(axis=1).min() >= 0.9999  # float16 keeps 11 bits
    assert np.array_equal(
        vectors.astype(np.float16), encoder().encode_texts([t for t in TEXTS if t.strip()]).astype("f2")
    )


def test_same_list_gives_the_same_bits() -> None:
    for precision in ("float32", "bfloat16"):
        first = encoder(precision).encode_texts(TEXTS)
        torch.set_num_threads(2)  # another user of torch in the process does not change the vectors
        again = TextEncoder(EncodeConfig(precision=precision), load_spec(MODEL)).encode_texts(TEXTS)
        assert first.tobytes() == again.tobytes()
        assert torch.get_num_threads() == 1


def test_flat_ids_and_slices_of_tables_give_the_same_bits() -> None:
    chunks, _ = Chunker(ChunkConfig(max_tokens=40, overlap_tokens=4), MODEL)(rows(TEXTS[:12]))
    operator = Encoder(EncodeConfig(), MODEL)
    part = chunks.slice(3, 8)
    parts = pa.concat_tables([chunks.slice(3, 2), chunks.slice(5, 6)])
    assert operator(part).equals(operator(parts))
    again = TextEncoder(EncodeConfig(), load_spec(MODEL)).encode_ids(part["input_ids"].to_pylist())
    halves = np.stack(operator(part)["vector"].to_numpy(zero_copy_only=False))
    assert np.array_equal(halves, again.astype(np.float16))


def test_order_of_the_input_is_kept_whatever_the_batches() -> None:
    whole = encoder().encode_texts(TEXTS)
    for batch_tokens in (1, 300):
        assert (encoder("float32", batch_tokens).encode_texts(TEXTS) * whole).sum(axis=1).min() >= 0.99999


def test_no_texts_give_no_vectors() -> None:
    assert encoder().encode_ids([]).shape == (0, 384)
    empty = schemas.CHUNKS.empty_table()
    assert Encoder(EncodeConfig(), MODEL)(empty).equals(schemas.encoded(384).empty_table())


def test_sequences_that_the_model_cannot_take_are_named() -> None:
    with pytest.raises(ValueError, match=r"1\.\.512 tokens .* got 0 in sequence 1"):
        encoder().encode_ids([[101, 102], []])
    with pytest.raises(ValueError, match="got 513 in sequence 0"):
        encoder().encode_ids([[101] * 513])


def test_nan_is_an_error_that_names_the_document() -> None:
    chunks, _ = Chunker(ChunkConfig(), MODEL)(rows(["one cat", "two dogs", "a zebra", "my zebra"]))
    operator = Encoder(EncodeConfig(), MODEL)
    operator.setup()
    assert operator._encoder is not None
    ids = chunks["input_ids"].to_pylist()
    with torch.no_grad():
        operator._encoder._model.get_input_embeddings().weight[ids[2][2]] = float("nan")
    with pytest.raises(SourceError, match=r"doc_id 'd2' chunk_no 0 \(file\)"):
        operator(chunks)
    with pytest.raises(NonFiniteVectorError, match=r"sequence 2 of 4 .*\(2 in all\)"):
        operator._encoder.encode_ids(ids)


def test_out_of_memory_halves_the_batches_and_goes_on() -> None:
    class Small(TextEncoder):
        def _forward(self, flat: Any, begins_B: Any, lengths_B: Any) -> npt.NDArray[np.float32]:
            if len(lengths_B) * lengths_B[0] > 600:
                raise torch.OutOfMemoryError("too large")
            return super()._forward(flat, begins_B, lengths_B)

    small = Small(EncodeConfig(precision="float32"), load_spec(MODEL))
    assert (small.encode_texts(TEXTS) * encoder().encode_texts(TEXTS)).sum(axis=1).min() >= 0.99999
    assert small.batch_tokens == 512


@pytest.mark.parametrize("ours", ["mean", "cls", "max", "last", "mean_sqrt_len", "weightedmean"])
def test_pooling_is_that_of_sentence_transformers(ours: str) -> None:
    from sentence_transformers.sentence_transformer.modules import Pooling

    theirs = {"last": "lasttoken", "mean_sqrt_len": "mean_sqrt_len_tokens"}.get(ours, ours)
    states = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 7, 16), dtype=np.float32))
    mask = torch.arange(7) < torch.tensor([7, 1, 4, 6])[:, None]
    features = {"token_embeddings": states, "attention_mask": mask.to(torch.int64)}
    want = Pooling(16, pooling_mode=theirs)(features)["sentence_embedding"]
    torch.testing.assert_close(_pool(states, mask, ours), want)


def test_settings_that_cannot_be_used_are_refused() -> None:
    for name, value in (("precision", "int8"), ("device", "tpu"), ("batch_tokens", 0), ("threads_per_worker", 0)):
        with pytest.raises(ConfigError, match=f"encode.{name} must be .*, got {value!r}"):
            EncodeConfig(**{name: value})  # type: ignore[arg-type]
    assert resolve_precision(EncodeConfig(precision="float32")) == "float32"
    assert resolve_precision(EncodeConfig()) in ("float32", "bfloat16")


def test_text_encoder_needs_neither_arrow_nor_ray_nor_faiss() -> None:
    absent = ("pyarrow", "ray", "faiss", "pydantic")
    code = f"import operators.text_encoder, sys; print([name for name in {absent} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"

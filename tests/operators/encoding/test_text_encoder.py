"""Vectors: the same as sentence-transformers', the same bits every time, whatever the neighbours, never NaN."""

from __future__ import annotations

import functools
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from operators.encoding.encode_config import EncodeConfig, configured_model, resolve_precision
from operators.encoding.text_encoder import NonFiniteVectorError, Spans, TextEncoder
from operators.errors import ConfigError, ResourceError

ROOT = Path(__file__).resolve().parents[3]
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
def encoder(precision: str = "float32", batch_tokens: int = 4096, attention: str = "auto") -> TextEncoder:
    config = EncodeConfig(precision=precision, batch_tokens=batch_tokens, attention=attention)
    return TextEncoder(config, configured_model(config))


@functools.cache
def expected() -> npt.NDArray[np.float32]:
    """What sentence-transformers gives for TEXTS in float32."""
    from sentence_transformers import SentenceTransformer

    peer = SentenceTransformer(str(encoder().spec.path), device="cpu")
    return np.asarray(peer.encode(TEXTS, normalize_embeddings=True, show_progress_bar=False), dtype=np.float32)


def cosines(found_ND: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.asarray((found_ND * expected()).sum(axis=1))


@pytest.mark.parametrize("attention", ["packed", "padded"])
def test_float32_vectors_are_those_of_sentence_transformers(attention: str) -> None:
    vectors_ND = encoder(attention=attention).encode_texts(TEXTS)
    assert encoder(attention=attention).attention == attention
    assert vectors_ND.dtype == np.float32
    assert cosines(vectors_ND).min() >= 0.99999


@pytest.mark.parametrize(("precision", "least"), [("bfloat16", 0.999), ("int8", 0.98)])
def test_lower_precisions_are_close_to_sentence_transformers(precision: str, least: float) -> None:
    vectors_ND = encoder(precision).encode_texts(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(vectors_ND, axis=1), 1, rtol=1e-6)
    assert cosines(vectors_ND).min() >= least


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_vector_does_not_depend_on_its_neighbours_beyond_rounding(precision: str) -> None:
    least = {"float32": 0.999999, "bfloat16": 0.9995}[precision]
    alone_ND = encoder(precision, 1).encode_texts(TEXTS)
    for batch_tokens in (40, 300, 1500, 16_384):
        together_ND = encoder(precision, batch_tokens).encode_texts(TEXTS)
        assert (together_ND * alone_ND).sum(axis=1).min() >= least, batch_tokens


def test_same_list_gives_the_same_bits() -> None:
    for precision in ("float32", "bfloat16", "int8"):
        first_ND = encoder(precision).encode_texts(TEXTS)
        torch.set_num_threads(2)  # another user of torch in the process does not change the vectors
        config = EncodeConfig(precision=precision)
        again_ND = TextEncoder(config, configured_model(config)).encode_texts(TEXTS)
        assert first_ND.tobytes() == again_ND.tobytes()
        assert torch.get_num_threads() == 1


def test_texts_of_several_blocks_come_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("operators.encoding.text_encoder.TEXTS_AT_ONCE", 7)
    assert cosines(encoder().encode_texts(TEXTS)).min() >= 0.99999


def test_equal_texts_are_computed_once_and_have_the_same_bits() -> None:
    ids = [[101, 7592, 102], [101, 2088, 102], [101, 7592, 102]]
    counted = TextEncoder(encoder().config, encoder().spec)
    counted.setup()
    seen: list[int] = []
    inner: Any = counted._forward

    class Counting:
        def __call__(self, flat_T: Any, offsets: Any) -> torch.Tensor:
            seen.append(len(offsets) - 1)
            states: torch.Tensor = inner(flat_T, offsets)
            return states

    counted._forward = Counting()  # type: ignore[assignment]
    vectors_ND = counted.encode_ids(ids)
    assert seen == [2]
    assert vectors_ND[0].tobytes() == vectors_ND[2].tobytes()


def test_spans_pool_their_own_tokens_of_one_pass() -> None:
    ids = [[101, 1996, 4937, 2938, 102], [101, 7592, 102]]
    spans = Spans(np.array([0, 0, 0, 1]), np.array([0, 2, 0, 1]), np.array([5, 4, 2, 2]))
    found_ND = encoder().encode_ids(ids, spans)
    from transformers import AutoModel

    model = AutoModel.from_pretrained(str(encoder().spec.path)).eval()
    for n, (sequence, start, end) in enumerate([(0, 0, 5), (0, 2, 4), (0, 0, 2), (1, 1, 2)]):
        with torch.inference_mode():
            states_TD = model(torch.tensor([ids[sequence]])).last_hidden_state[0].numpy()
        want_D = states_TD[start:end].mean(axis=0)
        assert found_ND[n] @ (want_D / np.linalg.norm(want_D)) >= 0.99999
    with pytest.raises(ValueError, match=r"got 3\.\.3 of sequence 1 in span 1"):
        encoder().encode_ids(ids, Spans(np.array([0, 1]), np.array([0, 3]), np.array([5, 3])))


def test_no_texts_give_no_vectors() -> None:
    assert encoder().encode_ids([]).shape == (0, 384)
    assert encoder().encode_texts([]).shape == (0, 384)


def test_leading_dimensions_have_unit_length_again() -> None:
    config = EncodeConfig(precision="float32", truncate_dim=64)
    short_ND = TextEncoder(config, configured_model(config)).encode_texts(TEXTS)
    want_ND = expected()[:, :64] / np.linalg.norm(expected()[:, :64], axis=1, keepdims=True)
    assert short_ND.shape == (len(TEXTS), 64)
    assert (short_ND * want_ND).sum(axis=1).min() >= 0.99999


def test_prompts_of_the_settings_are_put_before_the_texts() -> None:
    config = EncodeConfig(precision="float32", query_prompt="query: ", document_prompt="passage: ")
    prompted = TextEncoder(config, configured_model(config))
    for ours, prompt in ((prompted.encode_queries, "query: "), (prompted.encode_documents, "passage: ")):
        want_ND = encoder().encode_texts([prompt + text for text in TEXTS[:9]])
        assert (ours(TEXTS[:9]) * want_ND).sum(axis=1).min() >= 0.99999


def test_sequences_that_the_model_cannot_take_are_named() -> None:
    with pytest.raises(ValueError, match=r"1\.\.512 tokens .* got 0 in sequence 1"):
        encoder().encode_ids([[101, 102], []])
    with pytest.raises(ValueError, match="got 513 in sequence 0"):
        encoder().encode_ids([[101] * 513])


def out_of_memory_beyond(tokens: int) -> TextEncoder:
    """An encoder whose device has memory for so many tokens."""
    small = TextEncoder(encoder().config, encoder().spec)
    small.setup()
    inner: Any = small._forward

    def forward(flat_T: Any, offsets: Any) -> torch.Tensor:
        if len(flat_T) > tokens:
            raise torch.OutOfMemoryError("too large")
        states: torch.Tensor = inner(flat_T, offsets)
        return states

    small._forward = forward  # type: ignore[assignment]
    return small


def test_out_of_memory_halves_the_token_budget_and_goes_on() -> None:
    small = out_of_memory_beyond(600)
    assert cosines(small.encode_texts(TEXTS)).min() >= 0.99999
    assert small.batch_tokens == 512
    with pytest.raises(ResourceError, match="a single text of 256 tokens"):
        out_of_memory_beyond(100).encode_texts(TEXTS)


def test_settings_that_cannot_be_used_are_refused() -> None:
    wrong: list[tuple[str, Any]] = [
        *(("precision", "int4"), ("attention", "dense"), ("device", "tpu"), ("batch_tokens", 0)),
        *(("threads_per_worker", 0), ("truncate_dim", -1), ("num_layers", -1), ("min_parity", 2.0)),
    ]
    for name, value in wrong:
        with pytest.raises(ConfigError, match=f"encode.{name} must be .*, got {value!r}"):
            EncodeConfig(**{name: value})
    for name, value in (("truncate_dim", 385), ("num_layers", 7)):
        with pytest.raises(ConfigError, match=f"encode.{name} must be in 0.*, got {value}"):
            configured_model(EncodeConfig(**{name: value}))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="float16 needs the device cuda"):
        resolve_precision(EncodeConfig(precision="float16", device="cpu"))
    assert resolve_precision(EncodeConfig(precision="float32")) == "float32"
    assert resolve_precision(EncodeConfig(device="cpu")) in ("float32", "bfloat16")


def test_nan_is_an_error_that_names_the_vector() -> None:
    broken = TextEncoder(encoder().config, encoder().spec)
    broken.setup()
    inner: Any = broken._forward

    def forward(flat_T: Any, offsets: Any) -> torch.Tensor:
        states: torch.Tensor = inner(flat_T, offsets).clone()
        states[torch.from_numpy(flat_T == 2088)] = float("nan")
        return states

    broken._forward = forward  # type: ignore[assignment]
    with pytest.raises(NonFiniteVectorError, match=r"vector 1 of 3 \(4 tokens\) .*\(1 in all\)") as error:
        broken.encode_ids([[101, 7592, 102], [101, 2088, 2088, 102], [101, 1996, 102]])
    again = pickle.loads(pickle.dumps(error.value))  # it comes from other processes
    assert (again.index, str(again)) == (1, str(error.value))


def test_text_encoder_needs_neither_arrow_nor_ray_nor_faiss() -> None:
    absent = ("pyarrow", "ray", "faiss", "pydantic")
    code = f"import operators.encoding.text_encoder, sys; print([name for name in {absent} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"

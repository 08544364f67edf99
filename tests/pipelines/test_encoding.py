"""What the encoder's settings make of a build: prompts, further columns, late chunks, the check before a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from operators.artifact.manifest import Manifest, open_current
from operators.encoding.encode_config import EncodeConfig, configured_model
from operators.encoding.text_encoder import TextEncoder
from operators.errors import ConfigError
from operators.storage.store import open_store
from pipelines.search import encode_queries, search
from tests.pipelines.build_corpus import write_corpus
from tests.pipelines.one_process import build_in_one_process

DOCUMENTS = [
    *((f"d{n}", f"Title {n}", f"A short text about the number {n}. It has {n % 7} legs.") for n in range(70)),
    ("long", "The long one", " ".join(f"Sentence {n} of the long document says a few words." for n in range(60))),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.parquet", DOCUMENTS))


def published_rows(root: Path) -> pa.Table:
    files = sorted((root / "segments").rglob("*.rows.parquet"))
    return pa.concat_tables([pq.read_table(file) for file in files])


def test_further_outputs_are_columns_of_the_published_rows(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = "encode.outputs=vector_64=64:float16,bits=384:binary,small=128:int8"
    # Small waves and shards: the columns pass every merge.
    made = build_in_one_process(monkeypatch, [corpus], str(tmp_path / "r"), asked, "index.merge_fan_in=2")
    rows = published_rows(tmp_path / "r")
    assert rows.num_rows == made.manifest.ntotal
    assert {"vector_64", "bits", "small", "small_scale"} < set(rows.schema.names)
    store = open_store(str(tmp_path / "r"))
    config = EncodeConfig(**{**made.manifest.config["encode"], "outputs": ()})
    texts = rows["text"].to_pylist()
    full_ND = TextEncoder(config, configured_model(config)).encode_texts(texts)
    found_ND = np.array(rows["vector_64"].to_pylist(), np.float32)
    leading_ND = full_ND[:, :64] / np.linalg.norm(full_ND[:, :64], axis=1, keepdims=True)
    assert (found_ND * leading_ND).sum(axis=1).min() >= 0.999
    bits_ND = np.unpackbits(np.frombuffer(b"".join(rows["bits"].to_pylist()), np.uint8).reshape(-1, 48), axis=1)
    assert (bits_ND == (full_ND > 0)).mean() >= 0.98  # near zero other neighbours decide
    assert open_current(store).content_digest == made.manifest.content_digest
    assert search(str(tmp_path / "r"), ["the number 12"], k=3)[0]["hits"][0]["doc_id"].startswith("d")


def test_prompts_are_stored_and_applied_to_chunks_and_queries(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ("encode.query_prompt=question: ", "encode.document_prompt=passage: ")
    made = build_in_one_process(monkeypatch, [corpus], str(tmp_path / "r"), *prompts, "encode.precision=float32")
    manifest: Manifest = made.manifest
    assert manifest.model["prompts"] == {"query": "question: ", "document": "passage: "}
    plain = TextEncoder(EncodeConfig(precision="float32"), configured_model(EncodeConfig()))
    found_Qd = encode_queries(manifest, ["how many legs"], None)
    assert found_Qd[0] @ plain.encode_texts(["question: how many legs"])[0] >= 0.99999
    hit = search(str(tmp_path / "r"), ["how many legs"], k=1, nprobe=manifest.nlist)[0]["hits"][0]
    want = found_Qd[0] @ plain.encode_texts(["passage: " + hit["text"]])[0]
    assert hit["score"] == pytest.approx(want, abs=1e-3)


def test_late_chunks_are_searched_and_slice_their_document(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = build_in_one_process(monkeypatch, [corpus], str(tmp_path / "r"), "chunk.mode=late", "chunk.max_tokens=40")
    rows = published_rows(tmp_path / "r")
    texts = {doc_id: f"{title} {text}" for doc_id, title, text in DOCUMENTS}
    lines = rows.select(["doc_id", "start", "end", "text"]).to_pylist()
    assert all(line["text"] == texts[line["doc_id"]][line["start"] : line["end"]] for line in lines)
    assert sum(line["doc_id"] == "long" for line in lines) > 10
    assert made.manifest.model["over_length"] == 1
    hits = search(str(tmp_path / "r"), ["sentence of the long document"], k=3)[0]["hits"]
    assert hits[0]["doc_id"] == "long"


def test_documents_over_the_models_length_are_counted(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = build_in_one_process(monkeypatch, [corpus], str(tmp_path / "w")).manifest.model
    truncate = build_in_one_process(monkeypatch, [corpus], str(tmp_path / "t"), "chunk.mode=truncate").manifest.model
    assert (window["over_length"], window["truncated_tokens"]) == (1, 0)
    assert truncate["over_length"] == 1
    assert truncate["truncated_tokens"] > 100


def test_outcome_of_the_check_before_the_run_is_in_the_manifest(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_in_one_process(monkeypatch, [corpus], str(tmp_path / "r")).manifest.model
    parity: dict[str, Any] = model["parity"]
    assert parity["attention"] == "packed"
    assert parity["attention_reason"] == ""
    assert parity["num_vectors"] >= 16
    assert 0.999 <= parity["cosine_min"] <= parity["cosine_mean"] <= 1.0001
    assert model["batch_tokens"] == EncodeConfig().batch_tokens


def test_run_with_an_encoder_off_the_model_does_not_start(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"nothing was encoded: .* \(encode\.min_parity\).* worst of \d+ is doc_id '"):
        build_in_one_process(
            monkeypatch, [corpus], str(tmp_path / "r"), "encode.precision=bfloat16", "encode.min_parity=1"
        )
    assert not list((tmp_path / "r").rglob("pieces/*.json"))
    # Mended as the message says, the run begins anew: the refused one left nothing to be reconciled with.
    with pytest.raises(ConfigError, match=r"encode\.outputs"):
        build_in_one_process(monkeypatch, [corpus], str(tmp_path / "r"), "encode.outputs=vector=3:int8")
    build_in_one_process(
        monkeypatch, [corpus], str(tmp_path / "r"), "encode.precision=bfloat16", "encode.min_parity=0.9"
    )


def test_an_index_of_int8_or_float16_is_searched_on_any_machine(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lenient = ("encode.precision=int8", "encode.min_mean_parity=0.99")
    made = build_in_one_process(monkeypatch, [corpus], str(tmp_path / "r"), *lenient)
    found_Qd = encode_queries(made.manifest, ["how many legs"], None)
    stored = made.manifest.config["encode"]
    half = {**made.manifest.config, "encode": {**stored, "precision": "float16"}}
    other_Qd = encode_queries(dataclasses.replace(made.manifest, config=half), ["how many legs"], None)
    assert 0.98 <= found_Qd[0] @ other_Qd[0] < 1

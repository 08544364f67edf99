"""Every family of models and every module gives the vectors of sentence-transformers, text by text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from operators.encoding.encode_config import EncodeConfig, configured_model
from operators.encoding.model_folder import load_spec
from operators.encoding.module_layout import POOLINGS
from operators.encoding.text_encoder import TextEncoder
from tests.operators.encoding.tiny_models import (
    FAMILIES,
    TEXTS,
    quiet,
    randomize,
    save_family,
    save_model,
    save_transformer,
    tokenizer_of,
)

THEIR_NAMES = {"last": "lasttoken", "mean_sqrt_len": "mean_sqrt_len_tokens", "weighted_mean": "weightedmean"}


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of the tiny model of a family; its plain transformers folder is the sibling `transformer`."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = save_family(name, tmp_path_factory.mktemp(name))
        return made[name]

    return folder


@pytest.fixture
def bert(families: Callable[[str], Path]) -> Path:
    """Plain transformers folder of a tiny BERT."""
    return families("bert").parent / "transformer"


def ours(folder: Path) -> TextEncoder:
    return TextEncoder(EncodeConfig(precision="float32"), load_spec(folder))


def peer(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    with quiet():
        return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


def pooling(mode: str | Sequence[str], **settings: Any) -> Any:
    from sentence_transformers.sentence_transformer.modules import Pooling

    names = [THEIR_NAMES.get(name, name) for name in ([mode] if isinstance(mode, str) else mode)]
    return Pooling(32, pooling_mode=names, **settings)


def assert_same(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> None:
    """Lengths count too: not every model normalises."""
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    cosines = (found.astype(np.float64) * expected).sum(axis=1) / norms
    assert cosines.min() >= 0.99999, f"text {TEXTS[int(cosines.argmin())]!r}"
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), np.linalg.norm(expected, axis=1), rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_gives_the_vectors_of_sentence_transformers(name: str, families: Callable[[str], Path]) -> None:
    folder = families(name)
    expected = peer(folder).encode(TEXTS, batch_size=8)
    close = expected @ expected.T
    assert np.sort(close[np.triu_indices(len(TEXTS), 1)])[len(TEXTS)] < 0.95  # texts differ, or nothing is shown
    assert_same(ours(folder).encode_texts(TEXTS), expected)


def test_the_texts_go_from_one_token_to_beyond_the_models_length(families: Callable[[str], Path]) -> None:
    tokenizer = peer(families("mistral")).tokenizer
    lengths = [len(ids) for ids in tokenizer(TEXTS)["input_ids"]]
    assert (min(lengths), max(lengths) > 3 * load_spec(families("mistral")).max_seq_length) == (1, True)


def test_a_decoder_that_looks_both_ways_differs_from_one_that_does_not(families: Callable[[str], Path]) -> None:
    both_ways = ours(families("llama-bidirectional")).encode_texts(TEXTS)
    causal = ours(families("llama")).encode_texts(TEXTS)
    assert (both_ways * causal).sum(axis=1).min() < 0.9


@pytest.mark.parametrize("mode", [*POOLINGS, ("mean", "max"), ("last", "cls", "weighted_mean")])
@pytest.mark.parametrize("include_prompt", [True, False])
def test_poolings_and_prompts_are_those_of_sentence_transformers(
    mode: str | tuple[str, ...], include_prompt: bool, bert: Path, tmp_path: Path
) -> None:
    prompts = {"query": "find the cat: ", "document": "text | "}
    folder = save_model(tmp_path, bert, pooling(mode, include_prompt=include_prompt), prompts=prompts)
    theirs, encoder = peer(folder), ours(folder)
    assert encoder.spec.poolings == ((mode,) if isinstance(mode, str) else mode)
    assert_same(encoder.encode_texts(TEXTS), theirs.encode(TEXTS, batch_size=8))
    assert_same(encoder.encode_queries(TEXTS), theirs.encode_query(TEXTS, batch_size=8))
    assert_same(encoder.encode_documents(TEXTS), theirs.encode_document(TEXTS, batch_size=8))


def test_a_prompt_is_left_out_of_a_decoders_pooling_too(families: Callable[[str], Path], tmp_path: Path) -> None:
    transformer = families("qwen3").parent / "transformer"
    folder = save_model(tmp_path, transformer, pooling("mean", include_prompt=False), prompts={"query": "find: "})
    assert_same(ours(folder).encode_queries(TEXTS), peer(folder).encode_query(TEXTS, batch_size=8))


@pytest.mark.parametrize(
    ("prompts", "default"),
    [
        ({"query": "q: "}, None),
        ({"query": "q: ", "document": "d: "}, "query"),
        ({"passage": "p: "}, "passage"),
        ({"query": None, "document": "d: ", "passage": "p: "}, None),
        ({}, None),
    ],
)
def test_the_prompts_that_are_chosen_are_those_of_sentence_transformers(
    prompts: dict[str, str | None], default: str | None, bert: Path, tmp_path: Path
) -> None:
    folder = save_model(tmp_path, bert, pooling("mean"))
    file = folder / "config_sentence_transformers.json"
    settings = json.loads(file.read_text()) | {"prompts": prompts, "default_prompt_name": default}
    file.write_text(json.dumps(settings))
    theirs, encoder = peer(folder), ours(folder)
    assert_same(encoder.encode_queries(TEXTS[:5]), theirs.encode_query(TEXTS[:5]))
    assert_same(encoder.encode_documents(TEXTS[:5]), theirs.encode_document(TEXTS[:5]))


def layers(name: str) -> list[Any]:
    """Modules after the pooling, with random weights."""
    from sentence_transformers.base.modules import Dense, Normalize
    from sentence_transformers.sentence_transformer.modules import LayerNorm
    from torch import nn

    choices: dict[str, Callable[[], list[Any]]] = {
        "tanh": lambda: [Dense(32, 24), Normalize()],
        "two without bias": lambda: [
            Dense(32, 64, bias=False, activation_function=nn.Identity()),
            Dense(64, 32, bias=False, activation_function=nn.Identity()),
            Normalize(),
        ],
        "residual": lambda: [
            Dense(32, 32, activation_function=nn.GELU(), use_residual=True),
            Dense(32, 20, use_residual=True),
        ],
        "layer norm": lambda: [LayerNorm(32), Dense(32, 16, activation_function=nn.Sigmoid())],
        "normalized between": lambda: [Normalize(), Dense(32, 40)],
    }
    modules = choices[name]()
    for number, module in enumerate(modules):
        randomize(module, seed=number)
    return modules


@pytest.mark.parametrize("name", ["tanh", "two without bias", "residual", "layer norm", "normalized between"])
def test_layers_after_the_pooling_are_those_of_sentence_transformers(name: str, bert: Path, tmp_path: Path) -> None:
    folder = save_model(tmp_path, bert, pooling("mean"), *layers(name))
    encoder = ours(folder)
    assert_same(encoder.encode_texts(TEXTS), peer(folder).encode(TEXTS, batch_size=8))
    assert encoder.spec.d == encoder.spec.d_full == encoder.encode_texts(["a"]).shape[1]


def test_dense_weights_in_a_bin_file_are_read(bert: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    folder = save_model(tmp_path, bert, pooling("mean"), *layers("tanh"))
    expected = ours(folder).encode_texts(TEXTS)
    weights = folder / "2_Dense" / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    before = load_spec(folder).fingerprint
    weights.unlink()
    np.testing.assert_array_equal(ours(folder).encode_texts(TEXTS), expected)
    assert load_spec(folder).fingerprint != before


def test_the_models_own_truncation_is_that_of_sentence_transformers(bert: Path, tmp_path: Path) -> None:
    folder = save_model(tmp_path, bert, pooling("mean"), truncate_dim=12)
    spec = load_spec(folder)
    assert (spec.d, spec.d_full, spec.truncate_dim) == (12, 32, 12)
    assert_same(ours(folder).encode_texts(TEXTS), peer(folder).encode(TEXTS, batch_size=8))


def test_lower_casing_is_that_of_sentence_transformers(tmp_path: Path) -> None:
    config = FAMILIES["bert"][0]()
    cased = tokenizer_of("wordpiece", "<s> $A </s>", lower_case=False)
    transformer = save_transformer(tmp_path / "transformer", config, cased)
    folder = save_model(tmp_path / "model", transformer, pooling("mean"))
    plain = ours(folder).encode_texts(TEXTS)
    file = folder / "sentence_bert_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"do_lower_case": True}))
    found = ours(folder).encode_texts(TEXTS)
    assert_same(found, peer(folder).encode(TEXTS, batch_size=8))
    assert not np.allclose(found, plain)


def test_a_folder_of_an_older_release_with_the_transformer_in_a_sub_folder_is_read(bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(bert, folder / "0_Transformer")
    (folder / "0_Transformer/sentence_bert_config.json").write_text('{"max_seq_length": 24, "do_lower_case": false}')
    (folder / "1_Pooling").mkdir()
    flags = {"word_embedding_dimension": 32, "pooling_mode_max_tokens": True, "pooling_mode_cls_token": True}
    (folder / "1_Pooling/config.json").write_text(json.dumps(flags | {"pooling_mode_mean_tokens": True}))
    entries = [
        {"idx": n, "name": str(n), "path": f"{n}_{kind}", "type": f"sentence_transformers.models.{kind}"}
        for n, kind in enumerate(("Transformer", "Pooling", "Normalize"))
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    encoder = ours(folder)
    assert (encoder.spec.poolings, encoder.spec.max_seq_length) == (("cls", "max", "mean"), 24)
    assert_same(encoder.encode_texts(TEXTS), peer(folder).encode(TEXTS, batch_size=8))


def test_a_plain_folder_is_pooled_as_the_setting_says(bert: Path, tmp_path: Path) -> None:
    from sentence_transformers.base.modules import Normalize

    spec = configured_model(EncodeConfig(model=str(bert), pooling="mean, weightedmean", precision="float32"))
    assert (spec.poolings, spec.d) == (("mean", "weighted_mean"), 64)
    found = TextEncoder(EncodeConfig(precision="float32"), spec).encode_texts(TEXTS)
    folder = save_model(tmp_path, bert, pooling(("mean", "weighted_mean")), Normalize())
    assert_same(found, peer(folder).encode(TEXTS, batch_size=8))

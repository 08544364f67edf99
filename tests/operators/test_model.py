"""Model folders: what is found, what is refused, what the fingerprint covers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from operators.errors import ConfigError
from operators.model import load_spec, load_tokenizer, resolve_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Copy of the bundled model's settings and tokenizer with a few bytes for weights."""
    copy = tmp_path / "model"
    shutil.copytree(resolve_model("all-MiniLM-L6-v2"), copy, ignore=shutil.ignore_patterns("*.safetensors"))
    (copy / "model.safetensors").write_bytes(b"weights")
    return copy


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_bundled_model_is_found_under_both_names_and_as_a_folder() -> None:
    path = resolve_model("all-MiniLM-L6-v2")
    assert resolve_model("sentence-transformers/all-MiniLM-L6-v2") == path == resolve_model(str(path))
    spec = load_spec(path)
    assert (spec.pooling, spec.normalize, spec.max_seq_length, spec.max_positions, spec.d) == (
        "mean",
        True,
        256,
        512,
        384,
    )
    assert spec.name == "all-MiniLM-L6-v2"
    assert len(spec.fingerprint) == 64


@pytest.mark.parametrize("name", ["./no/such/folder", "/no/such/folder", "a/b/c", ""])
def test_name_that_is_neither_folder_nor_hub_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="not a hub name") as error:
        resolve_model(name)
    assert repr(name) in str(error.value)


def test_hub_name_that_cannot_be_had_is_refused_with_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="no folder nobody/nothing; the hub has not given 'nobody/nothing'"):
        resolve_model("nobody/nothing")


def test_fingerprint_covers_names_and_content_not_the_place(folder: Path, tmp_path: Path) -> None:
    before = load_spec(folder).fingerprint
    assert load_spec(shutil.copytree(folder, tmp_path / "elsewhere")).fingerprint == before
    (folder / "README.md").write_text("not part of the model")
    assert load_spec(folder).fingerprint == before
    seen = {before}
    for name in ("model.safetensors", "tokenizer.json", "1_Pooling/config.json", "vocab.txt"):
        file = folder / name
        file.write_bytes(file.read_bytes() + b" ")
        seen.add(load_spec(folder).fingerprint)
    assert len(seen) == 5


@pytest.mark.parametrize(
    "name", ["config.json", "sentence_bert_config.json", "tokenizer_config.json", "1_Pooling/config.json"]
)
def test_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ConfigError, match=f"{name} is missing"):
        load_spec(folder)


def test_missing_weights_are_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="must hold weights"):
        assert load_spec(folder).fingerprint


def test_unsupported_module_is_named(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    dense = {"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"}
    (folder / "modules.json").write_text(json.dumps([*modules, dense]))
    with pytest.raises(ConfigError, match=r"sentence_transformers\.models\.Dense"):
        load_spec(folder)


def test_two_poolings_and_document_prompts_are_refused(folder: Path) -> None:
    edit(folder / "1_Pooling/config.json", pooling_mode_cls_token=True)
    with pytest.raises(ConfigError, match="one pooling mode"):
        load_spec(folder)
    edit(folder / "1_Pooling/config.json", pooling_mode_mean_tokens=False)
    edit(folder / "config_sentence_transformers.json", prompts={"query": "query: ", "document": "passage: "})
    with pytest.raises(ConfigError, match="'document'"):
        load_spec(folder)


def test_newer_keys_and_query_prompt_are_read(folder: Path) -> None:
    (folder / "1_Pooling/config.json").write_text(json.dumps({"embedding_dimension": 384, "pooling_mode": "lasttoken"}))
    edit(folder / "config_sentence_transformers.json", prompts={"query": "query: ", "document": ""})
    (folder / "sentence_bert_config.json").write_text("{}")
    spec = load_spec(folder)
    assert (spec.pooling, spec.query_prompt, spec.max_seq_length) == ("last", "query: ", 512)


def test_plain_folder_needs_the_pooling_setting(folder: Path) -> None:
    (folder / "modules.json").unlink()
    with pytest.raises(ConfigError, match=r"set encode\.pooling"):
        load_spec(folder)
    assert load_spec(folder, pooling="cls").pooling == "cls"
    assert load_spec(folder, pooling="cls").fingerprint != load_spec(folder, pooling="mean").fingerprint
    with pytest.raises(ConfigError, match="got 'middle'"):
        load_spec(folder, pooling="middle")


def test_lower_case_setting_is_applied_to_the_tokenizer(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", do_lower_case=False)
    edit(folder / "sentence_bert_config.json", do_lower_case=True)
    tokenizer = load_tokenizer(load_spec(folder))
    assert tokenizer.encode("HELLO World").ids == tokenizer.encode("hello world").ids


def test_our_kernels_package_is_not_taken_for_another() -> None:
    code = "from transformers import AutoModel, utils; print(AutoModel.__name__, utils.is_kernels_available())"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["AutoModel", "False"]

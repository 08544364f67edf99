"""Model folders: what is found, what is refused before any work, what the fingerprint covers."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kernels.pool import MODES
from operators.encoding.model_folder import load_spec, resolve_model
from operators.encoding.module_layout import POOLINGS
from operators.encoding.tokenizer import load_tokenizer
from operators.errors import ConfigError
from tests.operators.encoding.tiny_models import FAMILIES, save_family, save_transformer, tokenizer_of

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with mean pooling and Normalize, as sentence-transformers saves it."""
    return save_family("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny, tmp_path / "model")


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def add_module(folder: Path, kind: str, config: dict[str, Any] | None) -> Path:
    """Puts a module between Pooling and Normalize; its folder, with config.json if there is one."""
    modules = json.loads((folder / "modules.json").read_text())
    modules.insert(2, {"idx": 2, "name": "2", "path": f"2_{kind}", "type": f"sentence_transformers.models.{kind}"})
    (folder / "modules.json").write_text(json.dumps(modules))
    if config is not None:
        (folder / f"2_{kind}").mkdir()
        (folder / f"2_{kind}" / "config.json").write_text(json.dumps(config))
    return folder / f"2_{kind}"


def write_weights(file: Path, shapes: dict[str, list[int]]) -> None:
    """A safetensors file of zeros."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        size = 4
        for n in shape:
            size *= n
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(end))


def test_bundled_model_is_found_under_both_names_and_as_a_folder() -> None:
    path = resolve_model("all-MiniLM-L6-v2")
    assert resolve_model("sentence-transformers/all-MiniLM-L6-v2") == path == resolve_model(str(path))
    spec = load_spec(path)
    assert (spec.poolings, spec.pooling, spec.normalize, spec.dense) == (("mean",), "mean", True, ())
    assert (spec.max_seq_length, spec.max_positions, spec.d, spec.truncate_dim) == (256, 512, 384, 0)
    assert (spec.model_type, spec.hidden_size, spec.num_layers) == ("bert", 384, 6)
    assert (spec.name, spec.revision, spec.query_prompt, spec.document_prompt) == ("all-MiniLM-L6-v2", "", "", "")
    assert len(spec.fingerprint) == 64
    assert pickle.loads(pickle.dumps(spec)) == spec


@pytest.mark.parametrize("name", ["./no/such/folder", "/no/such/folder", "a/b/c", ""])
def test_name_that_is_neither_folder_nor_hub_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="not a hub name") as error:
        resolve_model(name)
    assert repr(name) in str(error.value)


def test_hub_name_that_cannot_be_had_is_refused_with_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="no folder nobody/nothing; the hub has not given 'nobody/nothing'"):
        resolve_model("nobody/nothing")
    with pytest.raises(ConfigError, match="the hub has not given .*all-MiniLM-L6-v2' at revision 'v9'"):
        resolve_model("all-MiniLM-L6-v2", "v9")


def test_a_snapshot_of_the_hubs_cache_tells_its_name_and_revision(folder: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = shutil.copytree(folder, tmp_path / "models--some--model" / "snapshots" / commit)
    spec = load_spec(snapshot)
    assert (spec.name, spec.revision) == ("some/model", commit)
    assert spec.fingerprint == load_spec(folder).fingerprint  # the content counts, not where it comes from
    assert resolve_model(str(snapshot), "main") == snapshot
    with pytest.raises(ConfigError, match=r"encode\.revision must be empty for .* a local folder, got 'main'"):
        resolve_model(str(folder), "main")


def test_fingerprint_covers_names_and_content_not_the_place(folder: Path, tmp_path: Path) -> None:
    before = load_spec(folder).fingerprint
    assert load_spec(shutil.copytree(folder, tmp_path / "elsewhere")).fingerprint == before
    (folder / "README.md").write_text("not part of the model")
    assert load_spec(folder).fingerprint == before
    seen = {before}
    for name in ("tokenizer.json", "1_Pooling/config.json", "config_sentence_transformers.json", "model.safetensors"):
        content = (folder / name).read_bytes()
        weights = name.endswith(".safetensors")
        (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if weights else content + b" ")
        seen.add(load_spec(folder).fingerprint)
    assert len(seen) == 5


@pytest.mark.parametrize(
    "name",
    ["config.json", "sentence_bert_config.json", "tokenizer_config.json", "tokenizer.json", "1_Pooling/config.json"],
)
def test_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ConfigError, match=f"{name} is missing"):
        load_spec(folder)


def test_missing_folders_and_weights_are_named(folder: Path) -> None:
    (folder / "1_Pooling").rename(folder / "elsewhere")
    with pytest.raises(ConfigError, match="1_Pooling is missing"):
        load_spec(folder)
    (folder / "elsewhere").rename(folder / "1_Pooling")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="must hold weights .*found none"):
        load_spec(folder)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_weights(folder / "model-1.safetensors", {"a": [1]})
    with pytest.raises(ConfigError, match=r"1 of 2 named in .* missing, the first is model-2\.safetensors"):
        load_spec(folder)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda content: content[:-9], "must be whole: .* download the model again"),
        (lambda content: content[:100], "is not: download"),
        (lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "it is a Git LFS pointer"),
        (lambda content: struct.pack("<Q", 9) + b"[not json" + content, "the header of .* is damaged"),
        (lambda content: b"", "must be a safetensors file"),
    ],
)
def test_damaged_weights_are_refused(folder: Path, content: Callable[[bytes], bytes], reason: str) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(content(file.read_bytes()))
    with pytest.raises(ConfigError, match=reason):
        load_spec(folder)


@pytest.mark.parametrize(
    ("file", "changes", "reason"),
    [
        ("config.json", {"vocab_size": 600}, r"token embeddings must be \[600, 32\], got \[512, 32\]"),
        ("config.json", {"hidden_size": 64}, r"the pooling's width must be the model's \(64\), got 32"),
        ("config.json", {"hidden_size": None}, "config.json must say one of hidden_size"),
        ("config.json", {"max_position_embeddings": 128}, "position embeddings' rows must be 128, got 80"),
        ("config.json", {"num_hidden_layers": 12}, "the number of layers must be 12, got 3"),
        ("sentence_bert_config.json", {"max_seq_length": 512}, r"at most the model's positions \(80\), got 512"),
        ("sentence_bert_config.json", {"query_length": 32}, "query_length must not be set, got 32"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "must be feature-extraction, got 'fill-mask'"),
        ("sentence_bert_config.json", {"modality_config": {"message": {}}}, "without a chat template"),
        ("tokenizer_config.json", {"truncation_side": "left"}, "must truncate on the right, got 'left'"),
        ("1_Pooling/config.json", {"pooling_mode": "middle"}, "must be one or more of mean, .* got 'middle'"),
        ("config_sentence_transformers.json", {"default_prompt_name": "x"}, "one of the prompts .* got 'x'"),
    ],
)
def test_settings_that_do_not_fit_are_named(folder: Path, file: str, changes: dict[str, Any], reason: str) -> None:
    edit(folder / file, **changes)
    with pytest.raises(ConfigError, match=reason):
        load_spec(folder)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 512, "content": "<extra>"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="token '<extra>' has id 512, the model has 512 embeddings"):
        load_spec(folder)


def test_an_adapter_without_its_model_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="got an adapter"):
        load_spec(folder)


@pytest.mark.parametrize(
    ("kind", "config", "reason"),
    [
        ("Dense", None, "2_Dense is missing"),
        ("Dense", {"in_features": 64, "out_features": 8}, "must take the 32 dimensions before it, got 64"),
        ("Dense", {"in_features": 32, "out_features": 9}, r"linear.weight must be \[9, 32\], got \[8, 32\]"),
        ("Dense", {"in_features": 32, "out_features": 8, "bias": True}, r"linear.bias must be \[8\], got none"),
        ("Dense", {"in_features": 32, "out_features": 8, "activation_function": "os.Path"}, "got 'os.Path'"),
        ("Dense", {"in_features": 32, "out_features": 8, "module_input_name": "token_embeddings"}, "module_input_name"),
        ("WeightedLayerPooling", {}, r"sentence_transformers\.models\.WeightedLayerPooling"),
        ("Pooling", {}, "one Transformer, then one Pooling"),
    ],
)
def test_a_module_that_is_not_known_or_does_not_fit_is_named(
    folder: Path, kind: str, config: dict[str, Any] | None, reason: str
) -> None:
    added = add_module(folder, kind, config)
    if config is not None:
        write_weights(added / "model.safetensors", {"linear.weight": [8, 32]})
    with pytest.raises(ConfigError, match=reason):
        load_spec(folder)


def test_code_that_a_model_brings_is_refused_whatever_it_is_called(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["type"] = "custom_st.Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ConfigError, match=r"must be known ones, got custom_st\.Transformer"):
        load_spec(folder)


def test_poolings_are_read_in_both_spellings_and_those_of_the_kernel(folder: Path) -> None:
    assert set(POOLINGS) == set(MODES)
    file = folder / "1_Pooling/config.json"
    flags = {"word_embedding_dimension": 32, "pooling_mode_weightedmean_tokens": True, "pooling_mode_cls_token": True}
    for config, expected in (
        ({"embedding_dimension": 32, "pooling_mode": ["lasttoken", "mean"]}, ("last", "mean")),
        ({"embedding_dimension": 32, "pooling_mode": "mean_sqrt_len_tokens"}, ("mean_sqrt_len",)),
        (flags, ("cls", "weighted_mean")),
        ({"word_embedding_dimension": 32}, ("mean",)),
    ):
        file.write_text(json.dumps(config))
        spec = load_spec(folder)
        assert (spec.poolings, spec.d) == (expected, 32 * len(expected))


def test_plain_folder_needs_the_pooling_setting(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"encode\.pooling must be unset .* got 'cls' .* prescribes 'mean'"):
        load_spec(folder, pooling="cls")
    assert load_spec(folder, pooling="mean") == load_spec(folder)
    (folder / "modules.json").unlink()
    with pytest.raises(ConfigError, match=r"set encode\.pooling"):
        load_spec(folder)
    assert load_spec(folder, pooling="cls").pooling == "cls"
    assert load_spec(folder, pooling="cls,weightedmean").poolings == ("cls", "weighted_mean")
    assert load_spec(folder, pooling="cls").fingerprint != load_spec(folder, pooling="mean").fingerprint
    with pytest.raises(ConfigError, match=r"encode\.pooling must be one or more of .* got 'middle'"):
        load_spec(folder, pooling="middle")


@pytest.mark.parametrize(("name", "positions"), [("bert", 80), ("roberta", 78), ("llama", 80), ("t5", 0)])
def test_lengths_are_those_that_the_weights_can_take(name: str, positions: int, tmp_path: Path) -> None:
    config, kind, template, settings, _ = FAMILIES[name]
    made = save_transformer(tmp_path / name, config(), tokenizer_of(kind, template), **settings)
    spec = load_spec(made, pooling="mean")
    assert (spec.max_seq_length, spec.max_positions) == (48, positions or 48)
    edit(made / "tokenizer_config.json", model_max_length=1e30)
    if positions:
        assert load_spec(made, pooling="mean").max_seq_length == positions
    else:
        with pytest.raises(ConfigError, match="neither config.json nor tokenizer_config.json says how long"):
            load_spec(made, pooling="mean")
    edit(made / "tokenizer_config.json", model_max_length=4096)
    # Rotary and relative positions go on; a table of positions ends.
    longest = load_spec(made, pooling="mean").max_positions
    assert longest == (4096 if name in ("llama", "t5") else positions)


def test_lower_case_setting_is_applied_to_the_tokenizer(folder: Path) -> None:
    edit(folder / "sentence_bert_config.json", do_lower_case=True)
    spec = load_spec(folder)
    assert spec.lower_case
    tokenizer = load_tokenizer(spec)
    assert tokenizer.encode("HELLO World").ids == tokenizer.encode("hello world").ids


def test_model_folders_are_read_without_torch_and_transformers() -> None:
    absent = ("torch", "transformers", "numpy", "pyarrow", "ray")
    code = f"import operators.encoding.model_folder, sys; print([name for name in {absent} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_our_kernels_package_is_not_taken_for_another() -> None:
    code = "from transformers import AutoModel, utils; print(AutoModel.__name__, utils.is_kernels_available())"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["AutoModel", "False"]

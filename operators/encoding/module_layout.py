"""The modules of a folder in sentence-transformers layout: which ones, in which order, with which settings.

Class paths changed between versions of sentence-transformers, so a module is known by the last part of its path.
Standard library only.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from operators.encoding.weight_files import Shapes, read_json, weight_shapes
from operators.errors import ConfigError

# Those of kernels.pool; this file must not import torch.
POOLINGS = ("mean", "cls", "max", "last", "mean_sqrt_len", "weighted_mean")

# The names of sentence-transformers: flags of older folders, in the order in which it concatenates, and mode names.
_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weighted_mean",
    "pooling_mode_lasttoken": "last",
}
_POOLING_ALIASES = {
    "lasttoken": "last",
    "last_token": "last",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
}
_TRANSFORMER_CONFIGS = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
)
# Settings of a Transformer module that change its vectors in ways that are not reproduced here.
_REFUSED_SETTINGS = (
    "processing_kwargs",
    "query_length",
    "document_length",
    "query_expansion",
    "tokenizer_name_or_path",
    "config_args",
    "config_kwargs",
)
_PLAIN_TEXT = {"method": "forward", "method_output_name": "last_hidden_state"}


class Layer(NamedTuple):
    """One module between the pooling and the vector.

    kind: "dense" (path to its weights, sizes, bias, class name in torch.nn of its activation, whether it adds its
    input), "layer_norm" (path, equal sizes) or "normalize" (no path; one that another layer follows).
    """

    kind: str
    path: str
    in_features: int
    out_features: int
    bias: bool = False
    activation: str = "Identity"
    residual: bool = False


@dataclasses.dataclass(frozen=True)
class Layout:
    """What modules.json and the modules' settings say. settings: those of the Transformer module."""

    transformer_path: str
    settings: dict[str, Any]
    poolings: tuple[str, ...]
    include_prompt: bool
    layers: tuple[Layer, ...]
    normalize: bool


def parse_poolings(value: str, source: str) -> tuple[str, ...]:
    """Pooling names out of a comma-separated setting, in the spelling of `POOLINGS`. ConfigError names a wrong one."""
    names = [name.strip() for name in value.split(",")]
    poolings = tuple(_POOLING_ALIASES.get(name, name) for name in names)
    for name in poolings:
        if name not in POOLINGS:
            raise ConfigError(f"{source} must be one or more of {', '.join(POOLINGS)}, got {name!r}")
    return poolings


def read_layout(folder: Path, hidden_size_of: Any) -> Layout:
    """Layout of the folder. hidden_size_of(transformer folder) gives the width of its token states.

    Raises ConfigError that names a missing folder or file, a module that is not known or not in its place, a setting
    that is not reproduced, and sizes that do not fit each other.
    """
    file = folder / "modules.json"
    modules = read_json(file)
    kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
    known = ("Transformer", "Pooling", "Dense", "LayerNorm", "Normalize", "Dropout")
    for module, kind in zip(modules, kinds, strict=True):
        # A class of the model's own may be called like a known one and do something else.
        if kind not in known or not str(module["type"]).startswith("sentence_transformers."):
            raise ConfigError(
                f"a model's modules must be known ones, got {module['type']} ({file}): choose another model"
            )
        # Git does not keep an empty folder, and Normalize had no settings for years.
        if kind not in ("Normalize", "Dropout") and not (folder / module["path"]).is_dir():
            raise ConfigError(f"every module's folder must be there: {folder / module['path']} is missing ({file})")
    if kinds[:2] != ["Transformer", "Pooling"] or {"Transformer", "Pooling"} & set(kinds[2:]):
        raise ConfigError(
            f"a model must be one Transformer, then one Pooling, then Dense, LayerNorm or Normalize, got "
            f"{', '.join(kinds)} ({file}): choose another model"
        )
    transformer, pooling = modules[0]["path"], modules[1]["path"]
    settings = _transformer_settings(folder / transformer)
    pooling_file = folder / pooling / "config.json"
    pooling_config = read_json(pooling_file)
    poolings = _poolings(pooling_config, pooling_file)
    width = int(hidden_size_of(folder / transformer))
    stated = pooling_config.get("embedding_dimension", pooling_config.get("word_embedding_dimension", width))
    if int(stated) != width:
        raise ConfigError(f"the pooling's width must be the model's ({width}), got {stated} ({pooling_file})")
    layers: list[Layer] = []
    width *= len(poolings)
    for module, kind in zip(modules[2:], kinds[2:], strict=True):
        if kind != "Dropout":
            layers.append(_layer(folder, module["path"], kind, width))
            width = layers[-1].out_features
    normalize = bool(layers) and layers[-1].kind == "normalize"
    return Layout(
        transformer_path=transformer,
        settings=settings,
        poolings=poolings,
        include_prompt=bool(pooling_config.get("include_prompt", True)),
        layers=tuple(layers[:-1] if normalize else layers),
        normalize=normalize,
    )


def _transformer_settings(folder: Path) -> dict[str, Any]:
    file = next((folder / name for name in _TRANSFORMER_CONFIGS if (folder / name).is_file()), None)
    file = file or folder / _TRANSFORMER_CONFIGS[0]
    settings: dict[str, Any] = read_json(file)
    task = settings.get("transformer_task", "feature-extraction")
    if task != "feature-extraction":
        raise ConfigError(f"transformer_task must be feature-extraction, got {task!r} ({file}): choose another model")
    modalities = settings.get("modality_config")
    if modalities is not None and ("message" in modalities or modalities.get("text") != _PLAIN_TEXT):
        raise ConfigError(
            f"modality_config must be plain text to last_hidden_state, without a chat template, got {modalities} "
            f"({file}): choose another model"
        )
    for name in _REFUSED_SETTINGS:
        if settings.get(name):
            raise ConfigError(f"{name} must not be set, got {settings[name]!r} ({file}): choose another model")
    return settings


def _poolings(config: dict[str, Any], file: Path) -> tuple[str, ...]:
    named = config.get("pooling_mode")
    if named is None:
        return tuple(mode for flag, mode in _POOLING_FLAGS.items() if config.get(flag, False)) or ("mean",)
    return parse_poolings(named if isinstance(named, str) else ",".join(named), f"pooling_mode in {file}")


def _layer(folder: Path, path: str, kind: str, width: int) -> Layer:
    if kind == "Normalize":
        file = folder / path / "config.json"
        _on_vectors(read_json(file) if file.is_file() else {}, file)
        return Layer("normalize", "", width, width)
    file = folder / path / "config.json"
    config = read_json(file)
    _on_vectors(config, file)
    if kind == "LayerNorm":
        layer = Layer("layer_norm", path, int(config["dimension"]), int(config["dimension"]))
        expected: Shapes = {"norm.weight": (layer.in_features,), "norm.bias": (layer.in_features,)}
    else:
        layer = Layer(
            "dense",
            path,
            int(config["in_features"]),
            int(config["out_features"]),
            bool(config.get("bias", True)),
            _activation(str(config.get("activation_function", "torch.nn.modules.activation.Tanh")), file),
            bool(config.get("use_residual", False)),
        )
        expected = {"linear.weight": (layer.out_features, layer.in_features)}
        expected |= {"linear.bias": (layer.out_features,)} if layer.bias else {}
        if layer.residual and layer.in_features != layer.out_features:
            expected["residual.weight"] = (layer.out_features, layer.in_features)
    if layer.in_features != width:
        raise ConfigError(f"{kind} must take the {width} dimensions before it, got {layer.in_features} ({file})")
    shapes = weight_shapes(folder / path)
    for name, shape in expected.items():
        if shapes is not None and shapes.get(name) != shape:
            raise ConfigError(
                f"the weights must be those that config.json describes: {name} must be {list(shape)}, got "
                f"{list(shapes[name]) if name in shapes else 'none'} ({folder / path})"
            )
    return layer


def _on_vectors(config: dict[str, Any], file: Path) -> None:
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            raise ConfigError(f"{key} must be sentence_embedding, got {config[key]!r} ({file}): choose another model")


def _activation(name: str, file: Path) -> str:
    """Class name in torch.nn; anything else would mean to run code that the model brings."""
    if not name.startswith("torch.nn.") or not name.rpartition(".")[2].isidentifier():
        raise ConfigError(
            f"activation_function must be a class of torch.nn, got {name!r} ({file}): choose another model"
        )
    return name.rpartition(".")[2]

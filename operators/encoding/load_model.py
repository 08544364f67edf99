"""A transformers model as its own library runs it: the oracle of the packed pass, and what that is made of."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch

from operators.errors import ConfigError


def load_model(path: Path, num_layers: int = 0) -> Any:
    """The transformers model as its own library runs it, in float32; of its layers the first `num_layers` (0: all)."""
    model = _load(path)
    if num_layers:
        _leave_after(model, num_layers, path)
    return model


def _load(path: Path) -> Any:
    """The model in float32, in evaluation mode, without a head; of a T5 the encoder alone.

    Raises ConfigError for weights that are missing or of another shape than config.json says: transformers would fill
    them with random numbers.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING, MODEL_MAPPING

    try:
        config = transformers.AutoConfig.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError) as error:  # a family that it does not know, or code of the model's own
        raise ConfigError(
            f"the model must be one that transformers knows: {str(error).strip().splitlines()[0]} ({path})"
        ) from None
    if rope := _rope_types(config) & {"dynamic", "longrope"}:
        raise ConfigError(
            f"a text's vector must not depend on its batch, but this model's positions (rope type {', '.join(rope)}) depend"
            f" on the longest text of a batch: choose another model ({path})"
        )
    found: Any = MODEL_FOR_TEXT_ENCODING_MAPPING.get(type(config), None)
    if found is None or not found.__name__.endswith("EncoderModel"):
        found = MODEL_MAPPING.get(type(config), None)
    if found is None:
        raise ConfigError(
            f"the model must be a text encoder that transformers knows, got {config.model_type!r} ({path})"
        )
    kind: Any = found[0] if isinstance(found, tuple) else found
    arguments = {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(kind).parameters else {}
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, report = kind.from_pretrained(
            str(path), config=config, local_files_only=True, dtype=torch.float32, output_loading_info=True, **arguments
        )
    except OSError as error:
        raise ConfigError(
            f"the model's weights cannot be read: {str(error).strip().splitlines()[0]} ({path})"
        ) from None
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    for what in ("missing_keys", "mismatched_keys"):
        if keys := sorted(str(key) for key in report.get(what, ())):
            raise ConfigError(
                f"the weights must be those that config.json describes: {len(keys)} {what.replace('_', ' ')}, "
                f"the first is {keys[0]} ({path})"
            )
    return model.eval()


def _rope_types(config: Any) -> set[str]:
    """Kinds of rotary positions, of all kinds of layers."""
    settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    each = [settings, *(value for value in settings.values() if isinstance(value, dict))]
    return {str(value.get("rope_type") or value.get("type")) for value in each}


def position_base(model: Any) -> int | None:
    """Id of the padding token where positions are counted from it, as RoBERTa and its kin do; else None."""
    for module in model.modules():
        if hasattr(module, "create_position_ids_from_input_ids") and module.padding_idx is not None:
            return int(module.padding_idx)
    return None


def _leave_after(model: Any, num_layers: int, path: Path) -> None:
    """Cuts the model's list of layers."""
    total = int(model.config.num_hidden_layers)
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == total]
    if not 1 <= num_layers <= total:
        raise ConfigError(f"encode.num_layers must be in 1..{total} (the model's layers), got {num_layers} ({path})")
    if len(lists) != 1:
        raise ConfigError(f"encode.num_layers must be 0 for a model without one plain list of layers ({path})")
    del lists[0][num_layers:]
    model.config.num_hidden_layers = num_layers

"""What the weight files of a folder hold, by their headers alone: names and shapes, no numbers; and whether that is
what config.json says. Standard library only.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from operators.errors import ConfigError

Shapes = dict[str, tuple[int, ...]]

_NAMES = ("model.safetensors", "pytorch_model.bin")  # those that transformers and sentence-transformers look for
# How the families call a number in config.json, and their two tables in the weights.
_HIDDEN_SIZE = ("hidden_size", "d_model", "dim", "n_embd")
_NUM_LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
_TOKEN_TABLES = ("word_embeddings.weight", "tok_embeddings.weight", "embed_tokens.weight", "shared.weight")
POSITION_TABLE = "embeddings.position_embeddings.weight"
_LONGEST_HEADER = 100_000_000  # the format's own limit


def holds_weights(folder: Path) -> bool:
    """Whether the folder has weights that `weight_files` finds, or an index of them."""
    return any((folder / name).is_file() or (folder / f"{name}.index.json").is_file() for name in _NAMES)


def weight_files(folder: Path) -> list[Path]:
    """The weight files of one folder that are loaded: one, or the shards of an index; safetensors before .bin.

    Raises ConfigError that names what is missing: all weights, or a file that the index names.
    """
    for name in _NAMES:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set(read_json(index).get("weight_map", {}).values()))
            if absent := [shard for shard in shards if not (folder / shard).is_file()]:
                raise ConfigError(
                    f"every shard of the weights must be there: {len(absent)} of {len(shards)} named in {index} are "
                    f"missing, the first is {absent[0]}: download the model again"
                )
            return [folder / shard for shard in shards]
    raise ConfigError(f"the model folder must hold weights ({' or '.join(_NAMES)}), found none ({folder})")


def weight_shapes(folder: Path) -> Shapes | None:
    """Name and shape of every tensor in the folder's safetensors files; None for .bin weights, which have no header.

    Raises ConfigError that names a file that is missing, cut short or not what its name says.
    """
    shapes: Shapes = {}
    for file in weight_files(folder):
        if file.suffix != ".safetensors":
            return None
        shapes |= _header(file)
    return shapes


def hidden_size(folder: Path, config: dict[str, Any]) -> int:
    """Width of the token states that config.json states. Raises ConfigError if it does not."""
    for key in _HIDDEN_SIZE:
        if config.get(key):
            return int(config[key])
    raise ConfigError(f"config.json must say one of {', '.join(_HIDDEN_SIZE)}, got none ({folder / 'config.json'})")


def num_layers(config: dict[str, Any]) -> int:
    """Number of layers that config.json states, 0 if it does not."""
    return next((int(config[key]) for key in _NUM_LAYERS if config.get(key)), 0)


def check_weights(folder: Path, config: dict[str, Any], shapes: Shapes | None) -> int:
    """Rows of the token table, 0 if not known. Raises ConfigError where the weights' shapes contradict config.json."""
    stated = int(config.get("vocab_size") or 0)
    if shapes is None:
        return stated

    def refusal(what: str, expected: object, got: object) -> ConfigError:
        return ConfigError(
            f"the weights must be those that config.json describes: {what} must be {expected}, got {got} ({folder})"
        )

    width = int(config.get("embedding_size") or hidden_size(folder, config))
    table = next((shape for name, shape in shapes.items() if name.endswith(_TOKEN_TABLES)), None)
    if table is not None and table != ((stated or table[0]), width):
        raise refusal("the token embeddings", [stated or table[0], width], list(table))
    positions = next((shape for name, shape in shapes.items() if name.endswith(POSITION_TABLE)), None)
    stated_positions = int(config.get("max_position_embeddings") or 0)
    if positions is not None and stated_positions and positions[0] != stated_positions:
        raise refusal("the position embeddings' rows", stated_positions, positions[0])
    layers = {int(part) for name in shapes for part in name.split(".")[:-1] if part.isdigit()}
    # ALBERT's groups of layers share their weights.
    if layers and max(layers) + 1 < num_layers(config) and "num_hidden_groups" not in config:
        raise refusal("the number of layers", num_layers(config), max(layers) + 1)
    return table[0] if table is not None else stated


def _header(file: Path) -> Shapes:
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= min(size - 8, _LONGEST_HEADER):
            hint = " (it is a Git LFS pointer)" if start == b"version " else ""
            raise ConfigError(f"weights must be a safetensors file, {file} is not{hint}: download the model again")
        try:
            entries: dict[str, Any] = json.loads(opened.read(length))
            tensors = {name: entry for name, entry in entries.items() if name != "__metadata__"}
            shapes = {name: tuple(int(n) for n in entry["shape"]) for name, entry in tensors.items()}
            end = max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"weights must be a safetensors file, the header of {file} is damaged: {error}") from None
    if size != 8 + length + end:
        raise ConfigError(
            f"weights must be whole: {file} has {size} bytes, its header says {8 + length + end}: download the model again"
        )
    return shapes


def read_json(file: Path) -> Any:
    """Content of a JSON file of the model. Raises ConfigError that names it if it is missing or not JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"the model folder must hold {file.name}: {file} is missing") from None
    except ValueError as error:
        raise ConfigError(f"{file} must be JSON: {error}") from None

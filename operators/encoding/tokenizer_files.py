"""Tokenizer files of a folder, checked against its model without loading them. Standard library only."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from operators.encoding.weight_files import read_json
from operators.errors import ConfigError

_NO_LENGTH_LIMIT = 1_000_000  # transformers writes 1e30 for "no limit"
# What transformers makes a fast tokenizer from when there is no tokenizer.json.
_VOCABULARIES = (
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "tokenizer.model",
    "tekken.json",
)


def check_tokenizer(folder: Path, num_embeddings: int) -> int:
    """The longest sequence that tokenizer_config.json states, 0 for none.

    Raises ConfigError for a missing file, for truncation on the left (which would keep the end of a text), and for a
    vocabulary with ids beyond the model's `num_embeddings` (0: not known).
    """
    file = folder / "tokenizer_config.json"
    config: dict[str, Any] = read_json(file)
    side = config.get("truncation_side", "right")
    if side != "right":
        raise ConfigError(f"the tokenizer must truncate on the right, got {side!r} ({file})")
    whole = folder / "tokenizer.json"
    if whole.is_file():
        stat = whole.stat()
        largest, token = _largest_id(str(whole), stat.st_size, stat.st_mtime_ns)
        if num_embeddings and largest >= num_embeddings:
            raise ConfigError(
                f"the tokenizer must fit the model: token {token!r} has id {largest}, the model has {num_embeddings} "
                f"embeddings ({whole}): it belongs to another model"
            )
    elif not any((folder / name).is_file() for name in _VOCABULARIES):
        raise ConfigError(f"the model folder must hold tokenizer.json: {whole} is missing")
    limit = config.get("model_max_length")
    return int(limit) if limit is not None and 0 < limit < _NO_LENGTH_LIMIT else 0


@functools.lru_cache(maxsize=8)
def _largest_id(file: str, size: int, mtime_ns: int) -> tuple[int, str]:
    """Largest id and its token; parsed once a process as long as the file stays the same."""
    content = read_json(Path(file))
    vocab = (content.get("model") or {}).get("vocab") or {}
    pairs = vocab.items() if isinstance(vocab, dict) else ((token, n) for n, (token, *_) in enumerate(vocab))
    ids = {int(number): token for token, number in pairs}
    ids |= {int(added["id"]): added["content"] for added in content.get("added_tokens") or ()}
    return max(ids.items()) if ids else (-1, "")

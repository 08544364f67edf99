"""What a vector depends on: settings, model content, and the versions of the code that computes it."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

# Raised by hand whenever reading, chunking, encoding or the piece format changes what is written for the same input.
PIECE_CODE_VERSION = 2
# Likewise for training, codes and the run format.
INDEX_CODE_VERSION = 2

# numba compiles the attention of bfloat16 and the loops of int8.
_LIBRARIES = ("torch", "transformers", "tokenizers", "pyarrow", "numba")


def piece_fingerprint(settings: dict[str, Any], model_fingerprint: str) -> dict[str, Any]:
    """Fields that decide what a committed piece holds; compared field by field when a run is resumed."""
    libraries = {f"library.{name}": version(name).split("+")[0] for name in _LIBRARIES}
    return {**settings, **libraries, "model.fingerprint": model_fingerprint, "code.piece": PIECE_CODE_VERSION}


def index_fingerprint(piece_fields: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Fields that decide what is published from given sources."""
    faiss = {"library.faiss": version("faiss-cpu")}
    return {**piece_fields, **settings, **faiss, "code.index": INDEX_CODE_VERSION}

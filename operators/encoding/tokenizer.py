"""The tokenizer of a model folder, as sentence-transformers sets it up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from operators.encoding.model_folder import ModelSpec
from operators.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def load_tokenizer(spec: ModelSpec) -> Tokenizer:
    """The model's fast tokenizer as sentence-transformers sets it up, with padding and truncation off.

    It is private to the caller, who may set truncation on it.
    """
    from tokenizers.normalizers import Lowercase, Sequence
    from transformers import AutoTokenizer

    wrapper = AutoTokenizer.from_pretrained(str(spec.transformer_path), local_files_only=True)
    if not getattr(wrapper, "is_fast", False):
        raise ConfigError(
            f"the tokenizer must be a fast one (tokenizer.json), got {type(wrapper).__name__} ({spec.transformer_path})"
        )
    if wrapper.truncation_side != "right":
        raise ConfigError(
            f"the tokenizer must truncate on the right, got {wrapper.truncation_side!r} ({spec.transformer_path})"
        )
    tokenizer: Tokenizer = wrapper.backend_tokenizer
    if spec.lower_case:
        inner = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
        tokenizer.normalizer = Sequence([Lowercase(), *inner])
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer

"""How many tokens of a text are its prompt's: what pooling leaves out where a model's settings say so."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def prompt_length(tokenizer: Tokenizer, prompt: str) -> int:
    """Tokens before the text's own, special ones included, as sentence-transformers counts them.

    That is the length of the prompt by itself, less the special token that ends it (`include_prompt` of its Pooling).
    """
    encoding = tokenizer.encode(prompt)
    ends_special = len(encoding.ids) > 0 and encoding.special_tokens_mask[-1] == 1
    return len(encoding.ids) - int(ends_special)

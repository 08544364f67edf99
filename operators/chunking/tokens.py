"""A document's tokens behind the model's document prompt, and their places in its text.

Shapes: T tokens of the text (neither those of the prompt nor special ones).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from operators.encoding.model_folder import ModelSpec
from operators.encoding.prompts import prompt_length
from operators.encoding.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Encoding


Ids = npt.NDArray[np.int32]


class Chunk(NamedTuple):
    """Characters [start, end) of a document, and what its vector pools: tokens [pool_start, pool_end) of a sequence."""

    start: int
    end: int
    ids: Ids | None  # the sequence, special tokens and prompt included; None: that of the chunk before
    pool_start: int
    pool_end: int


@dataclasses.dataclass(frozen=True)
class DocumentTokens:
    """Tokens of prompt + text: ids[begin:end] are the text's, with character offsets into the text, the rest is added.

    A token that holds characters of both is the text's.
    """

    ids: Ids
    begin: int
    end: int
    starts_T: npt.NDArray[np.int64]
    ends_T: npt.NDArray[np.int64]

    @property
    def num_added(self) -> int:
        return len(self.ids) - (self.end - self.begin)

    def sequence(self, first: int, stop: int) -> Ids:
        """The text's tokens [first, stop) with what is added around them."""
        text = self.ids[self.begin + first : self.begin + stop]
        return np.concatenate([self.ids[: self.begin], text, self.ids[self.end :]])


class DocumentTokenizer:
    """The model's tokenizer for documents: every text is tokenized with `document_prompt` before it.

    pool_start: tokens at the front of a sequence that its vector leaves out (the prompt's, where the model says so).
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._tokenizer = load_tokenizer(spec)
        self.prompt = spec.document_prompt
        without_text = self._tokenizer.encode(self.prompt)
        self._ids_without_text = without_text.ids
        self.num_added = len(without_text.ids)  # special tokens and those of the prompt
        left_out = bool(self.prompt) and not spec.include_prompt
        self.pool_start = prompt_length(self._tokenizer, self.prompt) if left_out else 0

    def encode(self, texts: list[str], *, offsets: bool = False) -> list[Encoding]:
        """Prompt and text, tokenized; without `offsets` it is faster, but only the ids are right."""
        prompted = [self.prompt + text for text in texts] if self.prompt else texts
        return self._tokenizer.encode_batch(prompted) if offsets else self._tokenizer.encode_batch_fast(prompted)

    def whole(self, text: str, encoding: Encoding) -> list[Chunk]:
        """The chunk over a text that is one sequence by itself; none for a text without tokens."""
        ids = encoding.ids
        if len(ids) == self.num_added and ids == self._ids_without_text:
            return []
        length = len(ids)
        return [Chunk(0, len(text), np.array(ids, np.int32), self.pool_start and self.first_pooled(length), length)]

    def placed(self, encoding: Encoding) -> DocumentTokens:
        """The tokens of an encoding with offsets, and their places in its text, which has more tokens than none."""
        content = np.flatnonzero(np.array(encoding.special_tokens_mask) == 0)
        begin, end = int(content[0]), int(content[-1]) + 1
        offsets = np.array(encoding.offsets[begin:end], dtype=np.int64) - len(self.prompt)
        num_prompt = int(np.argmax(offsets[:, 1] > 0)) if self.prompt else 0  # 0 also when none is: all the text's
        offsets_T2 = np.maximum(offsets[num_prompt:], 0)
        ids = np.array(encoding.ids, dtype=np.int32)
        return DocumentTokens(ids, begin + num_prompt, end, offsets_T2[:, 0], offsets_T2[:, 1])

    def place(self, text: str) -> DocumentTokens:
        """The tokens of a text that has some, and their places in it."""
        return self.placed(self.encode([text], offsets=True)[0])

    def first_pooled(self, pool_end: int) -> int:
        """Where a span that begins with its sequence and ends at `pool_end` starts; it is never empty."""
        return min(self.pool_start, pool_end - 1)

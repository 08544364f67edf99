"""Where a text may be cut: between which of its tokens, and which of these places is the best one.

Shapes: T tokens of the text. A cut is the number of the token behind it, in 1..T-1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from operators.chunking.tokens import DocumentTokens

_SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s)|[。！？]+[」』”’）]*|\n+")


class Cuts:
    """The cuts of a text. A sentence's end is better than a word's, and that better than a cut inside a word.

    starts_T, ends_T: character offsets of the tokens; ends never decrease. A cut is *clean* when all tokens before it
    end before all behind it begin: the two sides share no character. (A character may have several tokens: bytes,
    Korean jamo, what NFKC makes of a ligature.)
    """

    def __init__(self, text: str, tokens: DocumentTokens) -> None:
        self._text = text
        self.num_tokens = len(tokens.starts_T)
        self.ends_T = np.maximum.accumulate(tokens.ends_T)
        has_characters_T = tokens.ends_T > tokens.starts_T
        self.starts_T = np.where(has_characters_T, tokens.starts_T, self.ends_T)
        clean_T = np.zeros(self.num_tokens, dtype=np.bool_)
        clean_T[1:] = np.minimum.accumulate(self.starts_T[::-1])[::-1][1:] >= self.ends_T[:-1]
        clean_T &= has_characters_T & (np.cumsum(has_characters_T) > 1)  # no side of a cut is without characters
        self._clean_T = clean_T
        self._clean = np.flatnonzero(clean_T)
        after = np.array([match.end() for match in _SENTENCE_END.finditer(text)], dtype=np.int64)
        tokens_before = np.searchsorted(np.maximum.accumulate(self.starts_T), after)
        tokens_before = tokens_before[tokens_before < self.num_tokens]
        self._sentences = tokens_before[clean_T[tokens_before]]

    def span(self, first: int, stop: int) -> tuple[int, int]:
        """Characters of the tokens [first, stop)."""
        return int(self.starts_T[first]), int(self.ends_T[stop - 1])

    def begins_word(self, token: int) -> bool:
        """Whether a gap or white space stands before the token, or the token itself begins with white space."""
        start = int(self.starts_T[token])
        return token == 0 or start > self.ends_T[token - 1] or (start < len(self._text) and self._text[start].isspace())

    def last(self, low: int, high: int) -> int | None:
        """The last sentence's end in low+1..high, else the last word's, else the last clean cut; None: there is none."""
        sentences = _within(self._sentences, low + 1, high)
        if len(sentences):
            return int(sentences[-1])
        return self._first_word_or_clean(reversed(_within(self._clean, low + 1, high).tolist()))

    def nearest(self, target: int, low: int, high: int) -> int | None:
        """The sentence's end in low..high that is nearest to `target`, else a word's, else a clean cut, else None."""
        candidates = _within(self._sentences, low, high)
        if len(candidates):
            return int(candidates[np.argmin(np.abs(candidates - target))])
        candidates = _within(self._clean, low, high)
        return self._first_word_or_clean(candidates[np.argsort(np.abs(candidates - target), kind="stable")].tolist())

    def following(self, token: int) -> int:
        """The first clean cut behind `token`, else the end of the text."""
        at = int(np.searchsorted(self._clean, token, side="right"))
        return int(self._clean[at]) if at < len(self._clean) else self.num_tokens

    def _first_word_or_clean(self, cuts: Iterable[int]) -> int | None:
        first = None
        for cut in cuts:
            if self.begins_word(cut):
                return cut
            first = cut if first is None else first
        return first


def _within(cuts: npt.NDArray[np.int64], low: int, high: int) -> npt.NDArray[np.int64]:
    """The sorted `cuts` that lie in low..high."""
    return cuts[np.searchsorted(cuts, low) : np.searchsorted(cuts, high, side="right")]

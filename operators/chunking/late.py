"""Late chunking: a document goes through the model as one sequence, and each chunk pools its own tokens of it.

A document beyond the model's length becomes several sequences that overlap; docs/decisions/0010 says how they are laid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from operators.chunking.cuts import Cuts
from operators.chunking.tokens import Chunk, DocumentTokenizer, DocumentTokens, Ids

DEFAULT_CHUNK_TOKENS = 128
# Poolings of one token: most chunks hold no first or last token of a sequence, so their vectors would be those of
# tokens that were never trained to stand for a text.
SINGLE_TOKEN_POOLINGS = ("cls", "last")


@dataclasses.dataclass(frozen=True)
class _Sequence:
    """Tokens [first, stop) of the text that share a sequence; those in [own_first, own_stop) are pooled from it."""

    first: int
    stop: int
    own_first: int
    own_stop: int


def late_chunks(
    tokenizer: DocumentTokenizer,
    text: str,
    tokens: DocumentTokens,
    max_tokens: int,
    context_tokens: int,
    overlap_tokens: int,
) -> tuple[list[Chunk], int]:
    """Chunks of a text, and the number of its tokens that are in none of them.

    max_tokens: of the text, in a chunk. context_tokens: of a sequence, prompt and special ones included.
    The first chunk of a sequence carries it. Chunks are in order and share no character; each token of the text is
    pooled by exactly one chunk, unless one character has more tokens than a sequence can hold. A span that begins
    (ends) with its sequence's text also takes what was added before (behind) it.
    """
    cuts = Cuts(text, tokens)
    chunks: list[Chunk] = []
    num_left_out = 0
    for sequence in _sequences(cuts, max(1, context_tokens - tokens.num_added), overlap_tokens):
        ids: Ids | None = tokens.sequence(sequence.first, sequence.stop)
        length = tokens.num_added + sequence.stop - sequence.first
        for first, stop in _spans(cuts, sequence.own_first, sequence.own_stop, max_tokens):
            num_left_out += max(0, stop - sequence.stop)
            before = tokens.begin - sequence.first
            pool_end = length if stop >= sequence.stop else before + stop
            pool_start = tokenizer.first_pooled(pool_end) if first == sequence.first else before + first
            chunks.append(Chunk(*cuts.span(first, stop), ids, pool_start, pool_end))
            ids = None
    if len(chunks) == 1:
        chunks = [chunks[0]._replace(start=0, end=len(text))]
    return chunks, num_left_out


def _sequences(cuts: Cuts, budget: int, overlap: int) -> Iterator[_Sequence]:
    """Sequences of at most `budget` tokens of the text whose own tokens follow each other without gap or overlap.

    Behind and before its own tokens a sequence has about half of `overlap` as context.
    """
    margin = overlap // 2
    first = own_first = 0
    while cuts.num_tokens - first > budget:
        own_budget = budget - margin
        own_stop = cuts.last(max(own_first, first + 2 * own_budget // 3), first + own_budget)
        own_stop = own_stop or cuts.last(own_first, first + budget)
        if own_stop is None and first < own_first:  # a character with very many tokens: without the context before it
            first = own_first
            continue
        if own_stop is None:
            own_stop = cuts.following(first + budget)
        stop = first + budget
        if own_stop + margin < stop:
            stop = cuts.nearest(stop, own_stop + margin, stop) or stop
        yield _Sequence(first, stop, own_first, own_stop)
        target = max(first, own_stop - margin)
        own_first = own_stop
        first = cuts.nearest(target, max(first, target - margin // 2), target + margin // 2) or target
    if own_first < cuts.num_tokens:
        yield _Sequence(first, cuts.num_tokens, own_first, cuts.num_tokens)


def _spans(cuts: Cuts, first: int, stop: int, max_tokens: int) -> Iterator[tuple[int, int]]:
    """Tokens [first, stop) in spans of at most `max_tokens`, more only where a single character has more.

    The last two share what is left when that is little more than one: a chunk of a few tokens finds nothing.
    """
    while stop - first > max_tokens:
        left = stop - first
        cut = (
            cuts.nearest(first + left // 2, stop - max_tokens, first + max_tokens)
            if 2 * left <= 3 * max_tokens
            else None
        )
        cut = cut or cuts.last(first + 2 * max_tokens // 3, first + max_tokens) or cuts.last(first, first + max_tokens)
        cut = cut or cuts.following(first + max_tokens)
        if cut >= stop:
            break
        yield first, cut
        first = cut
    if first < stop:
        yield first, stop

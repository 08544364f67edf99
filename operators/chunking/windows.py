"""Documents cut in overlapping windows, each tokenized by itself."""

from __future__ import annotations

from operators.chunking.cuts import Cuts
from operators.chunking.tokens import Chunk, DocumentTokenizer, DocumentTokens

Span = tuple[int, int]  # character offsets [start, end)


def window_chunks(
    tokenizer: DocumentTokenizer, text: str, max_tokens: int, overlap_tokens: int
) -> tuple[list[Chunk], int]:
    """Chunks of a text with more tokens than `max_tokens`, and the number of tokens that are in none of them.

    A chunk has at most `max_tokens` tokens, those of the prompt and special ones included, and they are what
    tokenizing its own text behind the prompt gives. Every character of a token lies in a chunk; tokens are left out
    where one character has more of them than a chunk can hold.
    """
    tokens = tokenizer.place(text)
    spans = _windows(text, tokens, max(1, max_tokens - tokens.num_added), overlap_tokens)
    fitted = [_fit(tokenizer, text, span, max_tokens) for span in spans]
    return [chunk for chunks, _ in fitted for chunk in chunks], sum(num_left_out for _, num_left_out in fitted)


def truncated_chunk(tokenizer: DocumentTokenizer, text: str, max_tokens: int) -> tuple[Chunk, int]:
    """The chunk of the first tokens of `text`, `max_tokens` with what is added, and the number of tokens left out."""
    tokens = tokenizer.place(text)
    num_kept = max(1, max_tokens - tokens.num_added)
    num_left_out = len(tokens.ends_T) - num_kept
    ids = tokens.sequence(0, num_kept)
    end = max(1, int(tokens.ends_T[:num_kept].max()))  # a first token may be a mark without characters
    return Chunk(0, end, ids, tokenizer.first_pooled(len(ids)), len(ids)), num_left_out


def _windows(text: str, tokens: DocumentTokens, budget: int, overlap: int) -> list[Span]:
    """Spans of a text that hold at most `budget` of its tokens each and together all of them."""
    cuts = Cuts(text, tokens)
    num_tokens = cuts.num_tokens
    spans: list[Span] = []
    first = 0
    while True:
        stop = min(first + budget, num_tokens)
        if stop < num_tokens:
            stop = cuts.last(first + 2 * budget // 3, stop) or stop
        span = cuts.span(first, stop)
        if not spans or span != spans[-1]:  # a character may have more tokens than a chunk
            spans.append(span)
        if stop == num_tokens:
            return spans
        first = next((token for token in range(stop - overlap, stop) if cuts.begins_word(token)), stop - overlap)


def _fit(tokenizer: DocumentTokenizer, text: str, span: Span, max_tokens: int) -> tuple[list[Chunk], int]:
    """Chunks of a window, and tokens left out. One with more tokens by itself than in its document is cut further."""
    start, end = span
    [encoding] = tokenizer.encode([text[start:end]])
    if len(encoding) <= max_tokens:
        return [chunk._replace(start=start, end=end) for chunk in tokenizer.whole(text[start:end], encoding)], 0
    tokens = tokenizer.place(text[start:end])
    cuts = Cuts(text[start:end], tokens)
    budget = max_tokens - tokens.num_added
    cut = cuts.last(2 * budget // 3, budget) or cuts.last(0, budget) or cuts.following(0)
    if cut == cuts.num_tokens:  # one character with more tokens than a chunk can hold
        chunk, num_left_out = truncated_chunk(tokenizer, text[start:end], max_tokens)
        return [chunk._replace(start=start, end=end)], num_left_out
    halves = [(start, start + cuts.span(0, cut)[1]), (start + cuts.span(cut, cuts.num_tokens)[0], end)]
    fitted = [_fit(tokenizer, text, half, max_tokens) for half in halves]
    return [chunk for chunks, _ in fitted for chunk in chunks], sum(num_left_out for _, num_left_out in fitted)

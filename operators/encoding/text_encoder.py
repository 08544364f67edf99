"""Texts and token ids in, vectors out, for chunks and for queries alike.

Imports numpy, torch and transformers only, so that it runs on a bare GPU machine.
Shapes: N vectors, S sequences, T tokens of a batch, D vector dimension.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from operators.encoding.encode_config import EncodeConfig, resolve_device, resolve_precision
from operators.encoding.forward import ForwardPass
from operators.encoding.head import Head
from operators.encoding.model_folder import ModelSpec
from operators.encoding.prompts import prompt_length
from operators.encoding.tokenizer import load_tokenizer
from operators.errors import ResourceError

Ints = npt.NDArray[np.int64]
Ids = Sequence[Sequence[int] | npt.NDArray[np.int32]] | tuple[npt.NDArray[Any], npt.NDArray[Any]]

# Texts that are tokenized together, while those before them are encoded.
TEXTS_AT_ONCE = 4096


class NonFiniteVectorError(ValueError):
    """A vector holds NaN or an infinity; `index` is the first such vector in the caller's order."""

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index

    def __reduce__(self) -> tuple[type[NonFiniteVectorError], tuple[int, str]]:
        return NonFiniteVectorError, (self.index, str(self))


@dataclasses.dataclass(frozen=True)
class Spans:
    """What is pooled: vector n from tokens [start_N[n], end_N[n]) of sequence sequence_N[n], which ascend. int64 [N]."""

    sequence_N: Ints
    start_N: Ints
    end_N: Ints


class TextEncoder:
    """Encoder of token ids and of texts. The constructor is cheap; `setup` loads the model and may be called twice.

    spec: from `configured_model`. The same list of sequences gives the same bits for the same precision, `batch_tokens`,
    threads and device: batches are formed from the list alone. (After a CUDA out-of-memory error `batch_tokens` of the
    object is halved, which changes rounding.) `attention` and `attention_reason` say after `setup` whether batches are
    packed, and why not.
    """

    attention: str
    attention_reason: str

    def __init__(self, config: EncodeConfig, spec: ModelSpec) -> None:
        self.config = config
        self.spec = spec
        self.batch_tokens = config.batch_tokens
        self._forward: ForwardPass | None = None
        self._tokenizer: Any = None

    def setup(self) -> None:
        """Loads the weights in the resolved precision. Sets the number of torch threads of this process."""
        if self._forward is not None:
            return
        torch.set_num_threads(self.config.threads_per_worker)
        device = resolve_device(self.config)
        forward = ForwardPass(
            self.spec.transformer_path,
            device=device,
            precision=resolve_precision(self.config),
            attention=self.config.attention,
            num_layers=self.config.num_layers,
        )
        self._head = Head(self.spec, device)
        self.attention, self.attention_reason = forward.attention, forward.attention_reason
        self._forward = forward

    def warm(self, most_tokens: int, within_s: float) -> None:
        """`setup`, and all that the first batches of up to so many tokens would wait for, as long as time is left."""
        self.encode_queries(["how does a search begin"])
        assert self._forward is not None
        self._forward.warm(most_tokens, within_s)

    def encode_queries(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """[N, D] float32 vectors of queries, each with the query prompt before it."""
        return self._encode(texts, self.spec.query_prompt, 0)

    def encode_documents(self, texts: Sequence[str], max_tokens: int = 0) -> npt.NDArray[np.float32]:
        """[N, D] float32 vectors of documents, each with the document prompt before it; truncated as `encode_texts`."""
        return self._encode(texts, self.spec.document_prompt, max_tokens)

    def encode_texts(self, texts: Sequence[str], max_tokens: int = 0) -> npt.NDArray[np.float32]:
        """[N, D] float32 vectors of the bare texts, each truncated to `max_tokens` (0: the model's max_seq_length)."""
        return self._encode(texts, "", max_tokens)

    def encode_ids(self, ids: Ids, spans: Spans | None = None) -> npt.NDArray[np.float32]:
        """[N, D] float32 vectors, C order; unit length if the model normalises.

        ids: S sequences of token ids, special tokens included, or (flat int array, S+1 offsets into it). spans: what
        each vector pools; None: one vector of each sequence, of all its tokens.
        Equal sequences are computed once. Raises ValueError that names the first sequence that is empty or longer than
        the model takes, or the first span outside of its sequence, and NonFiniteVectorError that names the first vector
        with NaN or an infinity.
        """
        self.setup()
        if torch.get_num_threads() != self.config.threads_per_worker:
            torch.set_num_threads(self.config.threads_per_worker)
        flat, offsets = _flatten(ids)
        lengths_S = np.diff(offsets)
        self._check_lengths(lengths_S)
        if spans is None:
            spans = Spans(np.arange(len(lengths_S)), np.zeros(len(lengths_S), np.int64), lengths_S)
        _check_spans(spans, lengths_S)
        unique, stands_for_S = _unique_sequences(flat, offsets)
        vectors_ND = np.empty((len(spans.sequence_N), self.spec.d), dtype=np.float32)
        # Spans by the sequence that is computed for theirs.
        computed_N = stands_for_S[spans.sequence_N]
        by_sequence = np.argsort(computed_N, kind="stable")
        first_span = np.searchsorted(computed_N[by_sequence], np.arange(len(lengths_S) + 1))
        order = unique[
            np.argsort(-lengths_S[unique], kind="stable")
        ]  # the longest first: memory peaks in the first batch
        begin = 0
        while begin < len(order):
            batch = order[begin : begin + self._batch_size(lengths_S[order[begin:]])]
            of_batch = [by_sequence[first_span[s] : first_span[s + 1]] for s in batch.tolist()]
            try:
                self._encode_batch(flat, offsets, batch, of_batch, spans, vectors_ND)
            except torch.OutOfMemoryError as error:
                self._halve_budget(len(batch), int(lengths_S[batch[0]]), error)
                continue
            begin += len(batch)
        self._check_finite(vectors_ND, spans, lengths_S)
        return vectors_ND

    def _encode(self, texts: Sequence[str], prompt: str, max_tokens: int) -> npt.NDArray[np.float32]:
        """Tokenizes the next texts in a thread of its own while the model works on the ones before."""
        self.setup()
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.spec)
        self._tokenizer.enable_truncation(max_tokens or self.spec.max_seq_length)
        skipped = prompt_length(self._tokenizer, prompt) if prompt and not self.spec.include_prompt else 0
        found = [self.encode_ids(ids, _after_prompt(ids, skipped)) for ids in self._tokenized(texts, prompt)]
        return np.concatenate(found) if found else np.empty((0, self.spec.d), dtype=np.float32)

    def _tokenized(self, texts: Sequence[str], prompt: str) -> Iterator[tuple[Ints, Ints]]:
        def tokenize(begin: int) -> tuple[Ints, Ints]:
            block = [prompt + text for text in texts[begin : begin + TEXTS_AT_ONCE]]
            return _flatten([encoding.ids for encoding in self._tokenizer.encode_batch_fast(block)])

        if len(texts) <= TEXTS_AT_ONCE:  # a query would take longer to start a thread than to be tokenized
            if texts:
                yield tokenize(0)
            return
        with ThreadPoolExecutor(1) as ahead:
            following = ahead.submit(tokenize, 0)
            for begin in range(0, len(texts), TEXTS_AT_ONCE):
                ids = following.result()
                if begin + TEXTS_AT_ONCE < len(texts):
                    following = ahead.submit(tokenize, begin + TEXTS_AT_ONCE)
                yield ids

    def _batch_size(self, lengths_S: Ints) -> int:
        """How many of the sequences, longest first, fit into the token budget; at least one."""
        if self.attention == "packed":
            return max(1, int(np.searchsorted(np.cumsum(lengths_S), self.batch_tokens, side="right")))
        return max(1, self.batch_tokens // int(lengths_S[0]))

    def _encode_batch(
        self, flat: Ints, offsets: Ints, batch: Ints, of_batch: list[Ints], spans: Spans, vectors_ND: npt.NDArray[Any]
    ) -> None:
        assert self._forward is not None
        bounds = np.concatenate([[0], np.cumsum(offsets[batch + 1] - offsets[batch])])
        flat_T = np.concatenate([flat[offsets[s] : offsets[s + 1]] for s in batch.tolist()])
        wanted = np.concatenate(of_batch)
        shift = np.repeat(bounds[:-1], [len(spans_of) for spans_of in of_batch])
        with torch.inference_mode():
            states_TH = self._forward(flat_T, bounds)
            start_N, end_N = spans.start_N[wanted], spans.end_N[wanted]
            full_ND = self._head(states_TH, shift + start_N, shift + end_N, positions_S=start_N)
            kept_ND = full_ND[:, : self.spec.d]
            if self.spec.normalize and self.spec.d < full_ND.shape[1]:
                kept_ND = torch.nn.functional.normalize(kept_ND, dim=1)
            vectors_ND[wanted] = kept_ND.cpu().numpy()

    def _halve_budget(self, num_sequences: int, longest: int, error: BaseException) -> None:
        if num_sequences == 1:
            raise ResourceError(
                f"the device has no memory for a single text of {longest} tokens ({self.spec.name}); use a larger device,"
                " a smaller chunk.max_tokens or encode.precision=bfloat16"
            ) from error
        self.batch_tokens = max(1, self.batch_tokens // 2)
        torch.cuda.empty_cache()

    def _check_lengths(self, lengths_S: Ints) -> None:
        bad = np.flatnonzero((lengths_S < 1) | (lengths_S > self.spec.max_positions))
        if len(bad):
            raise ValueError(
                f"a sequence must have 1..{self.spec.max_positions} tokens (limit of {self.spec.name}), "
                f"got {lengths_S[bad[0]]} in sequence {bad[0]}"
            )

    def _check_finite(self, vectors_ND: npt.NDArray[np.float32], spans: Spans, lengths_S: Ints) -> None:
        bad = np.flatnonzero(~np.isfinite(vectors_ND).all(axis=1))
        if len(bad):
            index = int(bad[0])
            sequence = int(spans.sequence_N[index])
            raise NonFiniteVectorError(
                index,
                f"vectors must be finite: vector {index} of {len(vectors_ND)} ({lengths_S[sequence]} tokens) has NaN "
                f"or infinity ({len(bad)} in all); try encode.precision=float32 or check {self.spec.path}",
            )


def _after_prompt(ids: tuple[Ints, Ints], skipped: int) -> Spans | None:
    """Spans without the first tokens of each sequence, which are the prompt's; a sequence of nothing else keeps its last."""
    if not skipped:
        return None
    lengths_S = np.diff(ids[1])
    return Spans(np.arange(len(lengths_S)), np.minimum(skipped, lengths_S - 1), lengths_S)


def _check_spans(spans: Spans, lengths_S: Ints) -> None:
    sequence_N, start_N, end_N = spans.sequence_N, spans.start_N, spans.end_N
    known_N = (sequence_N >= 0) & (sequence_N < len(lengths_S))
    wrong_N = ~known_N
    wrong_N[known_N] = (
        (start_N[known_N] < 0)
        | (end_N[known_N] <= start_N[known_N])
        | (end_N[known_N] > lengths_S[sequence_N[known_N]])
    )
    if wrong_N.any():
        n = int(np.argmax(wrong_N))
        raise ValueError(
            f"a span must hold at least one token of its sequence, got {start_N[n]}..{end_N[n]} of sequence "
            f"{sequence_N[n]} in span {n}"
        )


def _unique_sequences(flat: Ints, offsets: Ints) -> tuple[Ints, Ints]:
    """The first of each set of equal sequences, int64 [U], and for each sequence the one that stands for it, int64 [S]."""
    first_of: dict[bytes, int] = {}
    bounds = offsets.tolist()
    stands_for = [
        first_of.setdefault(flat[begin:end].tobytes(), number)
        for number, (begin, end) in enumerate(itertools.pairwise(bounds))
    ]
    return np.fromiter(first_of.values(), np.int64, len(first_of)), np.array(stands_for, dtype=np.int64)


def _flatten(ids: Ids) -> tuple[Ints, Ints]:
    if isinstance(ids, tuple):
        flat, offsets = ids
        return np.asarray(flat, dtype=np.int64), np.asarray(offsets, dtype=np.int64)
    offsets = np.zeros(len(ids) + 1, dtype=np.int64)
    np.cumsum([len(sequence) for sequence in ids], out=offsets[1:])
    parts = [np.asarray(sequence, dtype=np.int64) for sequence in ids]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64), offsets

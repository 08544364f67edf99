"""Token ids in, vectors out: the model's forward pass, for chunks and for queries alike.

Imports numpy, torch and transformers only, so that it runs on a bare GPU machine.
Shapes: N sequences, B sequences of a batch, T padded tokens, D vector dimension.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from operators.errors import ConfigError
from operators.model import ModelSpec, load_tokenizer
from operators.settings import operational, semantic

Ids = Sequence[Sequence[int] | npt.NDArray[np.int32]] | tuple[npt.NDArray[Any], npt.NDArray[Any]]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class EncodeConfig:
    """Section `encode` of the configuration."""

    model: str = operational("all-MiniLM-L6-v2", "folder or hub name; the content's fingerprint counts, not the name")
    pooling: str = semantic("", "how to pool a plain transformers folder; empty: as the model's own settings say")
    precision: str = semantic("auto", "auto, float32 or bfloat16")
    batch_tokens: int = semantic(4096, "padded tokens of a forward pass; what shares a batch changes the rounding")
    threads_per_worker: int = semantic(1, "CPU threads of an encoder; their number changes the rounding")
    device: str = operational("auto", "auto, cpu or cuda")
    workers: int = operational(0, "encoders side by side; 0: as many as fit")

    def __post_init__(self) -> None:
        for name, allowed in (("precision", ("auto", *_DTYPES)), ("device", ("auto", "cpu", "cuda"))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"encode.{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name, least in (("batch_tokens", 1), ("threads_per_worker", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"encode.{name} must be at least {least}, got {getattr(self, name)}")


class NonFiniteVectorError(ValueError):
    """A vector holds NaN or an infinity; `index` is the first such sequence in the caller's order."""

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index


def resolve_device(config: EncodeConfig) -> str:
    """`cuda` or `cpu`. ConfigError when CUDA is asked for and absent."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("encode.device must be auto or cpu on a machine without a CUDA device, got 'cuda'")
    return "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"


def resolve_precision(config: EncodeConfig) -> str:
    """`float32` or `bfloat16`; `auto` is bfloat16 where this machine's device multiplies it in hardware."""
    if config.precision != "auto":
        return config.precision
    if resolve_device(config) == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float32"
    capabilities = torch.cpu.get_capabilities()
    fast = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    return "bfloat16" if fast else "float32"


class TextEncoder:
    """Encoder of token ids and of texts. The constructor is cheap; `setup` loads the model and may be called twice.

    The same list of sequences gives the same bits for the same precision, `batch_tokens`, threads and device: batches
    are formed from the list alone. (After a CUDA out-of-memory error batches are halved, which may change rounding.)
    """

    def __init__(self, config: EncodeConfig, spec: ModelSpec) -> None:
        self.config = config
        self.spec = spec
        self.batch_tokens = config.batch_tokens
        self._model: Any = None
        self._tokenizer: Any = None

    def setup(self) -> None:
        """Loads the weights in the resolved precision. Sets the number of torch threads of this process."""
        if self._model is not None:
            return
        torch.set_num_threads(self.config.threads_per_worker)
        self._device = torch.device(resolve_device(self.config))
        model = _load_weights(self.spec, _DTYPES[resolve_precision(self.config)])
        self._model = model.to(self._device).eval()

    def encode_queries(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """[N, D] float32 vectors of queries: `encode_texts` with the model's own query prompt, if it has one."""
        return self.encode_texts([self.spec.query_prompt + text for text in texts])

    def encode_texts(self, texts: Sequence[str], max_tokens: int = 0) -> npt.NDArray[np.float32]:
        """[N, D] float32 vectors of the texts, each truncated to `max_tokens` (0: the model's max_seq_length)."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.spec)
        self._tokenizer.enable_truncation(max_tokens or self.spec.max_seq_length)
        return self.encode_ids([encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))])

    def encode_ids(self, ids: Ids) -> npt.NDArray[np.float32]:
        """[N, D] float32 vectors, C order, in the order of `ids`; unit length if the model normalises.

        ids: N sequences of token ids, special tokens included, or (flat int array, N+1 offsets into it).
        Raises ValueError that names the first sequence that is empty or longer than the model takes, and
        NonFiniteVectorError that names the first with NaN or an infinity.
        """
        self.setup()
        if torch.get_num_threads() != self.config.threads_per_worker:
            torch.set_num_threads(self.config.threads_per_worker)
        flat, offsets = _flatten(ids)
        lengths_N = np.diff(offsets)
        self._check_lengths(lengths_N)
        vectors_ND = np.empty((len(lengths_N), self.spec.d), dtype=np.float32)
        order = np.argsort(-lengths_N, kind="stable")  # the longest first: memory peaks in the first batch
        begin = 0
        while begin < len(order):
            size = max(1, self.batch_tokens // int(lengths_N[order[begin]]))
            batch = order[begin : begin + size]
            try:
                vectors_ND[batch] = self._forward(flat, offsets[batch], lengths_N[batch])
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                self.batch_tokens = max(1, self.batch_tokens // 2)
                torch.cuda.empty_cache()
                continue
            begin += len(batch)
        bad = np.flatnonzero(~np.isfinite(vectors_ND).all(axis=1))
        if len(bad):
            index = int(bad[0])
            raise NonFiniteVectorError(
                index,
                f"vectors must be finite: sequence {index} of {len(lengths_N)} ({lengths_N[index]} tokens) has NaN "
                f"or infinity ({len(bad)} in all); try encode.precision=float32 or check {self.spec.path}",
            )
        return vectors_ND

    def _check_lengths(self, lengths_N: npt.NDArray[np.int64]) -> None:
        bad = np.flatnonzero((lengths_N < 1) | (lengths_N > self.spec.max_positions))
        if len(bad):
            raise ValueError(
                f"a sequence must have 1..{self.spec.max_positions} tokens (limit of {self.spec.name}), "
                f"got {lengths_N[bad[0]]} in sequence {bad[0]}"
            )

    @torch.inference_mode()
    def _forward(
        self, flat: npt.NDArray[np.int64], begins_B: npt.NDArray[np.int64], lengths_B: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        mask = np.arange(int(lengths_B[0])) < lengths_B[:, None]
        ids = np.zeros(mask.shape, dtype=np.int64)  # padding is masked, so any id will do
        ids[mask] = flat[np.repeat(begins_B - np.cumsum(lengths_B) + lengths_B, lengths_B) + np.arange(lengths_B.sum())]
        mask_BT = torch.from_numpy(mask).to(self._device)
        states_BTD = self._model(
            input_ids=torch.from_numpy(ids).to(self._device), attention_mask=mask_BT.to(torch.int64)
        ).last_hidden_state
        vectors_BD = _pool(states_BTD, mask_BT, self.spec.pooling)
        if self.spec.normalize:
            vectors_BD = torch.nn.functional.normalize(vectors_BD, dim=1)
        return vectors_BD.cpu().numpy()


def _pool(states_BTD: torch.Tensor, mask_BT: torch.Tensor, pooling: str) -> torch.Tensor:
    """[B, D] float32, accumulated in float32, as sentence-transformers pools right-padded states."""
    if pooling == "cls":
        return states_BTD[:, 0].float()
    if pooling == "last":
        return states_BTD[torch.arange(len(states_BTD)), mask_BT.sum(dim=1) - 1].float()
    if pooling == "max":
        return states_BTD.masked_fill(~mask_BT[:, :, None], float("-inf")).amax(dim=1).float()
    weights_BT = mask_BT.float()
    if pooling == "weightedmean":
        weights_BT = weights_BT * torch.arange(1, mask_BT.shape[1] + 1, device=mask_BT.device)
    sums_BD = torch.bmm(weights_BT[:, None, :], states_BTD.float())[:, 0]
    totals_B1 = weights_BT.sum(dim=1, keepdim=True)
    return sums_BD / (totals_B1.sqrt() if pooling == "mean_sqrt_len" else totals_B1)


def _flatten(ids: Ids) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    if isinstance(ids, tuple):
        flat, offsets = ids
        return np.asarray(flat, dtype=np.int64), np.asarray(offsets, dtype=np.int64)
    offsets = np.zeros(len(ids) + 1, dtype=np.int64)
    np.cumsum([len(sequence) for sequence in ids], out=offsets[1:])
    parts = [np.asarray(sequence, dtype=np.int64) for sequence in ids]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64), offsets


def _load_weights(spec: ModelSpec, dtype: torch.dtype) -> Any:
    from transformers import AutoModel
    from transformers.utils import logging

    had_bar, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # a pooling head without weights is reported at length; its output is not used
    try:
        return AutoModel.from_pretrained(str(spec.path), dtype=dtype, attn_implementation="sdpa", local_files_only=True)
    finally:
        logging.set_verbosity(verbosity)
        if had_bar:
            logging.enable_progress_bar()

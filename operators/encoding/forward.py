"""A model's forward pass over one batch of token ids: packed where the family allows it, else padded.

Shapes: T tokens of the batch, S sequences, B sequences of a padded batch, L tokens of the longest, D hidden dimension.
"""

from __future__ import annotations

import inspect
import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from operators.encoding import packed_attention
from operators.encoding.fast_linear import (
    NO_ACTIVATION,
    PackedLinear,
    can_pack,
    fused_activations,
    remove_modules,
    replace_linears,
)
from operators.encoding.int8_linear import Int8Linear, largest_inputs
from operators.encoding.load_model import load_model, position_base
from operators.errors import ConfigError

Ints = npt.NDArray[np.int64]

PRECISIONS = ("float32", "bfloat16", "float16", "int8")
ATTENTIONS = ("auto", "packed", "padded")

# Lengths of the self-test at load: one token, equal neighbours, and one longer than the first two together.
_TEST_LENGTHS = (1, 3, 3, 7, 19)
# Packed and padded passes add up in different orders; a wrong position or a neighbour seen costs far more than this.
_TEST_TOLERANCE = 1e-3

# Parts of a batch run side by side, each on a thread of its own, which beats a batch on all threads: nothing waits for
# the slowest thread after each operation. Smaller ones would read the weights and interpret the model more often.
_BLOCK_TOKENS = 2048
# oneDNN compiles a product for each new number of rows: few of them differ. Where there are few rows, those that are added
# count: (up to so many tokens, multiple of so many rows).
_ROW_MULTIPLES = ((64, 4), (128, 8))
_ROW_MULTIPLE = 16  # beyond


class ForwardPass:
    """Last hidden states of a batch of token ids.

    path: folder of a transformers model; a T5 gives its encoder. precision: float32, bfloat16, float16 (cuda) or int8
    (cpu). attention: "packed" concatenates the texts of a batch, "padded" pads them to the longest, "auto" packs where
    a comparison of both at load says that the model allows it. num_layers L > 0 leaves after the first L layers (the
    model's final norm stays).
    The same batch gives the same bits for the same settings, threads and machine.
    Raises ConfigError for a setting that cannot be used, and when "packed" is asked for and the model does not allow it.
    """

    attention: str
    attention_reason: str  # why it is padded; "" when packed
    hidden_size: int

    def __init__(
        self,
        path: Path,
        *,
        device: str = "cpu",
        precision: str = "float32",
        attention: str = "auto",
        num_layers: int = 0,
    ) -> None:
        _check_choice("precision", precision, PRECISIONS)
        _check_choice("attention", attention, ATTENTIONS)
        if precision == "float16" and not device.startswith("cuda"):
            raise ConfigError(f"encode.precision float16 needs a CUDA device, got device {device!r}: use bfloat16")
        if precision == "int8" and device != "cpu":
            raise ConfigError(f"encode.precision int8 needs the CPU, got device {device!r}: use bfloat16")
        self._device = torch.device(device)
        self._model = load_model(path, num_layers)
        self.hidden_size = int(self._model.config.hidden_size)
        self._arguments = {"use_cache": False} if hasattr(self._model.config, "use_cache") else {}
        self._position_base = position_base(self._model)
        pad = getattr(self._model.config, "pad_token_id", None)
        # Some Llamas say -1.
        self._pad_id = int(pad) if pad is not None and 0 <= int(pad) < int(self._model.config.vocab_size) else 0
        self.attention, self.attention_reason = "padded", "encode.attention is padded"
        if attention != "padded":
            self.attention_reason = self._reason_to_pad()
            self.attention = "padded" if self.attention_reason else "packed"
        if attention == "packed" and self.attention_reason:
            raise ConfigError(
                f"encode.attention must be auto or padded for this model, got 'packed': {self.attention_reason} ({path})"
            )
        self._prepare(precision)

    def __call__(self, flat_T: Ints, offsets: Ints) -> torch.Tensor:
        """[T, hidden_size] on the device: the last hidden states of the packed ids; sequence s is rows
        offsets[s]:offsets[s + 1]. flat_T, offsets: int64; no sequence is empty.
        """
        if self._device.type != "cpu":
            return self._block(flat_T, offsets, 0, len(offsets) - 1)
        blocks = _blocks(offsets)
        if len(blocks) == 1:
            return self._block(flat_T, offsets, *blocks[0])
        return torch.cat(_side_by_side(lambda block: self._block(flat_T, offsets, *block), blocks))

    def warm(self, most_tokens: int, within_s: float) -> None:
        """Have products compiled for batches of up to so many tokens, the smallest first, as long as time is left.

        What is not takes a few milliseconds longer the first time that a batch of its size comes.
        """
        if self._device.type != "cpu" or self.attention != "packed":
            return
        until = time.monotonic() + within_s
        for num_rows in sorted({size + -size % _row_multiple(size) for size in range(1, most_tokens + 1)}):
            if time.monotonic() > until:
                return
            self(*self._random_batch([min(16, num_rows - begin) for begin in range(0, num_rows, 16)]))

    def _block(self, flat_T: Ints, offsets: Ints, first: int, last: int) -> torch.Tensor:
        """The states of sequences first..last - 1."""
        ids_T, own = flat_T[offsets[first] : offsets[last]], offsets[first : last + 1] - offsets[first]
        with torch.inference_mode():
            return self._packed(ids_T, own) if self.attention == "packed" else self._padded(ids_T, own)

    def _prepare(self, precision: str) -> None:
        """Brings the model to its device and precision, on a CPU with layers made for it."""
        dtype = {"float32": torch.float32, "float16": torch.float16}.get(precision, torch.bfloat16)
        ids_T, offsets = self._random_batch([16] * 32)

        def trial() -> torch.Tensor:
            return self._block(ids_T, offsets, 0, len(offsets) - 1)

        if precision == "int8":
            largest = largest_inputs(self._model, trial)
            replace_linears(self._model, lambda x: Int8Linear(x, largest[x]) if x in largest else x)
        elif self._device.type == "cpu" and can_pack(dtype):
            fused = fused_activations(self._model, trial)
            replace_linears(self._model, lambda x: PackedLinear(x, fused[x][1] if x in fused else NO_ACTIVATION, dtype))
            remove_modules(self._model, {activation for activation, _ in fused.values()})
        self._model = self._model.to(device=self._device, dtype=dtype)

    def _packed(self, flat_T: Ints, offsets: Ints) -> torch.Tensor:
        num_tokens = len(flat_T)
        if self._device.type == "cpu" and (extra := -num_tokens % _row_multiple(num_tokens)):
            flat_T = np.append(flat_T, np.full(extra, self._pad_id))
            offsets = np.append(offsets, num_tokens + extra)
        segments = packed_attention.Segments.of(offsets, self._device)
        ids = torch.from_numpy(flat_T).to(self._device)[None]
        positions = torch.from_numpy(self._positions(flat_T, offsets)).to(self._device)[None]
        found = self._model(
            input_ids=ids,
            position_ids=positions,
            # With a mask given, transformers does not look for packed sequences by itself.
            attention_mask=torch.ones_like(ids),
            packed_segments=segments,
            **self._arguments,
        )
        states_TD: torch.Tensor = found.last_hidden_state[0, :num_tokens]
        return states_TD

    def _positions(self, flat_T: Ints, offsets: Ints) -> Ints:
        if self._position_base is None:
            return np.arange(len(flat_T)) - np.repeat(offsets[:-1], np.diff(offsets))
        # As RoBERTa counts: a padding token inside a text (its name may stand there) has no number of its own.
        real_T = (flat_T != self._position_base).astype(np.int64)
        numbers_T = np.cumsum(real_T)
        before_T = np.repeat((numbers_T - real_T)[offsets[:-1]], np.diff(offsets))
        return (numbers_T - before_T) * real_T + self._position_base

    def _padded(self, flat_T: Ints, offsets: Ints) -> torch.Tensor:
        lengths = np.diff(offsets)
        real_BL = np.arange(int(lengths.max())) < lengths[:, None]
        ids_BL = np.full(real_BL.shape, self._pad_id, dtype=np.int64)
        ids_BL[real_BL] = flat_T
        real = torch.from_numpy(real_BL).to(self._device)
        ids = torch.from_numpy(ids_BL).to(self._device)
        found = self._model(input_ids=ids, attention_mask=real.long(), **self._arguments)
        states_TD: torch.Tensor = found.last_hidden_state[real]
        return states_TD

    def _random_batch(self, lengths: Sequence[int]) -> tuple[Ints, Ints]:
        """Token ids, none of them padding, and offsets; the same at every call."""
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        vocabulary = int(self._model.config.vocab_size)
        ids_T = np.random.default_rng(0).integers(0, vocabulary, int(offsets[-1]))
        ids_T[ids_T == self._pad_id] = (self._pad_id + 1) % vocabulary
        return ids_T, offsets

    def _reason_to_pad(self) -> str:
        """Why this model cannot be packed, "" if it can: by comparing both ways on random ids, in float32."""
        if "position_ids" not in inspect.signature(self._model.forward).parameters:
            return "the model takes no position ids"
        native = self._model.config._attn_implementation
        flat_T, offsets = self._random_batch(_TEST_LENGTHS)
        packed_attention.register()
        try:
            with torch.inference_mode():
                padded = self._padded(flat_T, offsets)
                self._model.set_attn_implementation(packed_attention.NAME)
                packed = self._packed(flat_T, offsets)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            reason = f"a packed pass failed ({type(error).__name__}: {reason})"
        else:
            difference = float((packed - padded).abs().max() / padded.abs().max())
            reason = (
                "" if difference <= _TEST_TOLERANCE else "its positions or its attention are not those of a packed row"
            )
        if reason:
            self._model.set_attn_implementation(native)
        return reason


def _blocks(offsets: Ints) -> list[tuple[int, int]]:
    """(first, last) sequences of about equally large parts of a batch, a pure function of the lengths."""
    num_blocks = -(-int(offsets[-1]) // _BLOCK_TOKENS)
    cuts = np.searchsorted(offsets, np.arange(1, num_blocks) * int(offsets[-1]) / num_blocks)
    bounds = np.unique([0, *cuts, len(offsets) - 1])
    return [(int(a), int(b)) for a, b in itertools.pairwise(bounds)]


def _row_multiple(num_tokens: int) -> int:
    return next((multiple for most, multiple in _ROW_MULTIPLES if num_tokens <= most), _ROW_MULTIPLE)


def _side_by_side(
    function: Callable[[tuple[int, int]], torch.Tensor], blocks: list[tuple[int, int]]
) -> list[torch.Tensor]:
    """`function` of each block, on as many of torch's threads as there are blocks; those left over are shared out."""
    total = torch.get_num_threads()
    num_workers = min(total, len(blocks))
    try:
        with ThreadPoolExecutor(
            num_workers, initializer=torch.set_num_threads, initargs=(total // num_workers,)
        ) as pool:
            return list(pool.map(function, blocks))
    finally:
        torch.set_num_threads(total)  # the number is the thread's own, but new threads start with the last one set


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"encode.{name} must be one of {', '.join(choices)}, got {value!r}")

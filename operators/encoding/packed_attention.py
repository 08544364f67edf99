"""Attention within the segments of a packed row: what transformers' attention interface calls instead of its own.

Every family of transformers that goes through AttentionInterface and AttentionMaskInterface is served by the two
functions registered here. The mask is the model's own, for one text: the model hands its mask function over, and each
segment takes the upper left corner of the mask of the longest one, so causal, sliding and bidirectional attention need
no case of their own.

Shapes: T tokens of the row, S segments, G segments of a group, H query heads, K key heads, L tokens of a segment, D
dimension of a head.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

NAME = "vectormill_packed"


@dataclasses.dataclass(frozen=True)
class Segments:
    """Where the texts lie in a packed row.

    groups: (first token, number of segments, their length) for each run of equally long neighbours.
    """

    offsets: npt.NDArray[np.int64]
    groups: list[tuple[int, int, int]]
    max_length: int
    offsets_on_device: torch.Tensor  # int32 [S + 1]

    @classmethod
    def of(cls, offsets: npt.NDArray[np.int64], device: torch.device) -> Segments:
        lengths = np.diff(offsets)
        firsts = np.flatnonzero(np.diff(lengths, prepend=-1))
        counts = np.diff(firsts, append=len(lengths))
        groups = [(int(offsets[s]), int(n), int(lengths[s])) for s, n in zip(firsts, counts, strict=True)]
        on_device = torch.from_numpy(offsets.astype(np.int32)).to(device)
        return cls(offsets, groups, int(lengths.max()), on_device)


class MaskRule:
    """The model's mask of one text, made by its own mask function for the longest segment asked for."""

    def __init__(self, make_mask: Callable[[int], torch.Tensor]) -> None:
        self._make_mask = make_mask  # length -> bool [L, L], True where a query (row) sees a key (column)
        self._length = 0
        self._mask_LL = torch.empty(0, 0, dtype=torch.bool)
        self._window: tuple[int, int] | None = None

    def window(self, length: int) -> tuple[int, int] | None:
        """Keys that a query sees to its left and right, -1 for all; None if the mask is not such a band."""
        if length > self._length:
            self._length, self._mask_LL = length, self._make_mask(length)
            left, right = int(self._mask_LL[-1].sum()) - 1, int(self._mask_LL[0].sum()) - 1
            band_LL = torch.ones_like(self._mask_LL).tril(right).triu(-left)
            same = bool((band_LL == self._mask_LL).all())
            self._window = (left, right) if same else None
        if self._window is None:
            return None
        left, right = (-1 if reach >= length - 1 and length > 1 else reach for reach in self._window)
        return left, right

    def sdpa_arguments(self, length: int) -> dict[str, Any]:
        """Mask arguments of scaled_dot_product_attention for segments of this length (at most the longest so far)."""
        window = self.window(length)
        if length == 1 or window == (-1, -1):
            return {}
        if window == (-1, 0):
            return {"is_causal": True}
        return {"attn_mask": self._mask_LL[:length, :length]}


def make_rule(*_: Any, mask_function: Callable[..., Any], use_vmap: bool = False, **arguments: Any) -> MaskRule:
    """What the models carry about as their attention mask. Called by transformers, once a kind of layer and pass."""
    from transformers.masking_utils import sdpa_mask

    device = arguments["device"]

    def make_mask(length: int) -> torch.Tensor:
        mask = sdpa_mask(
            1, length, length, mask_function=mask_function, allow_is_causal_skip=False, use_vmap=use_vmap, device=device
        )
        assert mask is not None  # no skip is allowed
        return mask[0, 0]

    return MaskRule(make_mask)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: MaskRule | None,
    scaling: float | None = None,
    packed_segments: Segments | None = None,
    **terms: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of each segment to itself: query [1, H, T, D], key and value [1, K, T, D] to [1, T, H, D].

    Raises ValueError where the model's attention is not that of a packed row.
    """
    if packed_segments is None or not isinstance(attention_mask, MaskRule):
        raise ValueError("the model does not hand the segments and its mask to its attention")
    for name in ("position_bias", "softcap", "s_aux"):
        if terms.get(name) is not None:
            raise ValueError(f"the model's attention has a term of its own ({name})")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = attention_mask.window(packed_segments.max_length)
    if window is not None and has_varlen(query):
        return _attend_varlen(query, key, value, packed_segments, window, scale), None
    if window is not None and has_compiled(query) and key.shape[-1] == value.shape[-1]:
        return _attend_compiled(query, key, value, packed_segments, window, scale), None
    return _attend_grouped(query, key, value, packed_segments, attention_mask, scale), None


def _attend_grouped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, rule: MaskRule, scale: float
) -> torch.Tensor:
    """A batched product for each group: no mask for padding, and nothing is padded."""
    num_heads, num_tokens = query.shape[1:3]
    if (repeats := num_heads // key.shape[1]) > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    out = query.new_empty(1, num_tokens, num_heads, value.shape[-1])
    for first, count, length in segments.groups:
        last = first + count * length
        q_GHLD, k_GHLD, v_GHLD = (
            x[0, :, first:last].unflatten(1, (count, length)).transpose(0, 1) for x in (query, key, value)
        )
        mask = rule.sdpa_arguments(length)
        found_GHLD = F.scaled_dot_product_attention(q_GHLD, k_GHLD, v_GHLD, scale=scale, **mask)
        out[0, first:last].unflatten(0, (count, length)).copy_(found_GHLD.transpose(1, 2))
    return out


def has_compiled(query: torch.Tensor) -> bool:
    """Whether the compiled attention takes such heads on this machine."""
    fits = query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.shape[-1] % 32 == 0
    return fits and _compiled() is not None


def _attend_compiled(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    window: tuple[int, int],
    scale: float,
) -> torch.Tensor:
    """All segments one by one, on the calling thread."""
    num_heads, num_tokens, dim = query.shape[1:]
    out = query.new_empty(1, num_tokens, num_heads, dim)
    q_THD, k_TKD, v_TKD = (_as_numpy(x[0].transpose(0, 1)) for x in (query, key, value))
    _compiled()(q_THD, k_TKD, v_TKD, segments.offsets, *window, scale, _as_numpy(out[0]))
    return out


@functools.cache
def _compiled() -> Any:
    """The compiled attention, None where numba or the CPU's bfloat16 products are missing."""
    if not torch.cpu.get_capabilities().get("avx512_bf16", False):
        return None
    try:
        from operators.encoding.attention_compiled import attend_segments
    except ImportError:
        return None
    return attend_segments


def _as_numpy(x: torch.Tensor) -> npt.NDArray[np.uint16]:
    """The tensor's memory as uint16, with contiguous rows; numpy has no bfloat16."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    bits: npt.NDArray[np.uint16] = x.view(torch.int16).numpy().view(np.uint16)
    return bits


def has_varlen(query: torch.Tensor) -> bool:
    """Whether torch's kernel for segments takes such heads: 16 bits, on CUDA, at most 256 dimensions."""
    return query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256


def _attend_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    window: tuple[int, int],
    scale: float,
) -> torch.Tensor:
    """One kernel for all segments (float16 and bfloat16 on CUDA)."""
    from torch.nn.attention.varlen import varlen_attn

    found_THD: Any = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        segments.offsets_on_device,
        segments.offsets_on_device,
        segments.max_length,
        segments.max_length,
        scale=scale,
        window_size=window,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    out: torch.Tensor = found_THD[None]
    return out


def register() -> None:
    """Makes NAME an attention implementation of transformers. May be called again."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, make_rule)

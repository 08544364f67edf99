"""One vector of every segment of packed token states.

Shapes: T tokens of all segments one behind the other, S segments, L tokens of one, D dimensions (kept ones after
truncation), B = ceil(D / 8) bytes.
A segment's vector does not depend on the other segments of the call.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt
import torch

from kernels import reference
from kernels.blocks import on_device

MODES = ("mean", "cls", "max", "last", "mean_sqrt_len", "weighted_mean")
DTYPES = ("float32", "float16", "int8", "binary")


@overload
def pool_normalize(
    states_TD: npt.NDArray[Any],
    offsets: npt.NDArray[np.int64],
    *,
    mode: str,
    normalize: bool = True,
    truncate_dim: int | None = None,
    dtype: Literal["float32", "float16", "binary"] = "float32",
) -> npt.NDArray[Any]: ...


@overload
def pool_normalize(
    states_TD: npt.NDArray[Any],
    offsets: npt.NDArray[np.int64],
    *,
    mode: str,
    normalize: bool = True,
    truncate_dim: int | None = None,
    dtype: Literal["int8"],
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]: ...


@overload
def pool_normalize(
    states_TD: torch.Tensor,
    offsets: torch.Tensor | npt.NDArray[np.int64],
    *,
    mode: str,
    normalize: bool = True,
    truncate_dim: int | None = None,
    dtype: Literal["float32", "float16", "binary"] = "float32",
) -> torch.Tensor: ...


@overload
def pool_normalize(
    states_TD: torch.Tensor,
    offsets: torch.Tensor | npt.NDArray[np.int64],
    *,
    mode: str,
    normalize: bool = True,
    truncate_dim: int | None = None,
    dtype: Literal["int8"],
) -> tuple[torch.Tensor, torch.Tensor]: ...


def pool_normalize(
    states_TD: Any,
    offsets: Any,
    *,
    mode: str,
    normalize: bool = True,
    truncate_dim: int | None = None,
    dtype: str = "float32",
) -> Any:
    """One vector a segment, [S, D]: an array for an array, a tensor on the same device for a tensor.

    states_TD: any float type; segment s is rows offsets[s]:offsets[s + 1]. offsets: int64 [S + 1] from 0 to T.
    mode: "mean", "cls" (first token), "last", "max", "mean_sqrt_len" (sum / sqrt(length)) or "weighted_mean" (token
    i = 1..length weighs i). `truncate_dim` keeps the leading dimensions, before normalising. A zero vector stays zero.
    dtype "float32" or "float16": that of the result. "int8": the result is (codes int8 [S, D], scale float32 [S]), a
    vector about scale * codes, scale = max |v| / 127, codes rounded half to even; scale and codes of a zero vector are
    0. "binary": uint8 [S, B], bit 1 where v > 0, the first dimension in the highest bit as numpy.packbits has it, the
    bits beyond D 0.
    Arrays are pooled in float64 (the reference), tensors and CuPy arrays in float32 with norms in float64.
    Raises ValueError that names an empty segment, or one whose vector is not finite (in `dtype`, if that is a float).
    """
    if on_device(states_TD) and not isinstance(states_TD, torch.Tensor):
        from kernels.cuda.pool import pool_normalize as pool_on_device

        return pool_on_device(
            states_TD, offsets, mode=mode, normalize=normalize, truncate_dim=truncate_dim, dtype=dtype
        )
    if len(states_TD.shape) != 2:
        raise ValueError(f"states must be a matrix [T, D], got {tuple(states_TD.shape)}")
    starts, ends = check_segments(offsets, len(states_TD))
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if truncate_dim is not None:
        if not 1 <= truncate_dim <= states_TD.shape[1]:
            raise ValueError(f"truncate_dim must be in 1..D ({states_TD.shape[1]}), got {truncate_dim}")
        states_TD = states_TD[:, :truncate_dim]
    packed = dtype in ("int8", "binary")
    if isinstance(states_TD, torch.Tensor):
        vectors_SD: Any = pool_spans(states_TD, starts, ends, mode=mode)
        vectors_SD = unit_length(vectors_SD) if normalize else vectors_SD
        if not packed:
            vectors_SD = vectors_SD.to(getattr(torch, dtype))
        finite_S: npt.NDArray[np.bool_] = torch.isfinite(vectors_SD).all(dim=1).cpu().numpy()
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            vectors_SD = reference.pooled(states_TD, np.append(starts, len(states_TD)), mode, normalize)
            # The range of a tensor's vectors, also for the packed ones.
            rounded_SD = vectors_SD.astype(np.float32 if packed else dtype)
        finite_S = np.isfinite(rounded_SD).all(axis=1)
        vectors_SD = vectors_SD if packed else rounded_SD
    if not finite_S.all():
        raise ValueError(f"vectors must be finite: that of segment {int(np.argmin(finite_S))} is not, in {dtype}")
    if not packed:
        return vectors_SD
    if isinstance(vectors_SD, torch.Tensor):
        return _quantized_int8(vectors_SD) if dtype == "int8" else _packed_signs(vectors_SD)
    return reference.quantized_int8(vectors_SD) if dtype == "int8" else np.packbits(vectors_SD > 0, axis=1)


def check_segments(offsets: Any, num_tokens: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """First and one-past-last token of every segment, on the host. Raises ValueError that names an empty segment."""
    host = offsets.cpu().numpy() if isinstance(offsets, torch.Tensor) else np.asarray(offsets)
    if host.ndim != 1 or len(host) == 0 or host.dtype != np.int64:
        raise ValueError(f"offsets must be int64 [S + 1], got {host.dtype} {host.shape}")
    if host[0] != 0 or host[-1] != num_tokens:
        raise ValueError(f"offsets must run from 0 to the number of tokens ({num_tokens}), got {host[0]} to {host[-1]}")
    lengths = np.diff(host)
    if (lengths <= 0).any():
        segment = int(np.argmax(lengths <= 0))
        raise ValueError(f"segments must hold at least one token: segment {segment} holds {int(lengths[segment])}")
    return host[:-1], host[1:]


def pool_spans(
    states_TD: torch.Tensor,
    starts_S: npt.NDArray[np.int64],
    ends_S: npt.NDArray[np.int64],
    *,
    mode: str,
    positions_S: npt.NDArray[np.int64] | None = None,
) -> torch.Tensor:
    """One float32 vector of every span, [S, D], on the states' device, not normalised.

    Span s is rows starts_S[s]:ends_S[s], int64 on the host; spans may overlap and leave rows out, in any order.
    mode: as `pool_normalize`. positions_S: how many tokens of its text stand before each span, for "weighted_mean",
    where token i of the span weighs positions_S + i; None: none do. Not finite states give vectors that are not finite.
    Raises ValueError that names the first span that is empty or outside of the states.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    wrong_S = (starts_S < 0) | (ends_S <= starts_S) | (ends_S > len(states_TD))
    if wrong_S.any():
        s = int(np.argmax(wrong_S))
        raise ValueError(
            f"a span must hold at least one of the {len(states_TD)} rows, got {starts_S[s]}:{ends_S[s]} in span {s}"
        )
    if mode in ("cls", "last"):
        picked = torch.from_numpy(starts_S if mode == "cls" else ends_S - 1).to(states_TD.device)
        return states_TD.index_select(0, picked).float()
    if len(starts_S) == 0:
        return states_TD.new_empty((0, states_TD.shape[1]), dtype=torch.float32)
    if mode == "max":
        spans = zip(starts_S.tolist(), ends_S.tolist(), strict=True)
        return torch.stack([states_TD[start:end].amax(dim=0) for start, end in spans]).float()
    lengths_S = ends_S - starts_S
    firsts_S = np.cumsum(lengths_S) - lengths_S
    steps = np.arange(int(lengths_S.sum())) - np.repeat(firsts_S, lengths_S)
    weights = None
    if mode == "weighted_mean":
        before_S = np.zeros(len(starts_S), np.int64) if positions_S is None else positions_S
        weights = torch.from_numpy((steps + np.repeat(before_S + 1, lengths_S)).astype(np.float32))
        totals_S: npt.NDArray[Any] = lengths_S * (lengths_S + 1) / 2 + before_S * lengths_S
    else:
        totals_S = lengths_S if mode == "mean" else np.sqrt(lengths_S)
    # A bag adds its rows one after the other, whatever the other bags are; neither index_add_ on a GPU nor a matrix
    # product promises that, and the other ways to add rows by segment are slower (torch 2.13).
    device = states_TD.device
    sums_SD = torch.nn.functional.embedding_bag(
        torch.from_numpy(steps + np.repeat(starts_S, lengths_S)).to(device),
        states_TD.float(),
        torch.from_numpy(firsts_S).to(device),
        mode="sum",
        per_sample_weights=None if weights is None else weights.to(device),
    )
    return sums_SD / torch.from_numpy(np.asarray(totals_S, np.float32)).to(device)[:, None]


def unit_length(vectors_SD: torch.Tensor) -> torch.Tensor:
    """Float32 vectors divided by their norms; a zero vector stays zero."""
    # In float64: a vector within float32 may have a norm beyond it, or one that is lost among its smallest numbers.
    norms_S1 = torch.linalg.vector_norm(vectors_SD, dim=1, keepdim=True, dtype=torch.float64)
    return (vectors_SD / torch.where(norms_S1 > 0, norms_S1, 1.0)).float()


def _quantized_int8(vectors_SD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As reference.quantized_int8, in float32."""
    largest_S = torch.linalg.vector_norm(vectors_SD, ord=torch.inf, dim=1)
    scale_S = largest_S / 127.0
    # Divided before it is multiplied: 127 / max |v| would overflow for a small vector.
    divisor_S = torch.where(scale_S > 0, largest_S, torch.inf)
    return torch.round(vectors_SD / divisor_S[:, None] * 127.0).to(torch.int8), scale_S


def _packed_signs(vectors_SD: torch.Tensor) -> torch.Tensor:
    """numpy.packbits(vectors > 0, axis=1) on the tensor's device."""
    num_vectors, num_dims = vectors_SD.shape
    bits_SD = torch.nn.functional.pad((vectors_SD > 0).to(torch.uint8), (0, -num_dims % 8))
    values_8 = 2 ** torch.arange(7, -1, -1, dtype=torch.uint8, device=vectors_SD.device)
    return (bits_SD.reshape(num_vectors, -(-num_dims // 8), 8) * values_8).sum(dim=2, dtype=torch.uint8)

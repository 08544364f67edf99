"""One vector of every segment of packed token states.

Shapes: T tokens of all segments one behind the other, S segments, D dimensions (kept ones after truncation).
A segment's vector does not depend on the other segments of the call.
"""

from __future__ import annotations

from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch

MODES = ("mean", "cls", "max", "last", "mean_sqrt_len", "weighted_mean")
DTYPES = ("float32", "float16")


@overload
def pool_normalize(
    states_TD: npt.NDArray[Any],
    offsets: npt.NDArray[np.int64],
    *,
    mode: str,
    normalize: bool = True,
    truncate_dim: int | None = None,
    dtype: str = "float32",
) -> npt.NDArray[Any]: ...


@overload
def pool_normalize(
    states_TD: torch.Tensor,
    offsets: torch.Tensor | npt.NDArray[np.int64],
    *,
    mode: str,
    normalize: bool = True,
    truncate_dim: int | None = None,
    dtype: str = "float32",
) -> torch.Tensor: ...


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
    Arrays are pooled in float64 (the reference), tensors in float32; `dtype` is that of the result.
    Raises ValueError that names an empty segment, or one whose vector is not finite in `dtype`.
    """
    starts, ends = _segments(offsets, len(states_TD), len(states_TD.shape))
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if truncate_dim is not None:
        if not 1 <= truncate_dim <= states_TD.shape[1]:
            raise ValueError(f"truncate_dim must be in 1..D ({states_TD.shape[1]}), got {truncate_dim}")
        states_TD = states_TD[:, :truncate_dim]
    if isinstance(states_TD, torch.Tensor):
        vectors_SD: Any = _pool_torch(states_TD, starts, ends, mode, normalize).to(getattr(torch, dtype))
        finite_S: npt.NDArray[np.bool_] = torch.isfinite(vectors_SD).all(dim=1).cpu().numpy()
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            vectors_SD = _pool_numpy(states_TD, starts, ends, mode, normalize).astype(dtype)
        finite_S = np.isfinite(vectors_SD).all(axis=1)
    if not finite_S.all():
        raise ValueError(f"vectors must be finite: that of segment {int(np.argmin(finite_S))} is not, in {dtype}")
    return vectors_SD


def _segments(offsets: Any, num_tokens: int, num_axes: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """First and one-past-last token of every segment, on the host."""
    host = offsets.cpu().numpy() if isinstance(offsets, torch.Tensor) else np.asarray(offsets)
    if num_axes != 2 or host.ndim != 1 or len(host) == 0 or host.dtype != np.int64:
        raise ValueError(f"states must be a matrix and offsets int64 [S + 1], got {host.dtype} {host.shape}")
    if host[0] != 0 or host[-1] != num_tokens:
        raise ValueError(f"offsets must run from 0 to the number of tokens ({num_tokens}), got {host[0]} to {host[-1]}")
    lengths = np.diff(host)
    if (lengths <= 0).any():
        segment = int(np.argmax(lengths <= 0))
        raise ValueError(f"segments must hold at least one token: segment {segment} holds {int(lengths[segment])}")
    return host[:-1], host[1:]


def _pool_numpy(
    states_TD: npt.NDArray[Any],
    starts: npt.NDArray[np.int64],
    ends: npt.NDArray[np.int64],
    mode: str,
    normalize: bool,
) -> npt.NDArray[np.float64]:
    vectors_SD = np.empty((len(starts), states_TD.shape[1]), np.float64)
    for segment, (start, end) in enumerate(zip(starts, ends, strict=True)):
        tokens = states_TD[start:end].astype(np.float64)
        if mode == "cls":
            vectors_SD[segment] = tokens[0]
        elif mode == "last":
            vectors_SD[segment] = tokens[-1]
        elif mode == "max":
            vectors_SD[segment] = tokens.max(axis=0)
        elif mode == "weighted_mean":
            weights = np.arange(1, len(tokens) + 1, dtype=np.float64)
            vectors_SD[segment] = (tokens * weights[:, None]).sum(axis=0) / weights.sum()
        else:
            divisor = len(tokens) if mode == "mean" else len(tokens) ** 0.5
            vectors_SD[segment] = tokens.sum(axis=0) / divisor
    if normalize:
        norms_S = np.sqrt(np.square(vectors_SD).sum(axis=1))
        vectors_SD /= np.where(norms_S > 0, norms_S, 1.0)[:, None]
    return vectors_SD


def _pool_torch(
    states_TD: torch.Tensor,
    starts: npt.NDArray[np.int64],
    ends: npt.NDArray[np.int64],
    mode: str,
    normalize: bool,
) -> torch.Tensor:
    if mode in ("cls", "last"):
        picked = torch.from_numpy(starts if mode == "cls" else ends - 1).to(states_TD.device)
        vectors_SD = states_TD.index_select(0, picked).float()
    elif len(starts) == 0:
        vectors_SD = states_TD.new_empty((0, states_TD.shape[1]), dtype=torch.float32)
    else:
        # One reduction a segment: adds in an order that the neighbours cannot change, which index_add_ on a GPU
        # does not promise, and on the CPU faster than segment_reduce (torch 2.13).
        pieces = torch.split(states_TD.float(), (ends - starts).tolist())
        vectors_SD = torch.stack([_pool_tokens(tokens, mode) for tokens in pieces])
    if normalize:
        norms_S1 = torch.linalg.vector_norm(vectors_SD, dim=1, keepdim=True)
        vectors_SD = vectors_SD / torch.where(norms_S1 > 0, norms_S1, 1.0)
    return vectors_SD


def _pool_tokens(tokens_LD: torch.Tensor, mode: str) -> torch.Tensor:
    length = len(tokens_LD)
    if mode == "max":
        return tokens_LD.amax(dim=0)
    if mode == "weighted_mean":
        weights_L = torch.arange(1, length + 1, dtype=torch.float32, device=tokens_LD.device)
        return (tokens_LD * weights_L[:, None]).sum(dim=0) / (length * (length + 1) / 2)
    return tokens_LD.sum(dim=0) / (length if mode == "mean" else length**0.5)

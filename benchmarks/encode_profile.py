"""Where the time of the encoder goes: tokenizing by the clock, the rest by torch's profiler in groups of operators."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from benchmarks.encode_ceiling import ceiling_precision, large_rates
from operators.encoding.encode_config import resolve_precision

# The first group whose word is in an operator's name has its time; attention and pooling are found by where they are
# called from.
GROUPS = {
    "linear": ("addmm", "aten::mm", "linear", "mkldnn", "onednn", "int_mm", "quantized", "gemm"),
    "attention": ("attention", "bmm", "softmax"),
    "activation and normalisation": ("gelu", "norm", "aten::add", "aten::mul", "tanh", "silu", "relu", "rsqrt", "erf"),
    "embedding": ("embedding",),
    "copies": ("copy", "cat", "clone", "contiguous", "index", "gather", "empty", "fill", "to_copy", "memcpy"),
}
MARKS = {"vectormill::attention": "attention", "vectormill::pooling": "pooling"}
REPEATS = 2


def profile(encoder: Any, texts: list[str], flops_per_token: float) -> dict[str, Any]:
    """us per token and shares of the groups, of `encode_documents` on these texts; on a CPU, with one thread.

    encoder: a TextEncoder of its own, of one thread (several work side by side, and their times do not add up). The
    groups' sum is the time of encode_ids under the profiler, which takes longer by `profiler_overhead`; `tokenizing alone`
    stands beside it, because it goes on while the model works. `at the ceiling`: what the model's operations would take
    at the machine's best rate of one thread.
    """
    encoder.setup()
    encoder.encode_documents(texts)
    tokenizer = encoder._tokenizer
    on_gpu = encoder.config.device == "cuda"
    rates = large_rates(ceiling_precision(resolve_precision(encoder.config)), encoder.config.device)
    tokenizing_s, encodings = _best(lambda: tokenizer.encode_batch_fast(texts))
    ids = [encoding.ids for encoding in encodings]
    num_tokens = sum(map(len, ids))
    whole_s, _ = _best(lambda: encoder.encode_documents(texts))
    plain_s, _ = _best(lambda: encoder.encode_ids(ids))
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if on_gpu else [])]
    # The encoder works in threads of its own.
    every_thread = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with marked(), torch.profiler.profile(activities=kinds, experimental_config=every_thread) as recorded:
        began = time.perf_counter()
        encoder.encode_ids(ids)
        profiled_s = time.perf_counter() - began
    by_group = dict.fromkeys([*GROUPS, "pooling", "other operators"], 0.0)
    by_operator: dict[str, float] = {}
    for event in recorded.events() or ():
        if event.device_type != torch.autograd.DeviceType.CPU:  # a kernel's time is also its operator's
            continue
        seconds = float(event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        by_group[_group_of(event)] += seconds
        by_operator[event.name] = by_operator.get(event.name, 0.0) + seconds
    by_group["python, NumPy, waiting"] = max(0.0, profiled_s - sum(by_group.values()))
    largest = sorted(by_operator, key=lambda name: -by_operator[name])[:12]
    per_token = 1e6 / num_tokens
    return {
        "tokens": num_tokens,
        "threads": encoder.config.threads_per_worker,
        "us_per_token": {name: round(seconds * per_token, 4) for name, seconds in by_group.items()},
        "share": {name: round(seconds / profiled_s, 4) for name, seconds in by_group.items()},
        "clock_us_per_token": {
            "texts to vectors": round(whole_s * per_token, 4),
            "ids to vectors": round(plain_s * per_token, 4),
            "tokenizing alone": round(tokenizing_s * per_token, 4),
            "at the ceiling": round(flops_per_token / max(rates.values()) * 1e6, 4),
        },
        "profiler_overhead": round(profiled_s / plain_s - 1, 4),
        "largest_operators_us_per_token": {name: round(by_operator[name] * per_token, 4) for name in largest},
    }


@contextlib.contextmanager
def marked() -> Iterator[None]:
    """Attention and pooling of the encoder run inside of a mark that the profiler sees."""
    from transformers import AttentionInterface

    from operators.encoding import packed_attention
    from operators.encoding.head import Head

    attend, pool = packed_attention.attend, Head.__call__

    def marked_attend(*arguments: Any, **named: Any) -> Any:
        with torch.profiler.record_function("vectormill::attention"):
            return attend(*arguments, **named)

    def marked_pool(*arguments: Any, **named: Any) -> Any:
        with torch.profiler.record_function("vectormill::pooling"):
            return pool(*arguments, **named)

    with mock.patch.object(Head, "__call__", marked_pool):
        AttentionInterface.register(packed_attention.NAME, marked_attend)
        try:
            yield
        finally:
            packed_attention.register()


def _group_of(event: Any) -> str:
    ancestor = event
    while ancestor is not None:
        if ancestor.name in MARKS:
            return MARKS[ancestor.name]
        ancestor = ancestor.cpu_parent
    name = event.name.lower()
    return next((group for group, words in GROUPS.items() if any(word in name for word in words)), "other operators")


def _best(run: Any) -> tuple[float, Any]:
    best, result = float("inf"), None
    for _ in range(REPEATS):
        began = time.perf_counter()
        result = run()
        best = min(best, time.perf_counter() - began)
    return best, result

"""What a machine could do at most: its rate of matrix products, and the operations that a model needs for a token.

Operations of a text of L tokens: 2 * weights of the encoder's linear layers * L, and 4 * L^2 * heads * dimension of a head
for each layer's attention (scores and weighted sum, the full square also where a mask hides a part). Nothing else is
counted: embeddings, normalisation, activation, softmax, pooling and tokenizing are all overhead.

Shapes: M rows (tokens), K input and N output dimensions of a product.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from operators.encoding.fast_linear import can_pack

Shape = tuple[int, int, int]

# The rate of a machine is the best of several large products: which one is best depends on caches and kernels.
LARGE: dict[str, tuple[Shape, ...]] = {
    "cpu": ((2048, 2048, 2048), (4096, 2048, 2048), (2048, 4096, 2048)),
    "cuda": ((8192, 8192, 8192), (16384, 8192, 8192), (16384, 4096, 4096)),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass(frozen=True)
class ModelWork:
    """What one token costs: `linear` operations whatever the text, and `attention_per_token` for each token it sees.

    shapes: (K, N) of the distinct linear layers.
    """

    linear: int
    attention_per_token: int
    shapes: tuple[tuple[int, int], ...]
    vocab_size: int

    def per_token(self, lengths: Iterable[int]) -> float:
        """Mean operations of a token of texts of these lengths."""
        lengths = list(lengths)
        return self.linear + self.attention_per_token * sum(n * n for n in lengths) / sum(lengths)


def model_work(folder: Path) -> ModelWork:
    """Counted on the model's structure; no weights are read."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    encoder = model.get_encoder() if config.is_encoder_decoder else model
    layers = [
        (module.in_features, module.out_features)
        for name, module in encoder.named_modules()
        if isinstance(module, torch.nn.Linear) and "pooler" not in name
    ]
    heads = int(config.num_attention_heads)
    dim = int(getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // heads)
    return ModelWork(
        linear=2 * sum(k * n for k, n in layers),
        attention_per_token=4 * heads * dim * int(config.num_hidden_layers),
        shapes=tuple(sorted(set(layers))),
        vocab_size=int(config.vocab_size),
    )


def product_rate(shape: Shape, precision: str, device: str, repeats: int = 5) -> float:
    """Operations per second of one product of random numbers on torch's threads: the best of the repeats.

    On a CPU both torch.mm and, where torch has it, oneDNN's product with weights that are laid out beforehand, which is
    faster by a tenth in float32.
    """
    rows, inner, columns = shape
    dtype = DTYPES[precision]
    a_MK = torch.randn(rows, inner, device=device).to(dtype)
    b_NK = torch.randn(columns, inner, device=device).to(dtype)
    out_MN = torch.empty(rows, columns, device=device, dtype=dtype)
    products: list[Callable[[], object]] = [lambda: torch.mm(a_MK, b_NK.T, out=out_MN)]
    if device == "cpu" and can_pack(dtype):
        laid_out = torch.ops.mkldnn._reorder_linear_weight(b_NK, rows)
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(a_MK, laid_out, None, "none", [], ""))
    calls = max(1, round(2e11 / (2.0 * rows * inner * columns))) if device == "cuda" else 1
    with torch.inference_mode():
        seconds = min(_seconds(product, device, calls) for product in products for _ in range(repeats + 1))
    return 2.0 * rows * inner * columns / seconds


def _seconds(product: Callable[[], object], device: str, calls: int) -> float:
    """Of one call. The first of all compiles, and counts for nothing because the least is taken."""
    _wait(device)
    began = time.perf_counter()
    for _ in range(calls):
        product()
    _wait(device)
    return (time.perf_counter() - began) / calls


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def ceiling_precision(precision: str) -> str:
    """The precision whose products are the ceiling of this one; int8 is held against bfloat16's, so that modes compare."""
    return "bfloat16" if precision == "int8" else precision


def large_rates(precision: str, device: str, repeats: int = 2) -> dict[Shape, float]:
    return {shape: product_rate(shape, precision, device, repeats) for shape in LARGE[device]}


def model_rates(work: ModelWork, precision: str, device: str, tokens: int) -> dict[Shape, float]:
    """The rates of the model's own products on `tokens` tokens at once: what its shapes allow, which may be less."""
    return {(tokens, k, n): product_rate((tokens, k, n), precision, device) for k, n in work.shapes}


def named(rates: dict[Shape, float]) -> dict[str, float]:
    """GFLOP/s by "MxKxN"."""
    return {"x".join(map(str, shape)): round(rate / 1e9, 1) for shape, rate in rates.items()}

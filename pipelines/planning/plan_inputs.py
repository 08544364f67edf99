"""What a plan is about, from the command's options and the build's own configuration."""

from __future__ import annotations

import dataclasses
import math
import os

from cluster.capacity.workload import Corpus, Fleet, ModelShape, Workload
from operators.encoding.encode_config import configured_model
from operators.encoding.model_folder import ModelSpec
from operators.encoding.weight_files import weight_shapes
from operators.errors import ConfigError
from pipelines.config import RunConfig

OBJECT_BYTES = 256 << 20  # of a source object where the number of objects is not given
# A window ends at the end of a sentence in its last third (operators/chunking/windows.py): on average in the middle of it.
MEAN_WINDOW = 5 / 6
SPECIAL_TOKENS = 2


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the command was asked to plan. None and 0: to be derived."""

    docs: int
    tokens_per_doc: float  # of the text, without special tokens
    bytes_per_doc: float | None = None
    chunks_per_doc: float | None = None
    objects: int = 0
    format: str = "parquet"
    gpu: str = "none"
    nodes: int = 1
    cpus_per_node: int = 0
    memory_per_node: float = 0.0  # bytes
    gpus_per_node: int = 0
    on_s3: bool = True
    is_local: bool = False


def model_shape(config: RunConfig, spec: ModelSpec) -> ModelShape:
    """Sizes of the configured model, from its files' headers."""
    layers = config.encode.num_layers or spec.num_layers
    return ModelShape(spec.name, spec.d, spec.hidden_size, layers, model_weights(spec))


def model_weights(spec: ModelSpec) -> float:
    """Parameters of the model."""
    shapes = weight_shapes(spec.transformer_path) or {}
    return float(sum(math.prod(shape) for shape in shapes.values()))


def workload(asked: Asked, config: RunConfig, bytes_per_token: float) -> Workload:
    """The build that is planned. bytes_per_token: of a text, where `asked` does not say how long the texts are.

    Raises ConfigError for what does not go together.
    """
    spec = configured_model(config.encode)
    tokens, chunks = chunks_of(asked, config, spec)
    num_bytes = asked.bytes_per_doc or asked.tokens_per_doc * bytes_per_token
    objects = asked.objects or max(1, math.ceil(asked.docs * num_bytes / OBJECT_BYTES))
    corpus = Corpus(asked.docs, tokens, num_bytes, chunks, num_objects=min(objects, asked.docs), format=asked.format)
    return Workload(
        corpus,
        model_shape(config, spec),
        fleet_of(asked),
        config.read,
        config.index,
        config.cluster,
        config.encode.workers,
        config.encode.threads_per_worker,
        config.encode.batch_tokens,
        asked.on_s3,
    )


def chunks_of(asked: Asked, config: RunConfig, spec: ModelSpec) -> tuple[float, float]:
    """Tokens of a document that are encoded, with special ones and overlaps, and its chunks; documents of mean length."""
    chunk, length = config.chunk, asked.tokens_per_doc
    limit = (chunk.max_tokens or spec.max_seq_length) - SPECIAL_TOKENS
    if chunk.mode == "truncate":
        return min(length, limit) + SPECIAL_TOKENS, 1.0
    if chunk.mode == "late" and asked.chunks_per_doc is None:
        raise ConfigError("chunk.mode late needs --chunks-per-doc in a plan: it depends on the texts")
    chunks = asked.chunks_per_doc
    if chunks is None:
        step = MEAN_WINDOW * limit - chunk.overlap_tokens
        chunks = 1.0 if length <= limit else 1.0 + math.ceil((length - limit) / max(1.0, step))
    return length + chunks * SPECIAL_TOKENS + (chunks - 1) * chunk.overlap_tokens, float(chunks)


def fleet_of(asked: Asked) -> Fleet:
    """The machines. Raises ConfigError when GPUs are named without a number of them, or the other way round."""
    gpus = asked.gpus_per_node or (0 if asked.gpu == "none" else 1)
    if asked.gpu == "none" and asked.gpus_per_node:
        raise ConfigError(f"--gpus-per-node {asked.gpus_per_node} needs to know which: --gpu h100, a100, l4 or h200")
    return Fleet(asked.nodes, asked.cpus_per_node, asked.memory_per_node, gpus, asked.gpu, asked.is_local)


def this_machine() -> tuple[int, float]:
    """Cores and bytes of memory here."""
    return os.cpu_count() or 1, float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))

"""Settings of the encoder, and what `auto` stands for on this machine."""

from __future__ import annotations

import dataclasses

from operators.encoding.model_folder import ModelSpec, load_spec, resolve_model
from operators.errors import ConfigError
from operators.settings import operational, semantic

PRECISIONS = ("float32", "bfloat16", "float16", "int8")
NEEDS_PRECISION = (
    "encode.precision=auto is decided on the driver's machine, which has no CUDA device, while the encoders get GPUs: set"
    " encode.precision to bfloat16, float16 or float32 (or encode.device=cpu)"
)
MODELS_OWN = "model"  # a prompt setting that leaves the prompt to the model's own settings


@dataclasses.dataclass(frozen=True)
class EncodeConfig:
    """Section `encode` of the configuration."""

    model: str = operational("all-MiniLM-L6-v2", "folder or hub name; the content's fingerprint counts, not the name")
    revision: str = semantic("", "branch, tag or commit of a hub model; empty: the hub's default")
    pooling: str = semantic("", "how to pool a plain transformers folder; empty: as the model's own settings say")
    query_prompt: str = semantic(MODELS_OWN, "text put before each query; 'model': as the model's own settings say")
    document_prompt: str = semantic(MODELS_OWN, "text put before each chunk; 'model': as the model's own settings say")
    num_layers: int = semantic(0, "leave the model after this many layers; 0: all of them")
    truncate_dim: int = semantic(
        0, "leading dimensions of a vector that are kept (Matryoshka models); 0: the model's own"
    )
    outputs: tuple[str, ...] = semantic((), "further columns from the same forward pass: name=dimensions:type")
    precision: str = semantic("auto", "auto, float32, bfloat16, float16 (GPU) or int8 (CPU)")
    attention: str = semantic("auto", "packed (no padding), padded, or auto: packed where the model allows it")
    batch_tokens: int = semantic(16_384, "tokens of a forward pass; what shares a batch changes the rounding")
    threads_per_worker: int = semantic(1, "CPU threads of an encoder; their number changes the rounding")
    min_parity: float = semantic(0.99, "least cosine to plain float32 of each text in the check before a run")
    min_mean_parity: float = semantic(0.999, "least mean cosine to plain float32 in the check before a run")
    device: str = operational("auto", "auto, cpu or cuda")
    workers: int = operational(0, "encoders side by side; 0: as many as fit")

    def __post_init__(self) -> None:
        choices = [
            ("precision", ("auto", *PRECISIONS)),
            ("attention", ("auto", "packed", "padded")),
            ("device", ("auto", "cpu", "cuda")),
        ]
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise ConfigError(f"encode.{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name, least in (
            ("batch_tokens", 1),
            ("threads_per_worker", 1),
            ("workers", 0),
            ("num_layers", 0),
            ("truncate_dim", 0),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"encode.{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("min_parity", "min_mean_parity"):
            if not -1 <= getattr(self, name) <= 1:
                raise ConfigError(f"encode.{name} must be a cosine, in [-1, 1], got {getattr(self, name)}")


def configured_model(config: EncodeConfig) -> ModelSpec:
    """The model that the settings name, as it is on this machine, with the prompts that the settings ask for.

    Raises ConfigError when it cannot be had, lacks a file, or does not go with the settings.
    """
    spec = load_spec(resolve_model(config.model, config.revision), config.pooling)
    prompts = {
        name: getattr(config, name)
        for name in ("query_prompt", "document_prompt")
        if getattr(config, name) != MODELS_OWN
    }
    if spec.num_layers and config.num_layers > spec.num_layers:
        raise ConfigError(
            f"encode.num_layers must be in 0..{spec.num_layers} (layers of {spec.name}), got {config.num_layers}"
        )
    if config.truncate_dim > spec.d_full:
        raise ConfigError(
            f"encode.truncate_dim must be in 0..{spec.d_full} (dimensions of {spec.name}), got {config.truncate_dim}"
        )
    return dataclasses.replace(spec, **prompts, d=config.truncate_dim or spec.d)


def resolve_device(config: EncodeConfig) -> str:
    """`cuda` or `cpu` on this machine; int8 is the CPU's. ConfigError when CUDA is asked for and absent."""
    import torch  # not above: it takes 2 s and 150 MB, and every process of a run knows these settings

    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("encode.device must be auto or cpu on a machine without a CUDA device, got 'cuda'")
    if config.device == "auto" and config.precision == "int8":
        return "cpu"
    return "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"


def resolve_precision(config: EncodeConfig) -> str:
    """What is computed in; `auto` is bfloat16 where this machine's device multiplies it in hardware, else float32."""
    device = resolve_device(config)
    if config.precision == "auto":
        return "bfloat16" if _multiplies_bfloat16(device) else "float32"
    wanted = {"float16": "cuda", "int8": "cpu"}.get(config.precision, device)
    if wanted != device:
        raise ConfigError(
            f"encode.precision {config.precision} needs the device {wanted}, got {device}: use bfloat16 or float32"
        )
    return config.precision


def precision_of_run(config: EncodeConfig) -> str:
    """The precision of all workers of a run, decided on the driver. ConfigError where `auto` cannot be decided there."""
    if config.precision != "auto":
        return config.precision
    import torch

    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(NEEDS_PRECISION)
    return resolve_precision(config)


def _multiplies_bfloat16(device: str) -> bool:
    import torch

    if device == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False))

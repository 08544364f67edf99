"""From packed token states to vectors: the model's poolings, its Dense and LayerNorm layers, its normalisation.

Shapes: T packed tokens, S spans, H hidden dimension, D vector dimension.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from kernels.pool import pool_spans, unit_length
from operators.encoding.model_folder import ModelSpec
from operators.encoding.module_layout import Layer
from operators.encoding.weight_files import weight_files
from operators.errors import ConfigError

Ints = npt.NDArray[np.int64]


class Head:
    """What follows the transformer, in float32 on `device`. The constructor loads the weights of Dense and LayerNorm.

    Raises ConfigError for weights that are not those that the module's settings describe.
    """

    def __init__(self, spec: ModelSpec, device: str) -> None:
        self._poolings = spec.poolings
        self._normalize = spec.normalize
        self._layers = [_module(layer, spec.path / layer.path).to(device).eval() for layer in spec.dense]

    @torch.inference_mode()
    def __call__(
        self, states_TH: torch.Tensor, starts_S: Ints, ends_S: Ints, positions_S: Ints | None = None
    ) -> torch.Tensor:
        """[S, D] float32 vectors of the spans starts_S[s]:ends_S[s] of the states, on their device.

        Spans are rows of states_TH, int64 on the host, in any order, overlapping or not, none empty. positions_S: how
        many tokens of its text stand before each span where these should count for the position-weighted mean.
        D is the model's full dimension, before its truncate_dim. A vector does not depend on the other spans beyond
        rounding. States that are not finite give vectors that are not finite. Raises ValueError for an empty span.
        """
        pooled = [
            pool_spans(states_TH, starts_S, ends_S, mode=mode, positions_S=positions_S) for mode in self._poolings
        ]
        vectors_SD = pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=1)
        for layer in self._layers:
            vectors_SD = layer(vectors_SD)
        return unit_length(vectors_SD) if self._normalize else vectors_SD


class _Dense(torch.nn.Module):
    def __init__(self, layer: Layer, source: Path) -> None:
        super().__init__()
        kind = getattr(torch.nn, layer.activation, None)
        if not (isinstance(kind, type) and issubclass(kind, torch.nn.Module)):
            raise ConfigError(f"activation_function must be a class of torch.nn, got {layer.activation!r} ({source})")
        try:
            self.activation_function = kind()
        except TypeError as error:
            raise ConfigError(
                f"activation_function must need no settings, got {layer.activation!r}: {error} ({source})"
            ) from None
        self.linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias)
        self.adds_input = layer.residual
        if layer.residual and layer.in_features != layer.out_features:
            self.residual = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)

    def forward(self, vectors_SD: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.activation_function(self.linear(vectors_SD))
        if not self.adds_input:
            return found
        return found + (self.residual(vectors_SD) if hasattr(self, "residual") else vectors_SD)


class _LayerNorm(torch.nn.Module):
    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(layer.in_features)

    def forward(self, vectors_SD: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.norm(vectors_SD)
        return found


class _Normalize(torch.nn.Module):
    def forward(self, vectors_SD: torch.Tensor) -> torch.Tensor:
        return unit_length(vectors_SD)


def _module(layer: Layer, folder: Path) -> torch.nn.Module:
    if layer.kind == "normalize":
        return _Normalize()
    module = _Dense(layer, folder) if layer.kind == "dense" else _LayerNorm(layer)
    weights: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            weights |= load_file(file)
        else:
            weights |= torch.load(file, map_location="cpu", weights_only=True)
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"the weights must be those that config.json describes: {reason} ({folder})") from None
    return module.float().requires_grad_(False)

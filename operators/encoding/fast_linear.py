"""Linear layers whose weights are laid out once for this CPU, with the activation that follows them fused in.

Works on any model made of torch.nn.Linear: which activation follows which layer is seen in a trial pass, not read from
the model's family.

Shapes: T tokens, I inputs and O outputs of a layer.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# oneDNN's (name, algorithm) of an activation, by the name of its class in torch or transformers.
_ACTIVATIONS = {
    "GELUActivation": ("gelu", "none"),
    "NewGELUActivation": ("gelu", "tanh"),
    "FastGELUActivation": ("gelu", "tanh"),
    "GELUTanh": ("gelu", "tanh"),
    "PytorchGELUTanh": ("gelu", "tanh"),
    "SiLUActivation": ("swish", ""),
    "SiLU": ("swish", ""),
    "ReLU": ("relu", ""),
}
NO_ACTIVATION = ("none", "")


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this CPU has oneDNN's products for the dtype (float32 or bfloat16)."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class PackedLinear(nn.Module):
    """A torch.nn.Linear whose weight lies as oneDNN wants it, with the activation that follows it."""

    def __init__(self, linear: nn.Linear, activation: tuple[str, str], dtype: torch.dtype) -> None:
        super().__init__()
        weight_OI = linear.weight.detach().to(dtype).contiguous()
        # Some models look at the dtype of their layers' weights. (Opaque: neither a parameter nor a buffer.)
        self.weight: Any = torch.ops.mkldnn._reorder_linear_weight(weight_OI, _EXPECTED_TOKENS)
        self.bias: Any = None if linear.bias is None else linear.bias.detach().to(dtype)
        self._activation, self._algorithm = activation
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self.weight, self.bias, self._activation, [], self._algorithm
        )
        return found


_EXPECTED_TOKENS = 512  # the product's number of rows that the layout of a weight is chosen for


def fused_activations(model: nn.Module, trial: Callable[[], Any]) -> dict[nn.Module, tuple[nn.Module, tuple[str, str]]]:
    """Linear layer to (activation, its oneDNN name) for each whose output goes into that activation, seen in `trial`."""
    outputs: dict[int, tuple[nn.Module, Any]] = {}  # the tensors are kept so that their ids stay theirs
    linears: list[nn.Module] = []
    pairs: dict[nn.Module, list[nn.Module | None]] = {}

    def see_linear(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        linears.append(module)
        outputs[id(output)] = (module, output)

    def see_activation(module: nn.Module, arguments: tuple[Any, ...], _: Any) -> None:
        source = outputs.get(id(arguments[0])) if arguments else None
        pairs.setdefault(module, []).append(None if source is None else source[0])

    hooks = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_hook(see_linear))
        elif type(module).__name__ in _ACTIVATIONS or isinstance(module, nn.GELU):
            hooks.append(module.register_forward_hook(see_activation))
    try:
        trial()
    finally:
        for hook in hooks:
            hook.remove()
    found = {}
    for activation, sources in pairs.items():
        for source in sources:
            if None in sources or source is None or linears.count(source) != 1:
                break
        else:
            found.update({source: (activation, _name(activation)) for source in sources if source is not None})
    return found


def _name(activation: nn.Module) -> tuple[str, str]:
    if isinstance(activation, nn.GELU):
        return "gelu", activation.approximate
    return _ACTIVATIONS[type(activation).__name__]


def replace_linears(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Puts `make(layer)` in the place of every torch.nn.Linear of the model, one by one."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, make(child))


def remove_modules(model: nn.Module, unwanted: set[nn.Module]) -> None:
    """Puts the identity in their place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in unwanted:
                setattr(parent, name, nn.Identity())

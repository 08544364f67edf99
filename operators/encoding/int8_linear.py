"""Linear layers in int8: weights scaled by output, activations by token as they come, sums in int32.

Shapes: T tokens, I inputs and O outputs of a layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn


class Int8Linear(nn.Module):
    """A torch.nn.Linear computed in int8; takes and gives bfloat16.

    Each output's weights, and each token's inputs, are divided by a hundred and twenty-seventh of their largest. Inputs
    that are far larger than the others (`largest_I`, seen in a trial pass) are first scaled down and their weights up,
    by the square root of the ratio of both (SmoothQuant, arXiv 2211.10438, section 4, alpha 0.5).
    """

    def __init__(self, linear: nn.Linear, largest_I: torch.Tensor) -> None:
        super().__init__()
        weight_OI = linear.weight.detach().float()
        smallest = 1e-5
        smooth_I = (largest_I.clamp_min(smallest) / weight_OI.abs().amax(dim=0).clamp_min(smallest)).sqrt()
        weight_OI = weight_OI * smooth_I
        scale_O1 = (weight_OI.abs().amax(dim=1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        # Plain attributes: converting the model's dtype leaves them alone.
        self.weight: Any = torch.round(weight_OI / scale_O1).to(torch.int8)
        self._factor_I = 1 / smooth_I
        self._scale_O = scale_O1[:, 0].contiguous()
        self._bias_O = torch.zeros(len(weight_OI)) if linear.bias is None else linear.bias.detach().float()
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_TI = x.reshape(-1, self.in_features)
        codes_TI, scale_T = _quantized(x_TI, self._factor_I)
        sums_TO = torch._int_mm(codes_TI, self.weight.t())
        return self._scaled(sums_TO, scale_T).view(*x.shape[:-1], self.out_features)

    def _scaled(self, sums_TO: torch.Tensor, scale_T: torch.Tensor) -> torch.Tensor:
        if (compiled := _compiled()) is None:
            return (sums_TO.float() * scale_T[:, None] * self._scale_O + self._bias_O).bfloat16()
        out_TO = torch.empty(sums_TO.shape, dtype=torch.bfloat16)
        compiled.scale_sums(
            sums_TO.numpy(), scale_T.numpy(), self._scale_O.numpy(), self._bias_O.numpy(), _bits_of(out_TO)
        )
        return out_TO


def _quantized(x_TI: torch.Tensor, factor_I: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes and float32 scales of the rows times `factor_I`; a row with NaN or an infinity has the scale NaN."""
    if (compiled := _compiled()) is None:
        x_TI = x_TI.float() * factor_I
        largest_T = x_TI.abs().amax(dim=1)
        scale_T = torch.where(torch.isfinite(largest_T), largest_T / 127, torch.nan)
        inverse_T = torch.where(largest_T > 1e-37, 127 / largest_T, 0)
        return torch.round(torch.nan_to_num(x_TI) * inverse_T[:, None]).to(torch.int8), scale_T
    x_TI = x_TI.contiguous()
    codes_TI = torch.empty(x_TI.shape, dtype=torch.int8)
    scale_T = torch.empty(len(x_TI))
    compiled.quantize_rows(_bits_of(x_TI), factor_I.numpy(), codes_TI.numpy(), scale_T.numpy())
    return codes_TI, scale_T


def largest_inputs(model: nn.Module, trial: Callable[[], Any]) -> dict[nn.Module, torch.Tensor]:
    """The largest magnitude of each input of each torch.nn.Linear in a trial pass, float32 [I]."""
    found: dict[nn.Module, torch.Tensor] = {}

    def see(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        largest_I = arguments[0].detach().abs().flatten(0, -2).amax(dim=0).float()
        found[module] = torch.maximum(found[module], largest_I) if module in found else largest_I

    hooks = [m.register_forward_pre_hook(see) for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        trial()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _bits_of(x: torch.Tensor) -> Any:
    """A bfloat16 tensor's memory as uint16; numpy has no bfloat16."""
    return x.view(torch.int16).numpy().view(np.uint16)


@functools.cache
def _compiled() -> Any:
    """The compiled loops; None where numba is missing, and then slower operations give the same up to rounding."""
    try:
        from operators.encoding import int8_compiled
    except ImportError:
        return None
    return int8_compiled

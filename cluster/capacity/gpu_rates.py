"""Tokens a second of one GPU that others have published. None is ours: no GPU could be had when this was written."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.capacity.coefficients import Coefficient
from cluster.capacity.workload import ModelShape
from operators.errors import ConfigError

GPUS = ("none", "a100", "h100", "h200", "l4")
CITED = "cited, not measured by us"
# Documents/s of one A100 without reading and writing, in float16, 1M MS MARCO passages of about 68 tokens.
_SOURCE = "IgniteMS README, one A100, fp16, 1M MS MARCO passages of ~68 tokens, no I/O"
_PASSAGE_TOKENS = 68


@dataclass(frozen=True)
class CitedRate:
    """A public figure: documents/s of a model with so many layers of such width."""

    model: str
    layers: int
    hidden: int
    docs_per_s: float


_A100 = (
    CitedRate("e5-small", 12, 384, 50_127),
    CitedRate("e5-base", 12, 768, 17_319),
    CitedRate("e5-large", 24, 1024, 5_610),
)
AT_LEAST_AN_A100 = ("a100", "h100", "h200")


def cited_rate(gpu: str, model: ModelShape) -> Coefficient:
    """Tokens/s of one GPU for the smallest published model that is no smaller than this one. Raises ConfigError.

    A larger model's rate is too low for a smaller one, and an A100's for its successors: both err on the safe side.
    """
    found = [rate for rate in _A100 if rate.layers >= model.layers and rate.hidden >= model.hidden]
    if gpu not in AT_LEAST_AN_A100 or not found:
        what = f"a {gpu}" if gpu not in AT_LEAST_AN_A100 else f"{model.layers} layers of {model.hidden} dimensions"
        raise ConfigError(
            f"there is neither a measurement of ours nor a public figure for {what}: measure on yours with"
            " `vectormill plan --calibrate --out gpu.json`, give that with --calibration gpu.json, or say"
            " --tokens-per-s-per-gpu"
        )
    rate = min(found, key=lambda rate: rate.layers * rate.hidden)
    notes = []
    if (rate.layers, rate.hidden) != (model.layers, model.hidden):
        notes.append(
            f"for {rate.model} ({rate.layers} layers of {rate.hidden}), no figure for {model.layers} of {model.hidden}"
        )
    if gpu != "a100":
        notes.append(f"an A100's, no figure for the {gpu}")
    note = "; ".join(notes) + ": expect more" if notes else ""
    return Coefficient(rate.docs_per_s * _PASSAGE_TOKENS, "tokens/s a GPU", f"{CITED}: {_SOURCE}", note)

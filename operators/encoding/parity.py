"""The check before a run: the fast path, in the run's own batches, against plain float32, text by text.

Shapes: N vectors compared, S sequences, D vector dimension.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from operators.encoding.encode_config import EncodeConfig, resolve_device
from operators.encoding.head import Head
from operators.encoding.load_model import load_model
from operators.encoding.model_folder import ModelSpec
from operators.encoding.text_encoder import Spans


@dataclasses.dataclass(frozen=True)
class Parity:
    """Cosines of the run's vectors to plain float32 ones. `worst`: index of the least."""

    num_vectors: int
    mean: float
    minimum: float
    worst: int

    def problem(self, config: EncodeConfig) -> str:
        """Which bound of the settings is not kept; "" if all are."""
        if self.num_vectors and not self.minimum >= config.min_parity:
            return f"each cosine must be at least {config.min_parity} (encode.min_parity), got {self.minimum:.6f}"
        if self.num_vectors and not self.mean >= config.min_mean_parity:
            return f"the mean cosine must be at least {config.min_mean_parity} (encode.min_mean_parity), got {self.mean:.6f}"
        return ""


def compare(found_ND: npt.NDArray[np.float32], plain_ND: npt.NDArray[np.float32]) -> Parity:
    """Cosines of the rows. NaN counts as -1; two zero vectors are the same."""
    norms_N = np.linalg.norm(found_ND.astype(np.float64), axis=1) * np.linalg.norm(plain_ND.astype(np.float64), axis=1)
    products_N = (found_ND.astype(np.float64) * plain_ND.astype(np.float64)).sum(axis=1)
    cosines_N = np.divide(products_N, norms_N, out=np.full(len(norms_N), -1.0), where=norms_N > 0)
    cosines_N[~found_ND.any(axis=1) & ~plain_ND.any(axis=1)] = 1.0
    cosines_N = np.nan_to_num(cosines_N, nan=-1.0)
    if not len(cosines_N):
        return Parity(0, 1.0, 1.0, 0)
    worst = int(np.argmin(cosines_N))
    return Parity(len(cosines_N), float(cosines_N.mean()), float(cosines_N[worst]), worst)


def plain_vectors(
    config: EncodeConfig, spec: ModelSpec, sequences: list[npt.NDArray[np.int64]], spans: Spans
) -> npt.NDArray[np.float32]:
    """[N, D] float32: transformers' own forward pass in float32, one sequence a batch, no packing, nothing replaced."""
    device = resolve_device(config)
    model: Any = load_model(spec.transformer_path, config.num_layers).to(device)
    head = Head(spec, device)
    vectors_ND = np.empty((len(spans.sequence_N), spec.d), np.float32)
    with torch.inference_mode():
        for number, sequence in enumerate(sequences):
            ids = torch.from_numpy(sequence).to(device)[None]
            states_TH = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
            wanted = np.flatnonzero(spans.sequence_N == number)
            start_N = spans.start_N[wanted]
            full_ND = head(states_TH, start_N, spans.end_N[wanted], positions_S=start_N)
            vectors_ND[wanted] = full_ND[:, : spec.d].cpu().numpy()
    return vectors_ND

"""What follows the transformer: any spans of the packed states, each as if it were alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels import reference
from operators.encoding.head import Head
from operators.encoding.model_folder import ModelSpec, load_spec
from operators.encoding.module_layout import POOLINGS, Layer
from operators.errors import ConfigError
from tests.operators.encoding.tiny_models import save_family

STARTS = np.array([0, 3, 0, 60, 10, 11, 63])
ENDS = np.array([3, 40, 64, 64, 11, 40, 64])


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return load_spec(save_family("bert", tmp_path_factory.mktemp("bert")))


def states(num_tokens: int = 64, num_dims: int = 32) -> torch.Tensor:
    return torch.randn(num_tokens, num_dims, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mode", POOLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalize", [True, False])
def test_spans_may_overlap_leave_tokens_out_and_come_in_any_order(
    mode: str, dtype: torch.dtype, normalize: bool, spec: ModelSpec
) -> None:
    states_TH = states().to(dtype)
    head = Head(dataclasses.replace(spec, poolings=(mode,), normalize=normalize), "cpu")
    found = head(states_TH, STARTS, ENDS)
    assert found.dtype == torch.float32
    for n, (start, end) in enumerate(zip(STARTS, ENDS, strict=True)):
        part = states_TH[start:end].float().numpy()
        expected = reference.pooled(part, np.array([0, end - start]), mode, normalize)[0]
        np.testing.assert_allclose(found[n].numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", POOLINGS)
def test_a_spans_vector_has_the_same_bits_alone_and_among_others(mode: str, spec: ModelSpec) -> None:
    head = Head(dataclasses.replace(spec, poolings=(mode,)), "cpu")
    together = head(states(), STARTS, ENDS)
    for n in range(len(STARTS)):
        assert torch.equal(head(states(), STARTS[n : n + 1], ENDS[n : n + 1])[0], together[n])


def test_several_poolings_stand_side_by_side(spec: ModelSpec) -> None:
    both = Head(dataclasses.replace(spec, poolings=("max", "mean"), normalize=False), "cpu")(states(), STARTS, ENDS)
    for n, mode in enumerate(("max", "mean")):
        alone = Head(dataclasses.replace(spec, poolings=(mode,), normalize=False), "cpu")(states(), STARTS, ENDS)
        assert torch.equal(both[:, 32 * n : 32 * (n + 1)], alone)


def test_positions_before_a_span_count_for_the_weighted_mean_alone(spec: ModelSpec) -> None:
    start, end, before = np.array([20]), np.array([30]), np.array([5])
    part = states()[20:30].double().numpy()
    weights = np.arange(6, 16)
    for mode in POOLINGS:
        head = Head(dataclasses.replace(spec, poolings=(mode,), normalize=False), "cpu")
        found = head(states(), start, end, before)[0].numpy()
        if mode == "weighted_mean":
            np.testing.assert_allclose(found, weights @ part / weights.sum(), rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_array_equal(found, head(states(), start, end)[0].numpy())


def test_no_spans_give_no_vectors(spec: ModelSpec) -> None:
    none = np.empty(0, np.int64)
    for mode in POOLINGS:
        assert Head(dataclasses.replace(spec, poolings=(mode,)), "cpu")(states(), none, none).shape == (0, 32)


@pytest.mark.parametrize(("start", "end"), [(5, 5), (7, 5), (-1, 5), (60, 65)])
def test_a_span_without_tokens_is_named(start: int, end: int, spec: ModelSpec) -> None:
    with pytest.raises(ValueError, match=f"at least one of the 64 rows, got {start}:{end} in span 1"):
        Head(spec, "cpu")(states(), np.array([0, start]), np.array([1, end]))


@pytest.mark.parametrize("mode", POOLINGS)
def test_states_that_are_not_finite_show_in_their_spans_and_in_no_other(mode: str, spec: ModelSpec) -> None:
    states_TH = states()
    states_TH[10] = float("nan")
    found = Head(dataclasses.replace(spec, poolings=(mode,)), "cpu")(states_TH, STARTS, ENDS)
    holds = (STARTS <= 10) & (ENDS > 10)
    if mode in ("cls", "last"):
        holds = np.array([10]) == (STARTS if mode == "cls" else ENDS - 1)
    np.testing.assert_array_equal(torch.isnan(found).any(dim=1).numpy(), holds)


def test_weights_that_are_not_those_of_the_settings_are_refused(spec: ModelSpec, tmp_path: Path) -> None:
    torch.save({"linear.weight": torch.zeros(8, 16)}, tmp_path / "pytorch_model.bin")
    layer = Layer("dense", "", 32, 8, False, "Tanh")
    with pytest.raises(ConfigError, match=r"size mismatch for linear.weight.*\(" + str(tmp_path)):
        Head(dataclasses.replace(spec, path=tmp_path, dense=(layer,)), "cpu")
    for name in ("NoSuchThing", "functional", "Linear"):
        with pytest.raises(ConfigError, match=f"activation_function must .* got '{name}'"):
            Head(dataclasses.replace(spec, path=tmp_path, dense=(layer._replace(activation=name),)), "cpu")

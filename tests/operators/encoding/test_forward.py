"""The forward pass: packed like padded for every family, fast layers like plain ones. Tiny random weights."""

from __future__ import annotations

import functools
import hashlib
import inspect
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from torch.nn.attention.varlen import varlen_attn

from operators.encoding import forward, packed_attention
from operators.encoding.forward import ForwardPass
from operators.encoding.packed_attention import MaskRule, Segments
from operators.errors import ConfigError

SIZES: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
GROUPED = {**SIZES, "num_key_value_heads": 1, "head_dim": 32}


def _bert(**changes: Any) -> Any:
    return transformers.BertModel(transformers.BertConfig(**{**SIZES, **changes}))


def _qwen3(**changes: Any) -> Any:
    return transformers.Qwen3Model(transformers.Qwen3Config(**{**GROUPED, **changes}))


def _mistral() -> Any:
    return transformers.MistralModel(transformers.MistralConfig(**GROUPED, sliding_window=6))


def _distilbert() -> Any:
    return transformers.DistilBertModel(
        transformers.DistilBertConfig(
            vocab_size=200, dim=64, n_layers=3, n_heads=2, hidden_dim=96, max_position_embeddings=128
        )
    )


def _modernbert() -> Any:
    special: dict[str, Any] = {
        "cls_token_id": 2,
        "sep_token_id": 3,
        "local_attention": 8,
        "global_attn_every_n_layers": 3,
    }
    return transformers.ModernBertModel(transformers.ModernBertConfig(**SIZES, **special))


def _gemma3() -> Any:
    return transformers.Gemma3TextModel(
        transformers.Gemma3TextConfig(**GROUPED, sliding_window=8, use_bidirectional_attention=True)
    )


def _t5() -> Any:
    return transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=200, d_model=64, d_kv=32, d_ff=96, num_layers=3, num_heads=2)
    )


PACKED: dict[str, Callable[[], Any]] = {
    "bert": _bert,
    "roberta": lambda: transformers.RobertaModel(transformers.RobertaConfig(**SIZES)),
    "xlm-roberta": lambda: transformers.XLMRobertaModel(transformers.XLMRobertaConfig(**SIZES)),
    "distilbert": _distilbert,
    "modernbert": _modernbert,
    "qwen3": _qwen3,
    "qwen3-bidirectional": lambda: _qwen3(is_causal=False),
    "llama": lambda: transformers.LlamaModel(transformers.LlamaConfig(**GROUPED)),
    "mistral-sliding": _mistral,
    "gemma3-bidirectional": _gemma3,
}
PADDED: dict[str, Callable[[], Any]] = {
    "mpnet": lambda: transformers.MPNetModel(transformers.MPNetConfig(**SIZES)),
    "t5": _t5,
}
FAMILIES = {**PACKED, **PADDED}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a family's model, its weights larger than a fresh model's, so that attention and order matter."""

    def find(family: str) -> Path:
        path = tmp_path_factory.getbasetemp() / "forward" / family
        if not path.exists():
            torch.manual_seed(0)
            model = FAMILIES[family]()
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    if weight.ndim == 2 and "embed" not in name and "relative" not in name:
                        weight.mul_(4)
            transformers.utils.logging.disable_progress_bar()
            model.save_pretrained(path)
        return path

    return find


@functools.cache
def _plain(path: Path) -> ForwardPass:
    """The pass in float32, as it comes; shared by the tests, none of which changes it."""
    return ForwardPass(path)


def _batch(lengths: list[int], seed: int = 0) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return np.random.default_rng(seed).integers(4, 200, int(offsets[-1])), offsets


MIXED = [1, 40, 5, 5, 33, 100, 2, 17]


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def _cosines(found: torch.Tensor, expected: torch.Tensor, offsets: npt.NDArray[np.int64]) -> torch.Tensor:
    pooled = [torch.stack([x[a:b].float().mean(0) for a, b in itertools.pairwise(offsets)]) for x in (found, expected)]
    return torch.nn.functional.cosine_similarity(pooled[0], pooled[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_gives_what_the_model_gives_for_each_text_alone(family: str, folder: Callable[[str], Path]) -> None:
    ids, offsets = _batch(MIXED)
    found = _plain(folder(family))(ids, offsets)
    plain = FAMILIES[family]().from_pretrained(folder(family)).eval()
    with torch.inference_mode():
        alone = [plain(input_ids=torch.from_numpy(ids[a:b])[None]) for a, b in itertools.pairwise(offsets)]
    expected = torch.cat([output.last_hidden_state[0] for output in alone])
    assert found.shape == (len(ids), 64)
    assert _difference(found, expected) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_and_padded_passes_agree_and_the_choice_is_told(family: str, folder: Callable[[str], Path]) -> None:
    automatic, padded = _plain(folder(family)), ForwardPass(folder(family), attention="padded")
    assert automatic.attention == ("packed" if family in PACKED else "padded")
    assert bool(automatic.attention_reason) == (family in PADDED)
    assert padded.attention == "padded" and padded.attention_reason
    ids, offsets = _batch(MIXED, seed=1)
    assert _difference(automatic(ids, offsets), padded(ids, offsets)) < 1e-5
    assert automatic.hidden_size == 64


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("precision", "cosine"), [("bfloat16", 0.999), ("int8", 0.99)])
def test_lower_precisions_stay_close(family: str, precision: str, cosine: float, folder: Callable[[str], Path]) -> None:
    ids, offsets = _batch(MIXED)
    found = ForwardPass(folder(family), precision=precision)(ids, offsets)
    expected = _plain(folder(family))(ids, offsets)
    if family == "t5":  # its scores are not scaled down, so these large weights make rounding count for more
        cosine = 0.99
    assert _cosines(found, expected, offsets).min() > cosine


def test_a_padding_token_inside_a_text_has_the_position_that_the_model_gives_it(folder: Callable[[str], Path]) -> None:
    ids, offsets = _batch(MIXED)
    ids[[10, 60]] = SIZES["pad_token_id"]
    packed, padded = (ForwardPass(folder("roberta"), attention=way)(ids, offsets) for way in ("packed", "padded"))
    assert _difference(packed, padded) < 1e-5


def test_packing_is_refused_by_name_where_the_model_does_not_allow_it(folder: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match="encode.attention must be auto or padded.*position ids"):
        ForwardPass(folder("t5"), attention="packed")


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_a_text_does_not_depend_on_its_neighbours(precision: str, folder: Callable[[str], Path]) -> None:
    model = ForwardPass(folder("bert"), precision=precision)
    ids, offsets = _batch(MIXED)
    whole = model(ids, offsets)
    for s in range(len(MIXED)):
        own = slice(offsets[s], offsets[s + 1])
        alone = model(ids[own], np.array([0, MIXED[s]]))
        assert _difference(whole[own], alone) < {"float32": 1e-5}.get(precision, 2e-2)


def test_the_same_batch_gives_the_same_bits(folder: Callable[[str], Path]) -> None:
    ids, offsets = _batch(MIXED * 12)
    for precision in ("float32", "bfloat16", "int8"):
        model = ForwardPass(folder("bert"), precision=precision)
        assert torch.equal(model(ids, offsets), model(ids, offsets))


def test_small_batches_are_padded_by_few_rows_and_warming_takes_every_size(folder: Callable[[str], Path]) -> None:
    forward = ForwardPass(folder("bert"))
    seen: list[int] = []

    def note(module: torch.nn.Module, arguments: tuple[object, ...], keywords: dict[str, torch.Tensor]) -> None:
        seen.append(keywords["input_ids"].shape[1])

    forward._model.register_forward_pre_hook(note, with_kwargs=True)
    for num_tokens in range(1, 200):
        forward(np.full(num_tokens, 7), np.array([0, *range(40, num_tokens, 40), num_tokens]))
    added = np.array(seen) - np.arange(1, 200)
    assert added.min() == 0
    assert (added[:64].max(), added[64:128].max(), added[128:].max()) == (3, 7, 15)
    asked = set(seen)
    seen.clear()
    forward.warm(199, 60.0)
    assert seen == sorted(asked)
    seen.clear()
    forward.warm(199, -1.0)
    assert seen == []


def test_blocks_are_a_function_of_the_lengths_and_the_number_of_threads_changes_no_bit(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "_BLOCK_TOKENS", 100)
    model = ForwardPass(folder("bert"), precision="bfloat16")
    ids, offsets = _batch(MIXED * 3)
    assert len(forward._blocks(offsets)) > 2
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(model(ids, offsets))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert", "qwen3", "t5", "mpnet"])
def test_early_exit_is_the_model_cut_after_that_layer(family: str, folder: Callable[[str], Path]) -> None:
    ids, offsets = _batch(MIXED)
    found = ForwardPass(folder(family), num_layers=2)(ids, offsets)
    whole = _plain(folder(family))(ids, offsets)
    plain = FAMILIES[family]().from_pretrained(folder(family)).eval()
    lists = [m for m in plain.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3]
    del lists[0][2:]
    plain.config.num_hidden_layers = 2
    with torch.inference_mode():
        first = plain(input_ids=torch.from_numpy(ids[1:41])[None]).last_hidden_state[0]
    assert _difference(found[1:41], first) < 1e-5
    assert _difference(found, whole) > 1e-2


def test_early_exit_beyond_the_model_is_refused(folder: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match="num_layers must be in 1..3.*got 4"):
        ForwardPass(folder("bert"), num_layers=4)


def test_missing_weights_are_refused(folder: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder("bert") / "model.safetensors")
    weights.pop("encoder.layer.1.output.dense.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder("bert") / "config.json").read_bytes())
    with pytest.raises(ConfigError, match="missing keys.*encoder.layer.1.output.dense.weight"):
        ForwardPass(tmp_path)


def test_settings_that_cannot_be_used_are_refused(folder: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match="precision must be one of"):
        ForwardPass(folder("bert"), precision="fp8")
    with pytest.raises(ConfigError, match="float16 needs a CUDA device"):
        ForwardPass(folder("bert"), precision="float16")


def test_a_number_that_is_not_finite_is_not_hidden(folder: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder("bert") / "model.safetensors")
    weights["encoder.layer.1.attention.self.key.bias"][0] = torch.nan
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder("bert") / "config.json").read_bytes())
    ids, offsets = _batch(MIXED)
    for precision in ("float32", "bfloat16"):
        found = ForwardPass(tmp_path, attention="padded", precision=precision)(ids, offsets)
        assert not torch.isfinite(found).any()


@pytest.mark.parametrize(("left", "right"), [(-1, -1), (-1, 0), (6, 6), (40, 0)])
@pytest.mark.parametrize(("heads", "key_heads", "dim"), [(3, 3, 32), (4, 2, 64), (2, 1, 128)])
def test_compiled_attention_is_that_of_torch(heads: int, key_heads: int, dim: int, left: int, right: int) -> None:
    torch.manual_seed(0)
    offsets = np.concatenate([[0], np.cumsum([1, 5, 33, 100, 64, 7])]).astype(np.int64)
    query, key, value = (torch.randn(1, h, int(offsets[-1]), dim).bfloat16() for h in (heads, key_heads, key_heads))
    if not packed_attention.has_compiled(query):
        pytest.skip("needs numba and a CPU with AVX512-BF16")
    segments = Segments.of(offsets, query.device)

    def mask(length: int) -> torch.Tensor:
        seen = torch.ones(length, length, dtype=torch.bool)
        return seen.tril(right if right >= 0 else length).triu(-left if left >= 0 else -length)

    rule = MaskRule(mask)
    window = rule.window(segments.max_length)
    assert window == (left, right)
    found = packed_attention._attend_compiled(query, key, value, segments, window, dim**-0.5)
    expected = packed_attention._attend_grouped(query.float(), key.float(), value.float(), segments, rule, dim**-0.5)
    assert _difference(found, expected) < 4e-3  # 2^-9 each for the shares and the result
    broken = query.clone()
    broken[0, 0, 8, 0] = torch.nan
    again = packed_attention._attend_compiled(broken, key, value, segments, window, dim**-0.5)
    assert again[0, 8, 0].isnan().all()
    assert int(again.isnan().any(dim=-1).sum()) == 1


def test_the_kernel_for_gpus_is_called_as_torch_declares_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def stand_in(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **names: Any) -> torch.Tensor:
        calls.append((query, key, value, *rest, names))
        return query

    declared = inspect.signature(varlen_attn)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    segments = Segments.of(np.array([0, 3, 10, 17]), torch.device("cpu"))
    query, key = torch.randn(1, 4, 17, 32), torch.randn(1, 2, 17, 32)
    found = packed_attention._attend_varlen(query, key, key, segments, (-1, 0), 0.5)
    assert found.shape == (1, 17, 4, 32)
    query_THD, key_TKD, _, first, second, longest, longest_key, names = calls[0]
    declared.bind(query_THD, key_TKD, key_TKD, first, second, longest, longest_key, **names)
    assert query_THD.shape == (17, 4, 32) and key_TKD.shape == (17, 2, 32)
    assert first.dtype == torch.int32 and first.tolist() == [0, 3, 10, 17] and longest == 7
    assert names == {"scale": 0.5, "window_size": (-1, 0), "enable_gqa": True}
    assert segments.groups == [(0, 1, 3), (3, 2, 7)]


@pytest.mark.parametrize("name", ["attention_compiled", "int8_compiled"])
def test_compiled_loops_are_compiled_again_when_the_instructions_they_use_change(name: str) -> None:
    folder = Path(packed_attention.__file__).parent
    digest = hashlib.sha256((folder / "vector_code.py").read_bytes()).hexdigest()[:16]
    assert f'_VECTOR_CODE = "{digest}"' in (folder / f"{name}.py").read_text(), f"put {digest} into {name}.py"

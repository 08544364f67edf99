"""A trained quantizer means the same to faiss, and neither the file's length nor how it is read changes what it gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from kernels import ivfpq as module
from kernels.assign import assign_nearest
from kernels.assign_two_level import assign_two_level
from kernels.ivfpq import IvfPq, encode_blocks, quantizer_bytes, train_ivfpq, training_bytes
from tests.kernels.array_paths import metrics, taken

Float32Array = npt.NDArray[np.float32]


def rows(num_rows: int, num_dims: int, seed: int = 0) -> Float32Array:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).standard_normal((30, num_dims))
    x = centres[rng.integers(0, 30, num_rows)] + rng.standard_normal((num_rows, num_dims))
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), np.float32)


def same_bits(one: IvfPq, other: IvfPq) -> bool:
    return (
        one.centroids_KD.tobytes() == other.centroids_KD.tobytes()
        and one.codebooks_MKS.tobytes() == other.codebooks_MKS.tobytes()
        and (one.slack, one.share) == (other.slack, other.share)
    )


def faiss_index_of(quantizer: IvfPq) -> Any:
    """An empty IndexIVFPQ with the quantizer's centroids and codebooks."""
    faiss = pytest.importorskip("faiss")
    (nlist, num_dims), (M, num_codewords, _) = quantizer.centroids_KD.shape, quantizer.codebooks_MKS.shape
    ip = quantizer.metric == "ip"
    coarse = faiss.IndexFlatIP(num_dims) if ip else faiss.IndexFlatL2(num_dims)
    metric = faiss.METRIC_INNER_PRODUCT if ip else faiss.METRIC_L2
    index = faiss.IndexIVFPQ(coarse, num_dims, nlist, M, num_codewords.bit_length() - 1, metric)
    coarse.this.disown()
    index.own_fields = True
    coarse.add(quantizer.centroids_KD)
    faiss.copy_array_to_vector(quantizer.codebooks_MKS.ravel(), index.pq.centroids)
    index.is_trained = True
    if not ip:
        index.precompute_table()
    return index


def filled(quantizer: IvfPq, list_no_N: npt.NDArray[np.int32], codes: npt.NDArray[np.uint8]) -> Any:
    """An IndexIVFPQ that holds our lists and codes."""
    faiss = pytest.importorskip("faiss")
    index = faiss_index_of(quantizer)
    assert codes.shape[1] == index.code_size
    for list_no in np.unique(list_no_N):
        ids = np.flatnonzero(list_no_N == list_no).astype(np.int64)
        own = np.ascontiguousarray(codes[ids])
        index.invlists.add_entries(int(list_no), len(ids), faiss.swig_ptr(ids), faiss.swig_ptr(own))
    index.ntotal = len(codes)
    return index


@metrics
@pytest.mark.parametrize(
    ("num_dims", "M", "nbits"), [(32, 8, 8), (24, 24, 8), (36, 3, 8), (32, 16, 4), (21, 7, 4), (5, 1, 4), (33, 11, 8)]
)
def test_faiss_searches_our_codes_exactly_as_those_it_makes_itself(
    metric: str, num_dims: int, M: int, nbits: int
) -> None:
    x, queries = rows(3001, num_dims), rows(60, num_dims, seed=1)
    quantizer = train_ivfpq(x, nlist=37, M=M, nbits=nbits, metric=metric, seed=0, iterations=4, pq_iterations=4)
    ours = filled(quantizer, *quantizer.encode(x))
    theirs = faiss_index_of(quantizer)
    theirs.add(x)
    for nprobe in (1, 5, 37):
        ours.nprobe = theirs.nprobe = nprobe
        (our_scores, our_ids), (their_scores, their_ids) = ours.search(queries, 20), theirs.search(queries, 20)
        np.testing.assert_array_equal(our_ids, their_ids)
        np.testing.assert_array_equal(our_scores, their_scores)


@metrics
@pytest.mark.parametrize("exact", [True, False])
def test_faiss_agrees_beyond_max_exact_lists_where_every_vector_goes_to_its_nearest(
    metric: str, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_EXACT_LISTS", 30)
    x = rows(4000, 16)
    quantizer = train_ivfpq(x, nlist=100, M=4, nbits=4, metric=metric, seed=0, exact=exact)
    list_no_N, _ = quantizer.encode(x)
    nearest_N = assign_nearest(x, quantizer.centroids_KD, metric=metric)
    if exact:
        assert quantizer.slack == float("inf")
        assert quantizer.share == 1.0
        np.testing.assert_array_equal(list_no_N, nearest_N)
        index = faiss_index_of(quantizer)  # owns the coarse quantizer
        theirs = index.quantizer.search(x, 1)[1][:, 0]
        np.testing.assert_array_equal(list_no_N, theirs)
    else:
        assert 0 <= quantizer.slack < float("inf")
        assert quantizer.share >= module.SHARE
        assert (list_no_N == nearest_N).mean() == pytest.approx(quantizer.share, abs=0.01)
        again = assign_two_level(x, quantizer.groups, slack=quantizer.slack)
        np.testing.assert_array_equal(list_no_N, again)


def test_few_vectors_and_more_lists_than_vectors_train_and_encode() -> None:
    for num_rows, nlist in ((1, 1), (1, 5), (20, 50), (257, 3)):
        x = rows(num_rows, 8)
        quantizer = train_ivfpq(x, nlist=nlist, M=2, nbits=8, metric="l2", seed=0)
        list_no_N, codes = quantizer.encode(x)
        assert list_no_N.shape == (num_rows,)
        assert codes.shape == (num_rows, 2)
        assert list_no_N.max() < nlist
    empty = quantizer.encode(rows(0, 8))
    assert (empty[0].shape, empty[1].shape) == ((0,), (0, 2))
    assert list(encode_blocks(rows(0, 8), quantizer)) == []


@metrics
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_blocks_give_what_one_go_gives_and_a_mapped_file_what_an_array_gives(
    metric: str, dtype: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_EXACT_LISTS", 30)
    x: npt.NDArray[Any] = rows(5000, 24).astype(dtype)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    settings: dict[str, Any] = {"nlist": 50, "M": 6, "nbits": 4, "metric": metric, "seed": 3, "train_rows": 2500}
    quantizer = train_ivfpq(x, **settings)
    assert same_bits(train_ivfpq(mapped, **settings), quantizer)
    assert same_bits(train_ivfpq(mapped, **settings, budget_bytes=400 << 20), quantizer)
    list_no_N, codes = quantizer.encode(x)
    own_bytes, row_bytes = quantizer_bytes(50, 24), module.BLOCK_SHARE * 4 * 24
    for source in (x, mapped):
        for budget_bytes, least in ((own_bytes + row_bytes * 777, 7), (2 << 30, 1), (own_bytes + row_bytes, 5000)):
            few = source if least < 5000 else source[:40]
            blocks = list(encode_blocks(few, quantizer, budget_bytes=budget_bytes))
            assert len(blocks) == min(least, len(few))
            assert [start for start, _, _ in blocks] == [
                0,
                *np.cumsum([len(lists) for _, lists, _ in blocks])[:-1].tolist(),
            ]
            np.testing.assert_array_equal(np.concatenate([lists for _, lists, _ in blocks]), list_no_N[: len(few)])
            np.testing.assert_array_equal(np.concatenate([own for _, _, own in blocks]), codes[: len(few)])


@metrics
def test_training_is_the_same_for_any_number_of_threads_and_without_numba(
    metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_EXACT_LISTS", 30)
    x = rows(1500, 18)
    settings: dict[str, Any] = {"nlist": 40, "M": 3, "nbits": 4, "metric": metric, "seed": 1, "iterations": 4}
    first = train_ivfpq(x, **settings)
    list_no_N, codes = first.encode(x)
    threads = torch.get_num_threads()
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            assert same_bits(train_ivfpq(x, **settings), first)
    finally:
        torch.set_num_threads(threads)
    with taken("numpy"):
        again = train_ivfpq(x, **settings)
        assert same_bits(again, first)
        for one, other in zip(again.encode(x), (list_no_N, codes), strict=True):
            np.testing.assert_array_equal(one, other)
    assert not same_bits(train_ivfpq(x, **{**settings, "seed": 2}), first)


def test_the_sample_has_a_row_of_each_stretch_in_their_order() -> None:
    x = np.arange(1000, dtype=np.float32)[:, None]
    drawn = module._drawn_rows(x, 70, seed=0)[:, 0]
    edges = np.arange(71) * 1000 // 70
    assert (drawn >= edges[:-1]).all()
    assert (drawn < edges[1:]).all()
    np.testing.assert_array_equal(module._drawn_rows(x, 70, seed=0)[:, 0], drawn)
    assert (module._drawn_rows(x, 70, seed=1)[:, 0] != drawn).any()
    np.testing.assert_array_equal(module._drawn_rows(x, 1000, seed=0), x)


def test_a_budget_that_training_does_not_fit_in_is_refused_before_anything_is_read() -> None:
    x = np.broadcast_to(np.zeros((1, 256), np.float32), (2_000_000, 256))  # takes no memory
    needed = training_bytes(50 * 40_000, 256, 40_000)
    assert needed > 2 << 30
    with pytest.raises(
        ValueError, match=rf"must fit in budget_bytes \(2147483648\), but 2000000 rows .* {needed}: lower"
    ):
        train_ivfpq(x, nlist=40_000, M=8, metric="l2", seed=0)
    with pytest.raises(ValueError, match=r"must fit in budget_bytes \(1000\)"):
        train_ivfpq(rows(100, 8), nlist=4, M=2, metric="l2", seed=0, budget_bytes=1000)


def test_a_budget_that_the_quantizer_does_not_fit_in_is_refused_by_encoding() -> None:
    x = rows(100, 8)
    quantizer = train_ivfpq(x, nlist=40, M=2, nbits=4, metric="l2", seed=0)
    with pytest.raises(ValueError, match=r"must fit in budget_bytes \(5000\), but a quantizer of 40 lists and 8"):
        next(encode_blocks(x, quantizer, budget_bytes=5000))


def test_stages_are_told_in_their_order() -> None:
    heard: list[str] = []
    train_ivfpq(rows(300, 8), nlist=4, M=2, nbits=4, metric="l2", seed=0, on_stage=heard.append)
    assert heard == ["sample", "coarse", "codebooks"]


def test_wrong_arguments_are_named() -> None:
    x = rows(100, 8)
    for wrong, message in (
        ({"nlist": 0}, "nlist must be at least 1, got 0"),
        ({"M": 3}, "M must"),
        ({"nbits": 5}, "nbits must"),
        ({"metric": "cosine"}, "metric must be one of ip, l2, got 'cosine'"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ):
        settings: dict[str, Any] = {"nlist": 4, "M": 2, "metric": "l2", "seed": 0, **wrong}
        with pytest.raises(ValueError, match=message):
            train_ivfpq(x, **settings)
    with pytest.raises(ValueError, match="at least one row"):
        train_ivfpq(x[:0], nlist=4, M=2, metric="l2", seed=0)
    x[31, 2] = np.nan
    with pytest.raises(ValueError, match="row 31 holds"):
        train_ivfpq(x, nlist=4, M=2, metric="l2", seed=0)
    quantizer = train_ivfpq(x[:30], nlist=4, M=2, metric="l2", seed=0)
    with pytest.raises(ValueError, match="row 31 holds"):
        quantizer.encode(x)

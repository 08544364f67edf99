from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import minhash as minhash_module
from kernels import reference
from kernels.minhash import minhash, minhash_similarity

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

# minhash of the two segments of test_the_bits_are_those_written_down.
WRITTEN_DOWN = [[1627816972, 2573246123, 466744777], [3429119212, 2935849923, 2483450938]]


def packed(documents: list[Int32Array]) -> tuple[Int32Array, Int64Array]:
    offsets = np.concatenate([[0], np.cumsum([len(document) for document in documents])]).astype(np.int64)
    return np.concatenate([np.empty(0, np.int32), *documents]), offsets


def random_documents(seed: int, lengths: list[int], vocabulary: int = 30000) -> list[Int32Array]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocabulary, length).astype(np.int32) for length in lengths]


@given(
    seed=st.integers(0, 2**64 - 1),
    lengths=st.lists(st.integers(1, 30), max_size=8),
    shingle=st.integers(1, 9),
    num_hashes=st.integers(1, 20),
)
@settings(max_examples=40, deadline=None)
def test_compiled_loops_and_array_operations_have_the_bits_of_the_reference(
    seed: int, lengths: list[int], shingle: int, num_hashes: int
) -> None:
    tokens, offsets = packed(random_documents(seed % 1000, lengths))
    expected = reference.minhash(tokens, offsets, num_hashes=num_hashes, shingle=shingle, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        got = minhash(tokens, offsets, num_hashes=num_hashes, shingle=shingle, seed=seed)
        np.testing.assert_array_equal(got, expected)
        assert got.dtype == np.uint32
        patch.setattr(minhash_module, "compiled_segments", lambda: None)
        patch.setattr(minhash_module, "TILE_SHINGLES", 7)  # a segment over several tiles, and several in one
        got = minhash(tokens, offsets, num_hashes=num_hashes, shingle=shingle, seed=seed)
        np.testing.assert_array_equal(got, expected)


def test_the_bits_are_those_written_down() -> None:
    tokens, offsets = np.array([5, 1, 4, 2**32 - 1, 0, 7, 7]), np.array([0, 5, 7])
    got = minhash(tokens, offsets, num_hashes=3, shingle=3, seed=42)
    # From the formulas of the module's docstring: signatures that are stored must stay comparable.
    np.testing.assert_array_equal(got, WRITTEN_DOWN)


@pytest.mark.parametrize("true_similarity", [0.0, 0.2, 0.5, 0.9])
def test_the_estimate_is_unbiased_within_four_sigma(true_similarity: float) -> None:
    num_pairs, num_hashes, num_shingles = 300, 128, 400
    documents = []
    shared = round(num_shingles * true_similarity)
    alone = (num_shingles - shared) // 2
    for pair in range(num_pairs):
        # Shingles of one token, all different, so that the true similarity is known.
        tokens = np.arange(pair * num_shingles, (pair + 1) * num_shingles, dtype=np.int32)
        documents += [tokens[: shared + alone], np.concatenate([tokens[:shared], tokens[shared + alone :]])]
    signatures = minhash(*packed(documents), num_hashes=num_hashes, shingle=1, seed=7)
    estimates = minhash_similarity(signatures[0::2], signatures[1::2])
    truth = shared / num_shingles
    sigma = (truth * (1 - truth) / num_hashes) ** 0.5
    assert abs(estimates.mean() - truth) <= 4 * sigma / num_pairs**0.5
    # Each pair alone is as good as independent hashes would make it: the spread is that of a binomial.
    assert (np.abs(estimates - truth) <= 5 * sigma).all()
    assert estimates.std() <= 1.2 * sigma


def test_two_documents_that_share_text_are_estimated_by_their_shingles() -> None:
    one, two = random_documents(0, [1000, 500])
    # 5-shingles: 996 of the first, of which 596 and 396 are in the second.
    other = np.concatenate([one[:600], two, one[600:]])
    sets = [{tuple(document[i : i + 5]) for i in range(len(document) - 4)} for document in (one, other)]
    truth = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
    signatures = minhash(*packed([one, other]), num_hashes=1024, seed=0)
    sigma = (truth * (1 - truth) / 1024) ** 0.5
    assert abs(float(minhash_similarity(signatures[0], signatures[1])) - truth) <= 4 * sigma


def test_equal_documents_have_equal_signatures_and_neighbours_do_not_matter() -> None:
    documents = random_documents(0, [1, 4, 5, 6, 300, 20, 300])
    documents[6] = documents[4].copy()
    tokens, offsets = packed(documents)
    signatures = minhash(tokens, offsets, seed=3)
    np.testing.assert_array_equal(signatures[4], signatures[6])
    for segment, (start, end) in enumerate(pairwise(offsets)):
        alone = minhash(tokens[start:end], np.array([0, end - start]), seed=3)
        np.testing.assert_array_equal(alone[0], signatures[segment])
    order = np.random.default_rng(1).permutation(len(documents))
    moved = minhash(*packed([documents[i] for i in order]), seed=3)
    np.testing.assert_array_equal(moved, signatures[order])


def test_token_order_within_a_shingle_counts_and_repeats_do_not() -> None:
    one = np.array([1, 2, 3, 4, 5], np.int32)
    signatures = minhash(*packed([one, one[::-1].copy(), np.tile(one[:1], 5), np.tile(one[:1], 9)]), seed=0)
    assert minhash_similarity(signatures[0], signatures[1]) < 0.05
    np.testing.assert_array_equal(signatures[2], signatures[3])


def test_a_document_shorter_than_a_shingle_is_one_shingle() -> None:
    short = [np.array(tokens, np.int32) for tokens in ([7], [7, 7], [7, 7, 7], [0], [0, 0], [0, 7])]
    signatures = minhash(*packed(short), seed=0)
    assert len(np.unique(signatures, axis=0)) == len(short)


def test_the_seed_changes_signatures_and_more_hashes_only_add_columns() -> None:
    tokens, offsets = packed(random_documents(0, [200, 50]))
    signatures = minhash(tokens, offsets, num_hashes=64, seed=0)
    assert (signatures != minhash(tokens, offsets, num_hashes=64, seed=1)).mean() > 0.99
    np.testing.assert_array_equal(minhash(tokens, offsets, num_hashes=256, seed=0)[:, :64], signatures)


def test_threads_blocks_and_integer_types_do_not_change_the_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, offsets = packed(random_documents(0, [3, 900, 40, 1, 2000, 70, 70, 5]))
    whole = minhash(tokens, offsets, seed=0)
    threads = torch.get_num_threads()
    try:
        for num_threads, block_tokens in ((1, 1 << 16), (2, 100), (3, 1)):
            torch.set_num_threads(num_threads)
            monkeypatch.setattr(minhash_module, "BLOCK_TOKENS", block_tokens)
            np.testing.assert_array_equal(minhash(tokens, offsets, seed=0), whole)
    finally:
        torch.set_num_threads(threads)
    for dtype in (np.uint16, np.int64, np.uint32, np.uint64):
        np.testing.assert_array_equal(minhash(tokens.astype(dtype), offsets, seed=0), whole)
    np.testing.assert_array_equal(minhash(torch.from_numpy(tokens), torch.from_numpy(offsets), seed=0), whole)


def test_no_segments_give_no_signatures() -> None:
    assert minhash(np.empty(0, np.int32), np.zeros(1, np.int64), num_hashes=9, seed=0).shape == (0, 9)


def test_wrong_arguments_are_named() -> None:
    tokens, offsets = packed(random_documents(0, [3, 4]))
    with pytest.raises(ValueError, match="segment 1 holds 0"):
        minhash(tokens, np.array([0, 3, 3, 7]), seed=0)
    with pytest.raises(ValueError, match=r"number of tokens \(7\), got 0 to 6"):
        minhash(tokens, np.array([0, 6]), seed=0)
    with pytest.raises(ValueError, match=r"0..2\^32 - 1: token 5 is -1"):
        minhash(np.where(np.arange(7) == 5, -1, tokens), offsets, seed=0)
    with pytest.raises(ValueError, match="token 0 is 4294967296"):
        minhash(np.full(7, 1 << 32), offsets, seed=0)
    with pytest.raises(ValueError, match="tokens must be integers"):
        minhash(tokens.astype(np.float32), offsets, seed=0)
    with pytest.raises(ValueError, match="num_hashes must be at least 1, got 0"):
        minhash(tokens, offsets, num_hashes=0, seed=0)
    with pytest.raises(ValueError, match="shingle must be at least 1, got 0"):
        minhash(tokens, offsets, shingle=0, seed=0)
    with pytest.raises(ValueError, match="seed must be in .* got -1"):
        minhash(tokens, offsets, seed=-1)
    with pytest.raises(ValueError, match="signatures must be uint32"):
        minhash_similarity(np.zeros((2, 3), np.uint32), np.zeros((2, 4), np.uint32))

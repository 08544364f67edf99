"""The index that the service is measured on: real texts, and vectors of which a part is real and the rest lies between those.

Encoding 200,000 texts takes many minutes on two cores, so ANCHORS of them are encoded by the model, and every other text has
a vector between those of an anchor and one of its nearest, a little off the line. All else is the real `build`. Query texts
are encoded by the real model.

A anchors, D dimensions.
"""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

import operators.encoder
from benchmarks.texts import SCHEMA, texts_of_lengths, write_corpus
from cluster import in_process
from operators.artifact.index import Index
from operators.encoding.encode_config import EncodeConfig, configured_model
from operators.encoding.text_encoder import Spans, TextEncoder
from operators.encoding.tokenizer import load_tokenizer
from operators.storage.store import open_store
from pipelines.build import build
from pipelines.config import load_config
from pipelines.operating_points import measure_operating_points
from pipelines.telemetry.progress import RunProgress
from pipelines.update import UpdateOptions, update
from pipelines.versions import versions_in

MODEL = "all-MiniLM-L6-v2"
ANCHORS = 24_000
PASSAGES = 80_000  # the docstrings that every installation has give a few more
NEIGHBOURS = 12
ENCODED_AT_ONCE = 2000
OFF_THE_LINE = 0.25  # length of the random part beside a vector of length 1
MIN_TOKENS, MAX_TOKENS = 8, 26
VERSION = 1  # of this recipe: an index of another one is made anew

MORE = UpdateOptions(append=True, min_recall=0.0)

Floats = npt.NDArray[np.float32]


class AnchoredEncoder(TextEncoder):
    """A TextEncoder that looks vectors up, or makes them, from the token ids."""

    attention, attention_reason = "packed", ""
    anchors_AD: Floats
    near_AK: npt.NDArray[np.int64]
    of_ids: dict[bytes, int]

    def setup(self) -> None:
        """Nothing to load."""

    def encode_ids(self, ids: Any, spans: Spans | None = None) -> Floats:
        """float32 [N, D] of unit length. Every sequence is one span here: the texts are short."""
        flat, offsets = ids if isinstance(ids, tuple) else _flattened(ids)
        return np.stack([self._vector(flat[a:b]) for a, b in itertools.pairwise(offsets)])

    def _vector(self, ids_T: npt.NDArray[Any]) -> Floats:
        data = np.asarray(ids_T, np.int64).tobytes()
        if data in self.of_ids:
            return self.anchors_AD[self.of_ids[data]]
        rng = np.random.default_rng(zlib.crc32(data))
        first = int(rng.integers(len(self.anchors_AD)))
        second = self.near_AK[first, int(rng.integers(self.near_AK.shape[1]))]
        share = float(rng.uniform(0.2, 0.8))
        aside: Floats = np.asarray(rng.standard_normal(self.anchors_AD.shape[1], np.float32))
        aside = aside * np.float32(OFF_THE_LINE / np.linalg.norm(aside))
        found = (1 - share) * self.anchors_AD[first] + share * self.anchors_AD[second] + aside
        return np.asarray(found / np.linalg.norm(found), np.float32)


def _plain_vectors(config: Any, spec: Any, ids: Any, spans: Spans) -> Floats:
    return AnchoredEncoder(config, spec).encode_ids(_flattened(ids), spans)


def _flattened(ids: Any) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    offsets = np.concatenate([[0], np.cumsum([len(sequence) for sequence in ids])]).astype(np.int64)
    return np.concatenate([np.asarray(sequence, np.int64) for sequence in ids]), offsets


def _num_anchors(num_texts: int) -> int:
    return min(ANCHORS, num_texts)


def served_index(folder: Path, num_texts: int, threads: int) -> tuple[Path, list[str]]:
    """(root of an index of `num_texts` with operating points, its texts). What lies in `folder` from before is used again."""
    folder.mkdir(parents=True, exist_ok=True)
    num_anchors = _num_anchors(num_texts)
    texts_file, root = folder / f"texts-{num_texts}.json", folder / f"index-{num_texts}-{num_anchors}-v{VERSION}"
    if texts_file.exists():
        texts: list[str] = json.loads(texts_file.read_text())
    else:
        texts = _texts(num_texts)
        texts_file.write_text(json.dumps(texts))
    done = root.with_suffix(".done")
    if not done.exists():
        shutil.rmtree(root, ignore_errors=True)
        vectors = _anchor_vectors(folder, texts, num_anchors, threads)
        _build(root, folder / "corpus" / "texts.parquet", texts, vectors, threads)
        measure_operating_points(str(root))
        done.touch()
    return root, texts


def _texts(count: int) -> list[str]:
    """Passages of docstrings, and beyond as many as there are, pairs of them: all distinct."""
    passages = texts_of_lengths(min(count, PASSAGES), MODEL, MIN_TOKENS, MAX_TOKENS)
    pairs = [
        f"{passages[number % PASSAGES]} {passages[(number + number // PASSAGES * 7919) % PASSAGES]}"
        for number in range(PASSAGES, count)
    ]
    return passages + pairs


def _anchor_vectors(folder: Path, texts: list[str], num_anchors: int, threads: int) -> Floats:
    """[A, D], kept in `folder` in steps, so that a run that was ended goes on where it was."""
    config = EncodeConfig(model=MODEL, threads_per_worker=threads)
    encoder = TextEncoder(config, configured_model(config))
    parts = []
    for number, begin in enumerate(range(0, num_anchors, ENCODED_AT_ONCE)):
        part = folder / f"anchors-{num_anchors}.{number}.npy"
        if not part.exists():
            np.save(part, encoder.encode_texts(texts[begin : min(begin + ENCODED_AT_ONCE, num_anchors)]))
        parts.append(np.load(part))
    return np.concatenate(parts)


def second_version(folder: Path, root: Path, texts: list[str]) -> tuple[str, str]:
    """Names of the first version and of one with 200 documents more, made now unless it is there."""
    found = versions_in(open_store(str(root)))
    if len(found) == 1:
        anchors_AD = _anchor_vectors(folder, texts, _num_anchors(len(texts)), 1)
        with tempfile.TemporaryDirectory() as name, _anchored(texts, anchors_AD):
            more = Path(name) / "more.parquet"
            rows = [[f"more{number:04d}" for number in range(200)], [f"{text} again" for text in texts[:200]]]
            pq.write_table(pa.table(rows, schema=SCHEMA), more)
            update([str(more)], str(root), lambda base: load_config(None, ["cluster.where=process"], base=base), MORE)
        found = versions_in(open_store(str(root)))
    return found[0], found[-1]


@contextmanager
def _anchored(texts: list[str], anchors_AD: Floats) -> Iterator[None]:
    """Runs in this process take their vectors from AnchoredEncoder."""
    import faiss

    flat = faiss.IndexFlatIP(anchors_AD.shape[1])
    flat.add(anchors_AD)
    AnchoredEncoder.anchors_AD = anchors_AD
    AnchoredEncoder.near_AK = flat.search(anchors_AD, NEIGHBOURS + 1)[1][:, 1:]
    tokenizer = load_tokenizer(configured_model(EncodeConfig(model=MODEL)))
    ids = tokenizer.encode_batch(texts[: len(anchors_AD)])
    AnchoredEncoder.of_ids = {np.asarray(found.ids, np.int64).tobytes(): place for place, found in enumerate(ids)}
    in_process.forget_encoder()
    try:
        with (
            mock.patch.object(operators.encoder, "TextEncoder", AnchoredEncoder),
            mock.patch.object(operators.encoder, "plain_vectors", _plain_vectors),
        ):
            yield
    finally:
        in_process.forget_encoder()


def _build(root: Path, corpus: Path, texts: list[str], anchors_AD: Floats, threads: int) -> None:
    write_corpus(corpus, texts, len(texts), 10_000)
    settings = load_config(None, ["cluster.where=process", f"encode.threads_per_worker={threads}"])
    with _anchored(texts, anchors_AD):
        build([str(corpus)], str(root), settings, progress=RunProgress())


def open_served(root: Path) -> Index:
    """The published version."""
    return Index.open(open_store(str(root)))


@dataclass
class PlainFaiss:
    """A faiss IndexRefine over an IndexIVFPQ, and what they only hold pointers to."""

    refined: Any
    ivfpq: Any
    kept: tuple[Any, ...]

    def search(self, queries_Qd: Floats, k: int) -> tuple[Floats, npt.NDArray[np.int64]]:
        """Scores and row ids [Q, k]."""
        scores, row_ids = self.refined.search(queries_Qd, k)
        return scores, row_ids


def plain_faiss(index: Index, nprobe: int, refine_factor: int) -> PlainFaiss:
    """What one would load in a process of one's own: lists and float16 vectors in memory, ids are row ids.

    The same codes, centroids and codebooks; IndexRefine scores refine_factor * k candidates again.
    """
    import faiss

    ivfpq, d = index.quantizer.to_faiss(), index.manifest.d
    lists = faiss.ArrayInvertedLists(index.manifest.nlist, index.quantizer.code_size)
    vectors = np.empty((index.manifest.next_row_id, d), np.float32)
    for part in index.parts:
        list_no, row_ids, codes = part.read_codes(part.first_list, part.end_list)
        vectors[row_ids] = part.read_vectors(0, len(row_ids))
        bounds = np.searchsorted(list_no, np.arange(part.first_list, part.end_list + 1)).tolist()
        for number, (lo, hi) in enumerate(itertools.pairwise(bounds), part.first_list):
            if hi > lo:
                ids, some = np.ascontiguousarray(row_ids[lo:hi]), np.ascontiguousarray(codes[lo:hi])
                lists.add_entries(number, hi - lo, faiss.swig_ptr(ids), faiss.swig_ptr(some))
    ivfpq.replace_invlists(lists, False)
    ivfpq.ntotal, ivfpq.nprobe = len(vectors), nprobe
    metric = faiss.METRIC_INNER_PRODUCT if index.manifest.metric == "ip" else faiss.METRIC_L2
    stored = faiss.IndexScalarQuantizer(d, faiss.ScalarQuantizer.QT_fp16, metric)
    stored.train(vectors[:1000])
    stored.add(vectors)
    refined = faiss.IndexRefine(ivfpq, stored)
    refined.k_factor = refine_factor
    return PlainFaiss(refined, ivfpq, (lists, stored))


def held_out(folder: Path, count: int, threads: int) -> tuple[list[str], Floats]:
    """Passages that are not in the index, and their vectors by the real model, float32 [count, D]. Kept in `folder`."""
    texts_file, vectors_file = folder / f"heldout-{count}.json", folder / f"heldout-{count}.npy"
    if not vectors_file.exists():
        every = texts_of_lengths(PASSAGES + 10_000, MODEL, MIN_TOKENS, MAX_TOKENS)
        known = set(texts_of_lengths(PASSAGES, MODEL, MIN_TOKENS, MAX_TOKENS))
        texts = [text for text in every if text not in known][:count]
        texts_file.write_text(json.dumps(texts))
        config = EncodeConfig(model=MODEL, threads_per_worker=threads)
        np.save(vectors_file, TextEncoder(config, configured_model(config)).encode_queries(texts))
    return json.loads(texts_file.read_text()), np.load(vectors_file)

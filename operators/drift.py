"""How well a version's quantizer fits its segments, from a sample of their entries.

n sampled rows, L lists, d dimensions, B bytes of a code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kernels.pq import pq_decode
from operators.artifact.list_run import RunReader
from operators.artifact.manifest import Segment, read_part_records
from operators.artifact.quantizer import Quantizer
from operators.renumbering import Renumbering
from operators.storage.store import Store

# A part of so many entries or fewer has its codes read whole; of a longer one, runs of neighbours in a few of its lists.
WHOLE_ENTRIES = 16_384
RUN_ENTRIES = 32
CACHE_BYTES = 1 << 20

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Spread:
    """How entries lie in lists. `imbalance`: nlist * sum(p^2), 1 for equal lists; what a scan of a list costs grows by it."""

    num_entries: int
    imbalance: float
    empty_share: float  # of the lists


@dataclass(frozen=True)
class CodeError:
    """Mean squared error of the codes against the stored vectors, and the same in units of the vectors' mean square."""

    num_rows: int
    squared_error: float
    relative_error: float


class SampledSegment:
    """A segment open for sampling."""

    def __init__(self, store: Store, segment: Segment) -> None:
        records = read_part_records(store, segment.parts)
        self.segment = segment
        self.readers = [RunReader(store, r.unit, r.objects, r.facts, CACHE_BYTES) for r in records]
        self.list_sizes_L = np.concatenate([reader.list_sizes_L for reader in self.readers])
        self._store = store

    def sample(
        self, num_rows: int, rng: np.random.Generator
    ) -> tuple[Ints, npt.NDArray[np.uint8], npt.NDArray[np.float16]]:
        """(list_no int64 [n], codes uint8 [n, B], vectors float16 [n, d]) of about `num_rows` live rows, evenly drawn.

        Fewer where most rows are deleted. Neighbours are drawn together, which costs one read for all of them.
        """
        renumbering = Renumbering(self._store, [self.segment])
        total = self.segment.num_rows
        found = []
        for reader in self.readers:
            count = reader.facts["num_entries"]
            wanted = -(-num_rows * count // max(1, total))
            if not count or not wanted:
                continue
            for first, end, position_n in _positions(reader, min(wanted, count), rng):
                list_no, row_ids, codes = reader.read_codes(first, end)
                inside_n = position_n - reader.starts_L[first - reader.first_list]
                inside_n = inside_n[renumbering.find(row_ids[inside_n])[0]]
                vectors = reader.gather_vectors(inside_n + reader.starts_L[first - reader.first_list])
                found.append((list_no[inside_n].astype(np.int64), codes[inside_n], vectors))
        if not found:
            facts = self.readers[0].facts
            nothing = np.empty((0, facts["code_size"]), np.uint8), np.empty((0, facts["d"]), np.float16)
            return np.empty(0, np.int64), *nothing
        list_no, codes, vectors = (np.concatenate(column) for column in zip(*found, strict=True))
        return list_no, codes, vectors


def _positions(reader: RunReader, wanted: int, rng: np.random.Generator) -> list[tuple[int, int, Ints]]:
    """(first list, end, entries of these lists that are drawn), `wanted` entries in all or somewhat fewer."""
    count = reader.facts["num_entries"]
    if count <= WHOLE_ENTRIES:
        return [(reader.first_list, reader.end_list, np.sort(rng.choice(count, wanted, replace=False)))]
    # Evenly spaced from a random start: every entry is as likely as any other to begin a run, whatever list it is in.
    num_runs = -(-wanted // RUN_ENTRIES)
    begins = ((np.arange(num_runs) + rng.random()) * (count / num_runs)).astype(np.int64)
    lists = np.searchsorted(reader.starts_L, begins, side="right") - 1
    drawn = []
    for number in np.unique(lists).tolist():
        lo, hi = reader.starts_L[number : number + 2].tolist()
        runs = begins[lists == number][:, None] + np.arange(RUN_ENTRIES)
        # A run that passes the end of its list goes on at the list's beginning.
        drawn.append(
            (reader.first_list + number, reader.first_list + number + 1, np.unique(lo + (runs - lo) % (hi - lo)))
        )
    return drawn


def code_error(quantizer: Quantizer, segments: Sequence[SampledSegment], num_rows: int, seed: int) -> CodeError | None:
    """Error of about `num_rows` rows drawn evenly from the segments together; None where none is live. Deterministic."""
    rng = np.random.default_rng(seed)
    total = sum(each.segment.num_rows for each in segments)
    squared, energy, count = 0.0, 0.0, 0
    for each in segments:
        share = -(-num_rows * each.segment.num_rows // max(1, total))
        list_no, codes, vectors = each.sample(min(share, each.segment.num_rows), rng)
        x_nd = vectors.astype(np.float32)
        decoded_nd = quantizer.centroids_Kd[list_no] + pq_decode(codes, quantizer.codebooks_MKd)
        squared += float(np.square(x_nd - decoded_nd, dtype=np.float64).sum())
        energy += float(np.square(x_nd, dtype=np.float64).sum())
        count += len(list_no)
    if not count:
        return None
    return CodeError(count, squared / count, squared / max(energy, np.finfo(np.float64).tiny))


def spread(list_sizes_L: Ints) -> Spread:
    """Spread of entries over lists of these sizes, deleted ones included.

    faiss's imbalance factor nlist * sum(n^2) / (sum n)^2, without the share of it that chance alone gives to few entries:
    sum(n (n - 1)) / (N (N - 1)) is the unbiased estimate of sum(p^2), so a small delta can be set against the base.
    """
    n_L = list_sizes_L.astype(np.float64)
    total = n_L.sum()
    imbalance = len(n_L) * float((n_L * (n_L - 1)).sum()) / (total * (total - 1)) if total > 1 else 1.0
    return Spread(int(total), imbalance, float((n_L == 0).mean()))

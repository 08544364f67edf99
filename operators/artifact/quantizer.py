"""The trained, empty index: coarse centroids and PQ codebooks, stored as an ordinary faiss IndexIVFPQ without entries.

K lists, d dimensions, M sub-quantizers, N vectors, B bytes of a code.

How a vector finds its list is no part of that object, for faiss has no place for it: the manifest keeps it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from kernels.ivfpq import IvfPq
from operators.artifact.list_assignment import NEAREST, ListAssignment
from operators.errors import IntegrityError
from operators.storage.checked import CheckedFile, ObjectEntry, put_checked
from operators.storage.commits import new_attempt
from operators.storage.store import Store


@dataclass(frozen=True, eq=False)
class Quantizer:
    """centroids float32 [K, d], codebooks float32 [M, 2^nbits, d / M]. Codes hold residuals to the centroid."""

    metric: str
    centroids_Kd: np.ndarray
    codebooks_MKd: np.ndarray
    nbits: int
    assignment: ListAssignment = NEAREST

    @property
    def d(self) -> int:
        return int(self.centroids_Kd.shape[1])

    @property
    def nlist(self) -> int:
        return int(self.centroids_Kd.shape[0])

    @property
    def M(self) -> int:
        return int(self.codebooks_MKd.shape[0])

    @property
    def code_size(self) -> int:
        return (self.M * self.nbits + 7) // 8

    @cached_property
    def _kernels(self) -> IvfPq:
        """Kept with the quantizer, because it keeps the groups of a two-level assignment."""
        rule = self.assignment
        return IvfPq(self.metric, self.centroids_Kd, self.codebooks_MKd, rule.seed, rule.slack, rule.share)

    def encode(self, vectors_Nd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(list_no int32 [N], codes uint8 [N, B]) of float16 or float32 vectors. A row's result depends on it alone."""
        return self._kernels.encode(vectors_Nd)

    def to_faiss(self) -> Any:
        """A new, empty faiss.IndexIVFPQ with these centroids and codebooks."""
        import faiss

        metric = faiss.METRIC_INNER_PRODUCT if self.metric == "ip" else faiss.METRIC_L2
        coarse = faiss.IndexFlatIP(self.d) if self.metric == "ip" else faiss.IndexFlatL2(self.d)
        coarse.add(self.centroids_Kd)
        index = faiss.IndexIVFPQ(coarse, self.d, self.nlist, self.M, self.nbits, metric)
        coarse.this.disown()
        index.own_fields = True
        faiss.copy_array_to_vector(self.codebooks_MKd.ravel(), index.pq.centroids)
        index.is_trained = True
        if self.metric == "l2":
            index.precompute_table()
        return index

    @cached_property
    def serialized(self) -> bytes:
        """The bytes of the .faissindex file."""
        import faiss

        return bytes(faiss.serialize_index(self.to_faiss()).tobytes())

    @property
    def digest(self) -> str:
        """SHA-256 of the serialized index: shards and parts name the quantizer by it."""
        return hashlib.sha256(self.serialized).hexdigest()

    def write(self, store: Store) -> ObjectEntry:
        """Store it as a new object, under a name that begins with its digest.

        The name is this call's own: an object that a version, a run or gc deletes is never one that another writes again.
        """
        return put_checked(store, f"quantizers/{self.digest}-{new_attempt()}.faissindex", self.serialized)


def read_quantizer(store: Store, entry: ObjectEntry, assignment: ListAssignment = NEAREST) -> Quantizer:
    """Quantizer from its object, and the version's assignment, which encoding needs (searching and faiss do not).

    Raises IntegrityError when the object is damaged or is another one.
    """
    import faiss

    data = CheckedFile(store, entry).readall()
    digest = hashlib.sha256(data).hexdigest()
    if digest != entry.sha256 or digest not in entry.key:
        raise IntegrityError(f"quantizer {store.url}/{entry.key} has SHA-256 {digest}, expected {entry.sha256}")
    owner = faiss.deserialize_index(np.frombuffer(data, np.uint8))  # downcast_index returns a view: keep the owner
    index = faiss.downcast_index(owner)
    coarse = faiss.downcast_index(index.quantizer)
    centroids = coarse.reconstruct_n(0, index.nlist)
    codebooks = faiss.vector_to_array(index.pq.centroids).reshape(index.pq.M, index.pq.ksub, index.pq.dsub)
    metric = "ip" if index.metric_type == faiss.METRIC_INNER_PRODUCT else "l2"
    return Quantizer(metric, centroids, codebooks, int(index.pq.nbits), assignment)

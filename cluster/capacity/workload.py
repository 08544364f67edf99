"""What a plan is about: the corpus, the model, the machines and the settings; and the units of work that follow from them.

Numbers of units are those that the build itself would make: the same functions, or the same arithmetic, as the code named
beside each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

from cluster.preflight import READING_CPUS, StreamPlan
from cluster.session import ClusterConfig
from cluster.supply import Demand, NodeSupply, room_for
from operators.errors import ConfigError
from operators.index_config import IndexConfig, IndexSizes, resolve_sizes
from operators.sources.read_config import ReadConfig

TABLE_DOCUMENTS = 1_000_000  # of one table of the ledger (pipelines/index_build.py)
HASHES_PER_PASS, DOCUMENTS_PER_RUN = 10_000_000, 1_000_000  # pipelines/numbering.py


@dataclass(frozen=True)
class Corpus:
    """What is to be indexed. Bytes and tokens are means; tokens include the special ones of each chunk."""

    num_docs: int
    tokens_per_doc: float
    bytes_per_doc: float  # UTF-8 bytes of the text
    chunks_per_doc: float = 1.0
    id_bytes: float = 16.0
    num_objects: int = 1
    format: str = (
        "parquet"  # pieces of Parquet and of staged objects are cut by rows and bytes, those of JSONL by bytes
    )
    object_bytes: float = 0.0  # of all source objects together as they lie in storage; 0: as many as the texts

    def __post_init__(self) -> None:
        for name, least in (("num_docs", 1), ("tokens_per_doc", 1), ("bytes_per_doc", 1), ("chunks_per_doc", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} of a plan must be at least {least}, got {getattr(self, name)}")
        if self.num_objects < 1:
            raise ConfigError(f"a corpus has at least one source object, got {self.num_objects} (--objects)")

    @property
    def num_vectors(self) -> int:
        return round(self.num_docs * self.chunks_per_doc)

    @property
    def tokens_per_chunk(self) -> float:
        return self.tokens_per_doc / self.chunks_per_doc

    @property
    def num_tokens(self) -> float:
        return self.num_docs * self.tokens_per_doc


@dataclass(frozen=True)
class ModelShape:
    """Of the model what sizes depend on."""

    name: str
    d: int  # of the vectors
    hidden: int
    layers: int
    num_weights: float  # parameters


@dataclass(frozen=True)
class Fleet:
    """The machines, all alike. On one node without a cluster the driver and Ray share it with the workers."""

    num_nodes: int
    cpus_per_node: int
    memory_per_node: float  # bytes
    gpus_per_node: int = 0
    gpu: str = "none"
    is_local: bool = True  # Ray is started on this machine: one CPU slot more than cores (decision 0004)

    def __post_init__(self) -> None:
        for name, least in (("num_nodes", 1), ("cpus_per_node", 1), ("gpus_per_node", 0), ("memory_per_node", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} of a plan must be at least {least}, got {getattr(self, name)}")

    @property
    def num_cores(self) -> int:
        return self.num_nodes * self.cpus_per_node

    @property
    def num_gpus(self) -> int:
        return self.num_nodes * self.gpus_per_node

    @property
    def num_slots(self) -> int:
        """CPU slots that Ray hands out."""
        return self.num_cores + (1 if self.is_local else 0)


@dataclass(frozen=True)
class Workload:
    """A build, and what it is cut into."""

    corpus: Corpus
    model: ModelShape
    fleet: Fleet
    read: ReadConfig = field(default_factory=ReadConfig)
    index: IndexConfig = field(default_factory=IndexConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    workers: int = 0  # encode.workers; 0: as many as fit
    threads_per_worker: int = 1
    batch_tokens: int = 16_384
    on_s3: bool = True

    @property
    def uses_gpu(self) -> bool:
        return self.fleet.num_gpus > 0

    @cached_property
    def docs_per_piece(self) -> float:
        """Documents of a piece (operators/sources/pieces.py)."""
        by_bytes = max(1.0, self.read.piece_bytes / (self.corpus.bytes_per_doc + self.corpus.id_bytes))
        of_object = self.corpus.num_docs / self.corpus.num_objects
        if self.corpus.format == "parquet":
            return max(1.0, min(by_bytes, float(self.read.piece_rows), of_object))
        return min(by_bytes, of_object)

    @cached_property
    def num_pieces(self) -> int:
        """Each object is cut by itself, so its last piece is smaller."""
        of_object = self.corpus.num_docs / self.corpus.num_objects
        return max(1, self.corpus.num_objects * math.ceil(of_object / self.docs_per_piece - 1e-9))

    @property
    def rows_per_piece(self) -> float:
        return self.corpus.num_vectors / self.num_pieces

    @cached_property
    def most_encoders(self) -> int:
        """Encoders that the fleet has room for, as cluster/preflight.py counts them: beside them one CPU slot stays free."""
        fleet = self.fleet
        slots = fleet.cpus_per_node + (1 if fleet.is_local else 0)
        nodes = [NodeSupply(slots, fleet.gpus_per_node)] * fleet.num_nodes
        each = Demand("encoder", 1 if self.uses_gpu else self.threads_per_worker, 1.0 if self.uses_gpu else 0.0)
        return max(1, room_for(each, nodes, READING_CPUS))

    @cached_property
    def num_encoders(self) -> int:
        """Encoders of the pool."""
        return min(self.workers or self.most_encoders, self.num_pieces)

    @property
    def pieces_in_flight(self) -> int:
        """Of the settings' count: blocks of `pieces_per_task` pieces."""
        return self.cluster.pieces_in_flight or 2 * self.num_encoders + 4

    @cached_property
    def pieces_per_task(self) -> int:
        """Pieces that travel as one block through the encoding stages."""
        from cluster.stream import pieces_per_task  # here: it brings what the stages work with

        gpus = 1.0 if self.uses_gpu else 0.0
        plan = StreamPlan(self.num_encoders, self.threads_per_worker, gpus, self.pieces_in_flight)
        return pieces_per_task(plan, self.num_pieces, self.read.piece_bytes)

    @cached_property
    def sizes(self) -> IndexSizes:
        return resolve_sizes(self.index, self.corpus.num_vectors, self.model.d)

    @cached_property
    def pieces_per_shard(self) -> float:
        """Pieces of one group (pipelines/index_build.py group_pieces)."""
        return min(float(self.num_pieces), max(1.0, self.index.shard_rows // max(1.0, self.rows_per_piece)))

    @cached_property
    def num_shards(self) -> int:
        return max(1, math.ceil(self.num_pieces / self.pieces_per_shard - 1e-9))

    @property
    def rows_per_shard(self) -> float:
        return self.corpus.num_vectors / self.num_shards

    @cached_property
    def runs_of_waves(self) -> list[int]:
        """Intermediate runs that each merge wave leaves; empty: the shards are merged at once."""
        waves, runs = [], self.num_shards
        while runs > self.index.merge_fan_in:
            runs = math.ceil(runs / self.index.merge_fan_in)
            waves.append(runs)
        return waves

    @property
    def num_tables(self) -> int:
        """Tables of the ledger."""
        return self._groups_of(TABLE_DOCUMENTS)

    @property
    def num_passes(self) -> int:
        """Passes over the ids' hashes; 1: one task does all (pipelines/numbering.py number_rows)."""
        return math.ceil(self.corpus.num_docs / HASHES_PER_PASS)

    @property
    def num_hash_runs(self) -> int:
        """Runs that the passes read from: none where there is one pass."""
        return self._groups_of(DOCUMENTS_PER_RUN) if self.num_passes > 1 else 0

    def _groups_of(self, documents: int) -> int:
        """Groups of consecutive pieces (pipelines/numbering.py consecutive)."""
        per_piece = self.corpus.num_docs / self.num_pieces
        return max(1, math.ceil(self.num_pieces / max(1, documents // per_piece)))

"""The streaming job: pieces in, commit records out, as one Ray Data pipeline. The only place that calls map_batches.

    read (task) -> clean, chunk and tokenize (task, fused with read) -> encode (fixed actor pool) -> commit (task)

One piece is one row (cluster/parcels.py); one read task makes one block, of one piece or, on GPUs, of a
few (`pieces_per_task`). So nothing that Ray Data does to blocks (coalescing small ones, dropping empty ones) can merge,
split or lose a piece, and a piece that fails travels on as a row with its error while the others complete.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.encoder_pool import EncoderPool, PoolChangedError, run_dataset
from cluster.gpu_sampler import GpuSampler
from cluster.parcels import Parcel, PieceResult, each_piece, envelope, failure, result_of, with_spans
from cluster.preflight import StreamPlan
from cluster.telemetry import TOKEN_BIN, Stopwatch
from operators.chunker import ChunkConfig, Chunker
from operators.cleaner import CleanConfig, Cleaner
from operators.encoding.encode_config import EncodeConfig, configured_model, resolve_device
from operators.encoding.model_folder import ModelSpec
from operators.errors import ConfigError, FingerprintError, SourceChangedError
from operators.piece_store import EncodedPiece, commit_piece, read_table
from operators.query_sample import draw_queries
from operators.sources.pieces import Piece
from operators.sources.read_config import ReadConfig
from operators.sources.readers import PieceReader, PieceRows
from operators.storage.checked import ObjectEntry
from operators.storage.store import open_store

if TYPE_CHECKING:
    from operators.encoder import Encoder

READ_ATTEMPTS = 3
READ_BACKOFF_S = 1.0
REFERENCE_TEXTS = 32
BLOCK_BYTES = 32 << 20  # source bytes of the pieces of a block
BLOCKS_PER_ENCODER = 16
# Ray fuses a task operator into an actor pool when their resource requests are equal, which would tokenize inside the
# encoders. A memory request that the encoders do not have keeps them apart.
READ_MEMORY_BYTES = 512 << 20  # measured: 260 MB with the tokenizer and torch imported, 8192 short rows


@dataclass(frozen=True)
class StreamJob:
    """What every stage needs to know; pickled into the tasks and actors."""

    store_url: str
    run_prefix: str
    inputs: str  # fingerprint digest, stored in every record
    model_fingerprint: str
    read: ReadConfig
    chunk: ChunkConfig
    encode: EncodeConfig
    clean: CleanConfig = field(default_factory=CleanConfig)
    plugins: tuple[tuple[str, str], ...] = ()  # items of plugin_fingerprints(clean) on the driver
    # A query sample: encoders must give its vectors again, or what they make could not be compared with the index.
    reference: ObjectEntry | None = None


def stream_pieces(
    job: StreamJob,
    pieces: Sequence[Piece],
    plan: StreamPlan,
    *,
    piece_bytes: int,
    stall_timeout_s: float,
    wait_for_nodes_s: float = 0.0,
    check: Callable[[], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Iterator[PieceResult]:
    """Run all pieces; yields each as it is committed or has failed, in no particular order.

    When nodes are lost it goes on with as many encoders as there is room for; `say` tells. Raises ResourceError when there
    is room for none for `wait_for_nodes_s` or otherwise no piece ends for `stall_timeout_s`, OSError when the store takes
    no more.
    `check` is called about once a second.
    """
    pool = EncoderPool(plan, wait_for_nodes_s, say)
    left = {piece.piece_id: piece for piece in pieces}
    while left:
        dataset = _dataset(job, list(left.values()), pool.plan, piece_bytes)
        try:
            for line in run_dataset(dataset, pool, stall_timeout_s=stall_timeout_s, check=check):
                result = result_of(line)
                left.pop(result.piece.piece_id, None)
                yield result
            return
        except PoolChangedError:
            continue


def run_piece(job: StreamJob, piece: Piece, encode: EncodeStage) -> PieceResult:
    """One piece through all stages in this process. encode: an EncodeStage."""
    (read,) = _read(job, piece)
    (line,) = _commit(encode(_chunk(read, job), job), job).to_pylist()
    return result_of(line)


def _dataset(job: StreamJob, pieces: Sequence[Piece], plan: StreamPlan, piece_bytes: int) -> Any:
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext, ExecutionResources

    context = DataContext.get_current()
    context.target_max_block_size = None  # a piece is never split
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.memory_usage_poll_interval_s = None  # Ray Data would start a thread in every task to look at its memory
    context.issue_detectors_config.detectors = []  # advice to programmers of Ray Data; ours is measured by benchmarks
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    together = pieces_per_task(plan, len(pieces), piece_bytes)
    groups = [pieces[begin : begin + together] for begin in range(0, len(pieces), together)]
    # Blocks between the stages are what memory is spent on: bound them by the pieces in flight, not by the object store.
    in_flight_bytes = plan.pieces_in_flight * together * max(2 * piece_bytes, 1 << 20)
    context.execution_options.resource_limits = ExecutionResources(object_store_memory=in_flight_bytes)
    tasks = {"num_cpus": 1, "memory": READ_MEMORY_BYTES}
    dataset = ray.data.read_datasource(_piece_source(job, groups), override_num_blocks=len(groups), **tasks)
    dataset = dataset.map_batches(
        _chunk, batch_size=None, batch_format="pyarrow", zero_copy_batch=True, fn_kwargs={"job": job}, **tasks
    )
    dataset = dataset.map_batches(
        EncodeStage,
        batch_size=together,  # a block: Ray Data 2.60 does not take None where GPUs are asked for
        batch_format="pyarrow",
        zero_copy_batch=True,
        fn_constructor_kwargs={"job": job},
        fn_kwargs={"job": job},
        # Two calls an actor: the next block is fetched, and the last one stored, while this one is encoded. Ray Data runs
        # the stage itself in one thread all the same.
        compute=ActorPoolStrategy(
            size=min(plan.workers, len(groups)), max_concurrent_calls_per_actor=2, max_tasks_in_flight_per_actor=2
        ),
        num_cpus=plan.cpus_per_worker,
        num_gpus=plan.gpus_per_worker,
    )
    return dataset.map_batches(
        _commit, batch_size=None, batch_format="pyarrow", zero_copy_batch=True, fn_kwargs={"job": job}, **tasks
    )


def pieces_per_task(plan: StreamPlan, num_pieces: int, piece_bytes: int) -> int:
    """How many pieces travel as one block through the stages; each is committed by itself all the same.

    A block costs about 100 ms of CPU of Ray's own (60 to 140, benchmarks/scaling.py): 2% of what a CPU takes to encode a piece,
    as much as to read and tokenize one for a GPU. More than a few blocks an encoder are left, so that all end together.
    """
    if not plan.gpus_per_worker:
        return 1
    return max(1, min(BLOCK_BYTES // piece_bytes, num_pieces // (BLOCKS_PER_ENCODER * plan.workers)))


def _piece_source(job: StreamJob, groups: Sequence[Sequence[Piece]]) -> Any:
    """A Ray Datasource with one read task a group of pieces."""
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    class PieceSource(Datasource):
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[Any]:
            return [
                ReadTask(
                    functools.partial(_read_group, job, group),
                    BlockMetadata(num_rows=len(group), size_bytes=None, input_files=None, exec_stats=None),
                )
                for group in groups
            ]

    return PieceSource()


def _read_group(job: StreamJob, pieces: Sequence[Piece]) -> list[pa.Table]:
    return [pa.concat_tables([table for piece in pieces for table in _read(job, piece)])]


def _read(job: StreamJob, piece: Piece) -> list[pa.Table]:
    watch = Stopwatch()
    try:
        found, attempts = read_piece(job, piece)
    except ReadError as error:
        table, attempts = failure(piece, f"reading ({error.attempts} attempt(s))", error.cause), error.attempts
    else:
        facts = {"num_rows_read": found.num_rows_read, "text_bytes": found.rows.column("text").nbytes}
        table = envelope(Parcel(piece, found.rows, found.rejects, facts))
    return [with_spans(table, [], watch.span("read", retries=attempts - 1))]


class ReadError(Exception):
    """A piece could not be read; `cause` is what the last attempt raised."""

    def __init__(self, cause: Exception, attempts: int) -> None:
        super().__init__(str(cause))
        self.cause, self.attempts = cause, attempts


def read_piece(job: StreamJob, piece: Piece) -> tuple[PieceRows, int]:
    """Rows of the piece, and how many attempts that took: a few at most. Raises ReadError."""
    for attempt in range(1, READ_ATTEMPTS + 1):
        try:
            return PieceReader(job.read, open_store(job.store_url)).read(piece), attempt
        except Exception as error:  # timeouts and resets beyond the storage client's own retries look like damage
            if attempt == READ_ATTEMPTS or isinstance(error, SourceChangedError):
                raise ReadError(error, attempt) from error
            time.sleep(READ_BACKOFF_S * attempt)
    raise AssertionError("unreachable")


@functools.lru_cache(maxsize=1)
def chunker_of(job: StreamJob) -> Chunker:
    """The worker's chunker. What its tokens are worth the encoders check, which load the whole model."""
    chunker = Chunker(job.chunk, configured_model(job.encode))
    chunker.setup()
    return chunker


@functools.lru_cache(maxsize=1)
def cleaner_of(job: StreamJob) -> Cleaner:
    """The worker's cleaner."""
    cleaner = Cleaner(job.clean, job.plugins)
    cleaner.setup()
    return cleaner


def _chunk(batch: pa.Table, job: StreamJob) -> pa.Table:
    def work(parcel: Parcel) -> Parcel:
        cleaned, unclean = cleaner_of(job)(parcel.table)
        chunks, dropped, counts = chunker_of(job)(cleaned)
        facts = parcel.facts | counts | _token_facts(chunks)
        drawn = draw_queries(chunks) if job.reference is None else None
        return Parcel(parcel.piece, chunks, pa.concat_tables([parcel.rejects, unclean, dropped]), facts, drawn)

    return each_piece(batch, "chunk", work)


def _token_facts(chunks: pa.Table) -> dict[str, Any]:
    """Tokens of the piece, and how many sequences have so many: by the lower end of a bin, which JSON keeps as a string."""
    lengths = pc.list_value_length(chunks.column("input_ids")).drop_null().to_numpy()
    in_bin = np.bincount(lengths // TOKEN_BIN)
    counted = {str(number * TOKEN_BIN): int(in_bin[number]) for number in np.flatnonzero(in_bin).tolist()}
    return {"num_tokens": int(lengths.sum()), "token_lengths": counted}


def model_of(job: StreamJob) -> ModelSpec:
    """The model as it is on this worker. Raises FingerprintError when it is not the driver's."""
    spec = configured_model(job.encode)
    if spec.fingerprint != job.model_fingerprint:
        raise FingerprintError(
            f"the model at {spec.path} on this worker has fingerprint {spec.fingerprint[:12]}, the driver's has"
            f" {job.model_fingerprint[:12]}; give all nodes the same model (encode.model)"
        )
    return spec


class EncodeStage:
    """An actor of the encoder pool: the model is loaded once."""

    def __init__(self, job: StreamJob) -> None:
        self._encoder: Encoder
        self._gpu: GpuSampler | None = None
        self._packing = ThreadPoolExecutor(1)  # packs a piece while the device has the next one
        self._compared_with: dict[tuple[str, ObjectEntry], dict[str, float] | str] = {}
        self.load(job)

    def load(self, job: StreamJob) -> None:
        """Load the model."""
        from operators.encoder import Encoder  # here: with torch it takes 2 s, which only who encodes shall wait

        self._encoder = Encoder(job.encode, model_of(job))
        self._encoder.setup()
        self._gpu = GpuSampler.start(resolve_device(job.encode))

    @property
    def batch_tokens(self) -> int:
        """Tokens of a forward pass: those of the settings, or fewer where the device's memory did not suffice."""
        return self._encoder.text_encoder.batch_tokens

    def __call__(self, batch: pa.Table, job: StreamJob) -> pa.Table:
        def work(parcel: Parcel) -> Parcel:
            facts = dict(parcel.facts)
            if job.reference is not None:
                facts |= self._compared(job.store_url, job.reference)
            encoded = self._encoder(parcel.table)
            queries = None if parcel.queries is None else self._encoder.queries(parcel.queries)
            facts["batch_tokens"] = self.batch_tokens
            return Parcel(parcel.piece, encoded, parcel.rejects, facts, queries)

        return each_piece(batch, "encode", work, gpu=self._gpu, packing=self._packing)

    def _compared(self, store_url: str, reference: ObjectEntry) -> dict[str, float]:
        """Cosines of the sample's vectors made now to the stored ones. Raises ConfigError when they are too far apart."""
        key = (store_url, reference)
        if key not in self._compared_with:
            table = read_table(open_store(store_url), reference).slice(0, REFERENCE_TEXTS)
            stored = np.array(table.column("vector").to_pylist(), np.float32)
            try:
                self._compared_with[key] = self._encoder.compare_queries(table.column("text").to_pylist(), stored)
            except ConfigError as error:  # found once, told for every piece
                self._compared_with[key] = str(error)
        found = self._compared_with[key]
        if isinstance(found, str):
            raise ConfigError(found)
        return found


def _commit(batch: pa.Table, job: StreamJob) -> pa.Table:
    def work(parcel: Parcel) -> Parcel:
        facts = dict(parcel.facts)
        rows_read, piece_id = facts.pop("num_rows_read"), parcel.piece.piece_id
        done = EncodedPiece(piece_id, parcel.table, parcel.rejects, rows_read, parcel.queries, facts)
        record = commit_piece(open_store(job.store_url), job.run_prefix, done, job.inputs)
        return Parcel(parcel.piece, None, None, record.facts)

    return each_piece(batch, "commit", work)

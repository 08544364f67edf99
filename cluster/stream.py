"""The streaming job: pieces in, commit records out, as one Ray Data pipeline. The only place that calls map_batches.

    read (task) -> clean, chunk and tokenize (task, fused with read) -> encode (fixed actor pool) -> commit (task)

One piece is one row, which carries its tables as Arrow IPC; one read task makes one block, of one piece or, on GPUs, of a
few (`pieces_per_task`). So nothing that Ray Data does to blocks (coalescing small ones, dropping empty ones) can merge,
split or lose a piece, and a piece that fails travels on as a row with its error while the others complete.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import struct
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.encoder_pool import EncoderPool, PoolChangedError, run_dataset
from cluster.gpu_sampler import GpuSampler
from cluster.preflight import StreamPlan
from cluster.telemetry import TOKEN_BIN, Span, Stopwatch, dump_spans, load_spans, observe_span
from operators.chunker import ChunkConfig, Chunker
from operators.cleaner import CleanConfig, Cleaner
from operators.encoding.encode_config import EncodeConfig, configured_model, resolve_device
from operators.encoding.model_folder import ModelSpec
from operators.errors import ConfigError, FingerprintError, SourceChangedError, VectormillError
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
STORAGE_FAILED = "storage_failed"  # in the facts of a piece: arguments of the OSError that ends the job
REFERENCE_TEXTS = 32
BLOCK_BYTES = 32 << 20  # source bytes of the pieces of a block
BLOCKS_PER_ENCODER = 16
STAGE_VERBS = {"chunk": "chunking", "encode": "encoding", "commit": "committing"}  # in messages
# Ray fuses a task operator into an actor pool when their resource requests are equal, which would tokenize inside the
# encoders. A memory request that the encoders do not have keeps them apart.
READ_MEMORY_BYTES = 512 << 20  # measured: 260 MB with the tokenizer and torch imported, 8192 short rows

ENVELOPE = pa.schema(
    [
        pa.field("piece", pa.string(), nullable=False),  # Piece as JSON
        pa.field("table", pa.large_binary()),  # Arrow IPC: rows, then chunks, then encoded
        pa.field("rejects", pa.large_binary()),  # Arrow IPC of schemas.REJECTS
        pa.field("queries", pa.large_binary()),  # Arrow IPC of schemas.DRAWN_QUERIES, then of schemas.QUERIES
        pa.field("facts", pa.string(), nullable=False),  # counts so far, JSON
        pa.field("spans", pa.string(), nullable=False),  # what the stages so far took, JSON (cluster/telemetry.py)
        pa.field("error", pa.string()),  # what failed, with its kind; the rest of the row is empty then
    ]
)


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


@dataclass(frozen=True)
class Parcel:
    """A piece between two stages, unpacked."""

    piece: Piece
    table: pa.Table | None
    rejects: pa.Table | None
    facts: dict[str, Any]
    queries: pa.Table | None = None


@dataclass(frozen=True)
class PieceResult:
    """A finished piece: its counts, or what failed."""

    piece: Piece
    facts: dict[str, Any]
    error: str | None
    spans: list[Span] = field(default_factory=list)  # of its stages, in order


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
                result = _result(line)
                left.pop(result.piece.piece_id, None)
                yield result
            return
        except PoolChangedError:
            continue


def run_piece(job: StreamJob, piece: Piece, encode: EncodeStage) -> PieceResult:
    """One piece through all stages in this process. encode: an EncodeStage."""
    (read,) = _read(job, piece)
    (line,) = _commit(encode(_chunk(read, job), job), job).to_pylist()
    return _result(line)


def _result(line: dict[str, Any]) -> PieceResult:
    facts = json.loads(line["facts"])
    if STORAGE_FAILED in facts:
        raise OSError(*facts[STORAGE_FAILED])
    return PieceResult(Piece.from_json(json.loads(line["piece"])), facts, line["error"], load_spans(line["spans"]))


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
        table, attempts = _failure(piece, f"reading ({error.attempts} attempt(s))", error.cause), error.attempts
    else:
        facts = {"num_rows_read": found.num_rows_read, "text_bytes": found.rows.column("text").nbytes}
        table = _envelope(Parcel(piece, found.rows, found.rejects, facts))
    return [_with_spans(table, [], watch.span("read", retries=attempts - 1))]


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

    return _each_piece(batch, "chunk", work)


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

        return _each_piece(batch, "encode", work, gpu=self._gpu, packing=self._packing)

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

    return _each_piece(batch, "commit", work)


def _each_piece(
    batch: pa.Table,
    stage: str,
    work: Callable[[Parcel], Parcel],
    *,
    gpu: GpuSampler | None = None,
    packing: Executor | None = None,
) -> pa.Table:
    """Apply a stage to every piece of a block (one, as the job is built); failures become rows with an error.

    packing: packs what was made of a piece while the next one is worked on; the span is then that of the work alone.
    """
    done: list[pa.Table | Future[pa.Table]] = []
    for line in range(batch.num_rows):
        if batch.column("error")[line].is_valid:
            done.append(batch.slice(line, 1))
            continue
        piece = Piece.from_json(json.loads(batch.column("piece")[line].as_py()))
        spans = load_spans(batch.column("spans")[line].as_py())
        watch = Stopwatch()
        found: Parcel | pa.Table | None
        try:
            found = work(_parcel(piece, batch, line))
        except (
            Exception
        ) as error:  # made a row here: kept, it would keep all that its traceback holds, on the device too
            found = _failure(piece, STAGE_VERBS[stage], error)
        if packing is None:
            made = _packed_line(piece, found, stage)
            done.append(_with_spans(made, spans, watch.span(stage)))
        else:
            span = watch.span(stage, gpu=gpu.take() if gpu else None)
            done.append(packing.submit(_packed_after, piece, found, spans, span))
        found = None  # nor is what was made held any longer than it takes to pack it
    lines = [line.result() if isinstance(line, Future) else line for line in done]
    return pa.concat_tables(lines) if lines else ENVELOPE.empty_table()


def _parcel(piece: Piece, batch: pa.Table, line: int) -> Parcel:
    table, rejects, queries = (_unpack(batch.column(name)[line]) for name in ("table", "rejects", "queries"))
    return Parcel(piece, table, rejects, json.loads(batch.column("facts")[line].as_py()), queries)


def _packed_line(piece: Piece, found: Parcel | pa.Table, stage: str) -> pa.Table:
    """The row for what a stage made of a piece; one that tells of a failure is one already."""
    try:
        return _envelope(found) if isinstance(found, Parcel) else found
    except Exception as error:
        return _failure(piece, STAGE_VERBS[stage], error)


def _packed_after(piece: Piece, found: Parcel | pa.Table, spans: list[Span], span: Span) -> pa.Table:
    return _with_spans(_packed_line(piece, found, span.stage), spans, span)


def _with_spans(line: pa.Table, spans: list[Span], span: Span) -> pa.Table:
    """The row with the spans of the stages before and of this one, which Ray's metrics hear of too."""
    observe_span(span)
    place = ENVELOPE.get_field_index("spans")
    return line.set_column(place, ENVELOPE.field(place), pa.array([dump_spans([*spans, span])], pa.string()))


def _envelope(parcel: Parcel) -> pa.Table:
    packed = [_packed(table) for table in (parcel.table, parcel.rejects, parcel.queries)]
    return _line(parcel.piece, packed, parcel.facts, None)


def _failure(piece: Piece, stage: str, error: BaseException) -> pa.Table:
    if isinstance(error, VectormillError):
        text = str(error)
    else:
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {_first_line(error)} (at {os.path.basename(place.filename)}:{place.lineno})"
    # Where one piece cannot be committed no other can: a full disk, a store that is down.
    fatal = stage == STAGE_VERBS["commit"] and isinstance(error, OSError) and error.errno is not None
    facts = {STORAGE_FAILED: [error.errno, error.strerror, str(error.filename or "")]} if fatal else {}  # type: ignore[attr-defined]
    return _line(piece, [_packed(None)] * 3, facts, f"{stage}: {text}")


def _line(piece: Piece, packed: list[pa.Array], facts: dict[str, Any], error: str | None) -> pa.Table:
    values = (json.dumps(piece.to_json()), json.dumps(facts), "[]", error)
    first, *others = [pa.array([value], pa.string()) for value in values]
    return pa.table([first, *packed, *others], schema=ENVELOPE)


def _packed(table: pa.Table | None) -> pa.Array:
    """The table's Arrow IPC stream as a column of one value, without a further copy."""
    if table is None:
        return pa.nulls(1, pa.large_binary())
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data = sink.getvalue()
    offsets = pa.py_buffer(struct.pack("<qq", 0, data.size))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, data])


def _unpack(value: pa.Scalar) -> pa.Table | None:
    if not value.is_valid:
        return None
    with pa.ipc.open_stream(value.as_buffer()) as reader:
        return reader.read_all()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

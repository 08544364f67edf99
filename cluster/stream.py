"""The streaming job: pieces in, commit records out, as one Ray Data pipeline. The only place that calls map_batches.

    read (task) -> clean, chunk and tokenize (task, fused with read) -> encode (fixed actor pool) -> commit (task)

One piece is one read task, one block and one row: the row carries the piece's tables as Arrow IPC. So nothing that Ray
Data does to blocks (coalescing small ones, dropping empty ones) can merge, split or lose a piece, and a piece that fails
travels on as a row with its error while the others complete.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import queue
import struct
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.preflight import StreamPlan
from cluster.session import check_alive
from operators.chunker import ChunkConfig, Chunker
from operators.cleaner import CleanConfig, Cleaner
from operators.encoder import Encoder
from operators.encoding.encode_config import EncodeConfig, configured_model
from operators.encoding.model_folder import ModelSpec
from operators.errors import ConfigError, FingerprintError, ResourceError, SourceChangedError, VectormillError
from operators.piece_store import EncodedPiece, commit_piece, read_table
from operators.sources.pieces import Piece
from operators.sources.read_config import ReadConfig
from operators.sources.readers import PieceReader, PieceRows
from operators.storage.checked import ObjectEntry
from operators.storage.store import open_store

READ_ATTEMPTS = 3
READ_BACKOFF_S = 1.0
STORAGE_FAILED = "storage_failed"  # in the facts of a piece: arguments of the OSError that ends the job
REFERENCE_TEXTS = 32
# Ray fuses a task operator into an actor pool when their resource requests are equal, which would tokenize inside the
# encoders. A memory request that the encoders do not have keeps them apart.
READ_MEMORY_BYTES = 512 << 20  # measured: 260 MB with the tokenizer and torch imported, 8192 short rows

ENVELOPE = pa.schema(
    [
        pa.field("piece", pa.string(), nullable=False),  # Piece as JSON
        pa.field("table", pa.large_binary()),  # Arrow IPC: rows, then chunks, then encoded
        pa.field("rejects", pa.large_binary()),  # Arrow IPC of schemas.REJECTS
        pa.field("queries", pa.large_binary()),  # Arrow IPC of schemas.QUERIES, once encoded
        pa.field("facts", pa.string(), nullable=False),  # counts so far, JSON
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
class PieceResult:
    """A finished piece: its counts, or what failed."""

    piece: Piece
    facts: dict[str, Any]
    error: str | None


def stream_pieces(
    job: StreamJob,
    pieces: Sequence[Piece],
    plan: StreamPlan,
    *,
    piece_bytes: int,
    stall_timeout_s: float,
    check: Callable[[], None] | None = None,
) -> Iterator[PieceResult]:
    """Run all pieces; yields each as it is committed or has failed, in no particular order.

    Raises ResourceError when no piece ends for `stall_timeout_s`, OSError when the store takes no more. `check` is called
    about once a second.
    """
    dataset = _dataset(job, pieces, plan, piece_bytes)
    results: queue.Queue[Any] = queue.Queue()

    def consume() -> None:
        try:
            for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                for line in batch.to_pylist():
                    results.put(line)
            results.put(None)
        except BaseException as error:
            results.put(error)

    threading.Thread(target=consume, daemon=True, name="ray-data-consumer").start()
    last_progress = time.monotonic()
    while True:
        try:
            line = results.get(timeout=1.0)
        except queue.Empty:
            check_alive()
            if check is not None:
                check()
            if time.monotonic() - last_progress > stall_timeout_s:
                raise ResourceError(
                    f"no piece was committed for {stall_timeout_s:.0f} s: the encoder pool ({plan.workers} x {plan.cpus_per_worker}"
                    f" CPU, {plan.gpus_per_worker:g} GPU) may not be schedulable, or storage hangs; what was committed is kept,"
                    " run again to resume (cluster.stall_timeout_s)"
                ) from None
            continue
        if line is None:
            return
        if isinstance(line, BaseException):
            raise ResourceError(f"the streaming job failed: {_first_line(line)}; run again to resume") from line
        last_progress = time.monotonic()
        yield _result(line)


def run_piece(job: StreamJob, piece: Piece, encode: EncodeStage) -> PieceResult:
    """One piece through all stages in this process. encode: an EncodeStage."""
    (read,) = _read(job, piece)
    (line,) = _commit(encode(_chunk(read, job), job), job).to_pylist()
    return _result(line)


def _result(line: dict[str, Any]) -> PieceResult:
    facts = json.loads(line["facts"])
    if STORAGE_FAILED in facts:
        raise OSError(*facts[STORAGE_FAILED])
    return PieceResult(Piece.from_json(json.loads(line["piece"])), facts, line["error"])


def _dataset(job: StreamJob, pieces: Sequence[Piece], plan: StreamPlan, piece_bytes: int) -> Any:
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext, ExecutionResources

    context = DataContext.get_current()
    context.target_max_block_size = None  # a piece is never split
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.issue_detectors_config.detectors = []  # advice to programmers of Ray Data; ours is measured by benchmarks
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # Blocks between the stages are what memory is spent on: bound them by the pieces in flight, not by the object store.
    in_flight_bytes = plan.pieces_in_flight * max(2 * piece_bytes, 1 << 20)
    context.execution_options.resource_limits = ExecutionResources(object_store_memory=in_flight_bytes)
    tasks = {"num_cpus": 1, "memory": READ_MEMORY_BYTES}
    dataset = ray.data.read_datasource(_piece_source(job, pieces), override_num_blocks=len(pieces), **tasks)
    dataset = dataset.map_batches(
        _chunk, batch_size=None, batch_format="pyarrow", zero_copy_batch=True, fn_kwargs={"job": job}, **tasks
    )
    dataset = dataset.map_batches(
        EncodeStage,
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        fn_constructor_kwargs={"job": job},
        fn_kwargs={"job": job},
        compute=ActorPoolStrategy(size=min(plan.workers, len(pieces))),
        num_cpus=plan.cpus_per_worker,
        num_gpus=plan.gpus_per_worker,
    )
    return dataset.map_batches(
        _commit, batch_size=None, batch_format="pyarrow", zero_copy_batch=True, fn_kwargs={"job": job}, **tasks
    )


def _piece_source(job: StreamJob, pieces: Sequence[Piece]) -> Any:
    """A Ray Datasource with one read task a piece."""
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    class PieceSource(Datasource):
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[Any]:
            metadata = BlockMetadata(num_rows=1, size_bytes=None, input_files=None, exec_stats=None)
            return [ReadTask(functools.partial(_read, job, piece), metadata) for piece in pieces]

    return PieceSource()


def _read(job: StreamJob, piece: Piece) -> list[pa.Table]:
    try:
        found = read_piece(job, piece)
    except ReadError as error:
        return [_failure(piece, f"reading ({error.attempts} attempt(s))", error.cause)]
    facts = {"num_rows_read": found.num_rows_read, "text_bytes": found.rows.column("text").nbytes}
    return [_envelope(piece, found.rows, found.rejects, facts)]


class ReadError(Exception):
    """A piece could not be read; `cause` is what the last attempt raised."""

    def __init__(self, cause: Exception, attempts: int) -> None:
        super().__init__(str(cause))
        self.cause, self.attempts = cause, attempts


def read_piece(job: StreamJob, piece: Piece) -> PieceRows:
    """Rows of the piece, in a few attempts. Raises ReadError."""
    for attempt in range(1, READ_ATTEMPTS + 1):
        try:
            return PieceReader(job.read, open_store(job.store_url)).read(piece)
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
    def work(piece: Piece, rows: pa.Table, rejects: pa.Table, facts: dict[str, Any]) -> pa.Table:
        cleaned, unclean = cleaner_of(job)(rows)
        chunks, dropped, counts = chunker_of(job)(cleaned)
        facts.update(counts)
        facts["num_tokens"] = len(chunks.column("input_ids").combine_chunks().flatten()) if chunks.num_rows else 0
        return _envelope(piece, chunks, pa.concat_tables([rejects, unclean, dropped]), facts)

    return _each_piece(batch, "chunking", work)


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
        self._encoder = Encoder(job.encode, model_of(job))
        self._encoder.setup()
        self._compared_with: dict[tuple[str, ObjectEntry], dict[str, float] | ConfigError] = {}

    @property
    def batch_tokens(self) -> int:
        """Tokens of a forward pass: those of the settings, or fewer where the device's memory did not suffice."""
        return self._encoder.text_encoder.batch_tokens

    def __call__(self, batch: pa.Table, job: StreamJob) -> pa.Table:
        def work(piece: Piece, chunks: pa.Table, rejects: pa.Table, facts: dict[str, Any]) -> pa.Table:
            if job.reference is not None:
                facts |= self._compared(job.store_url, job.reference)
            start = time.perf_counter()
            encoded = self._encoder(chunks)
            queries = self._encoder.queries(chunks) if job.reference is None else None
            facts["encode_s"] = time.perf_counter() - start
            facts["batch_tokens"] = self.batch_tokens
            return _envelope(piece, encoded, rejects, facts, queries)

        return _each_piece(batch, "encoding", work)

    def _compared(self, store_url: str, reference: ObjectEntry) -> dict[str, float]:
        """Cosines of the sample's vectors made now to the stored ones. Raises ConfigError when they are too far apart."""
        key = (store_url, reference)
        if key not in self._compared_with:
            table = read_table(open_store(store_url), reference).slice(0, REFERENCE_TEXTS)
            stored = np.array(table.column("vector").to_pylist(), np.float32)
            try:
                self._compared_with[key] = self._encoder.compare_queries(table.column("text").to_pylist(), stored)
            except ConfigError as error:  # found once, told for every piece
                self._compared_with[key] = error
        found = self._compared_with[key]
        if isinstance(found, ConfigError):
            raise found
        return found


def _commit(batch: pa.Table, job: StreamJob) -> pa.Table:
    queries = {
        piece: _unpack(packed) if packed.is_valid else None
        for piece, packed in zip(batch.column("piece").to_pylist(), batch.column("queries"), strict=True)
    }

    def work(piece: Piece, encoded: pa.Table, rejects: pa.Table, facts: dict[str, Any]) -> pa.Table:
        timings = {"encode_s": facts.pop("encode_s")}
        drawn = queries[json.dumps(piece.to_json())]
        done = EncodedPiece(piece.piece_id, encoded, rejects, facts.pop("num_rows_read"), drawn, facts)
        record = commit_piece(open_store(job.store_url), job.run_prefix, done, job.inputs)
        return _envelope(piece, None, None, {**record.facts, **timings})

    return _each_piece(batch, "committing", work)


def _each_piece(batch: pa.Table, stage: str, work: Callable[..., pa.Table]) -> pa.Table:
    """Apply a stage to every piece of a block (one, as the job is built); failures become rows with an error."""
    done = []
    for line in range(batch.num_rows):
        if batch.column("error")[line].is_valid:
            done.append(batch.slice(line, 1))
            continue
        piece = Piece.from_json(json.loads(batch.column("piece")[line].as_py()))
        facts = json.loads(batch.column("facts")[line].as_py())
        try:
            table = _unpack(batch.column("table")[line])
            rejects = _unpack(batch.column("rejects")[line])
            done.append(work(piece, table, rejects, facts))
        except Exception as error:
            done.append(_failure(piece, stage, error))
    return pa.concat_tables(done) if done else ENVELOPE.empty_table()


def _envelope(
    piece: Piece,
    table: pa.Table | None,
    rejects: pa.Table | None,
    facts: dict[str, Any],
    queries: pa.Table | None = None,
) -> pa.Table:
    return _line(piece, [_packed(table), _packed(rejects), _packed(queries)], facts, None)


def _failure(piece: Piece, stage: str, error: BaseException) -> pa.Table:
    if isinstance(error, VectormillError):
        text = str(error)
    else:
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {_first_line(error)} (at {os.path.basename(place.filename)}:{place.lineno})"
    # Where one piece cannot be committed no other can: a full disk, a store that is down.
    fatal = stage == "committing" and isinstance(error, OSError) and error.errno is not None
    facts = {STORAGE_FAILED: [error.errno, error.strerror, str(error.filename or "")]} if fatal else {}  # type: ignore[attr-defined]
    return _line(piece, [_packed(None)] * 3, facts, f"{stage}: {text}")


def _line(piece: Piece, packed: list[pa.Array], facts: dict[str, Any], error: str | None) -> pa.Table:
    texts = [pa.array([value], pa.string()) for value in (json.dumps(piece.to_json()), json.dumps(facts), error)]
    return pa.table([texts[0], *packed, texts[1], texts[2]], schema=ENVELOPE)


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


def _unpack(value: pa.Scalar) -> pa.Table:
    with pa.ipc.open_stream(value.as_buffer()) as reader:
        return reader.read_all()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

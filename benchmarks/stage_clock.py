"""The stages of the streaming job as they are, with the CPU seconds of each: for benchmarks of the stream.

When a stage worked on a piece its span tells (cluster/telemetry.py). The CPU seconds of a block's stage stand in the facts
of its first piece under `cpu_s`: those of the thread that did the work, and those of its process so far. So both travel with
the pieces and come back with their results, from any store.

`SimulatedEncodeStage` is an encoder whose device is simulated: it sleeps for as long as one of `tokens_per_s` would
take, and gives cheap vectors of the right shape, the same for the same text. It loads neither a model nor torch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cluster import stream
from operators import schemas
from operators.query_sample import query_table
from operators.sources.pieces import Piece

CPU_S = "cpu_s"
DIM = 384
NUM_VECTORS = 4096
_read_group, _chunk, _commit = stream._read_group, stream._chunk, stream._commit


@dataclass(frozen=True)
class SimulatedJob(stream.StreamJob):
    """A job for simulated encoders."""

    tokens_per_s: float = 1e4


def timed_read(job: stream.StreamJob, pieces: Sequence[Piece]) -> list[pa.Table]:
    """`cluster.stream._read_group`, clocked."""
    return [_clocked("read", lambda: _read_group(job, pieces)[0])]


def timed_chunk(batch: pa.Table, job: stream.StreamJob) -> pa.Table:
    """`cluster.stream._chunk`, clocked."""
    return _clocked("chunk", lambda: _chunk(batch, job))


def timed_commit(batch: pa.Table, job: stream.StreamJob) -> pa.Table:
    """`cluster.stream._commit`, clocked."""
    return _clocked("commit", lambda: _commit(batch, job))


class TimedEncodeStage(stream.EncodeStage):
    """An encoder, clocked."""

    def __call__(self, batch: pa.Table, job: stream.StreamJob) -> pa.Table:
        call = super().__call__
        return _clocked("encode", lambda: call(batch, job), lambda: self._packing.submit(time.thread_time).result())


class SimulatedEncodeStage(TimedEncodeStage):
    """All that an encoder does for a piece, but for the model. For a SimulatedJob."""

    def load(self, job: stream.StreamJob) -> None:
        assert isinstance(job, SimulatedJob)
        self._encoder: Any = SimulatedEncoder(job.tokens_per_s)

    @property
    def batch_tokens(self) -> int:
        """Of no meaning here."""
        return 0


class SimulatedEncoder:
    """In place of operators.encoder.Encoder."""

    def __init__(self, tokens_per_s: float) -> None:
        self._tokens_per_s = tokens_per_s
        self._vectors_VD = np.random.default_rng(0).standard_normal((NUM_VECTORS, DIM)).astype(np.float16)

    def __call__(self, chunks: pa.Table) -> pa.Table:
        """schemas.encoded(DIM) of the chunks, after the device's time."""
        lists = chunks.column("input_ids").combine_chunks()
        ids_T, offsets = lists.flatten().to_numpy(), lists.offsets.to_numpy()
        time.sleep(len(ids_T) / self._tokens_per_s)
        vectors_ND = self._vectors_VD[np.add.reduceat(ids_T, offsets[:-1] - offsets[0]) % NUM_VECTORS]
        flat = pa.Array.from_buffers(pa.float16(), vectors_ND.size, [None, pa.py_buffer(vectors_ND)])
        vectors = pa.FixedSizeListArray.from_arrays(flat, type=schemas.vector_type(DIM))
        schema = schemas.encoded(DIM)
        return pa.table([vectors if n == "vector" else chunks.column(n) for n in schema.names], schema=schema)

    def queries(self, drawn: pa.Table) -> pa.Table:
        """The piece's share of the query sample with any vectors."""
        vectors_QD: npt.NDArray[np.float32] = self._vectors_VD[: drawn.num_rows].astype(np.float32)
        return query_table(drawn.column("order").to_numpy(), drawn.column("text").to_pylist(), vectors_QD)


@contextmanager
def clocked_stages(encode: type[stream.EncodeStage] = TimedEncodeStage) -> Iterator[None]:
    """Streams of this process inside the block run clocked stages, with this one in the encoder pool."""
    clocked: dict[str, Any] = {
        "_read_group": timed_read,
        "_chunk": timed_chunk,
        "_commit": timed_commit,
        "EncodeStage": encode,
    }
    with mock.patch.multiple(stream, **clocked):
        yield


def _clocked(stage: str, work: Callable[[], pa.Table], helper_s: Callable[[], float] = lambda: 0.0) -> pa.Table:
    """helper_s: CPU seconds so far of a thread that does a part of the work."""
    began, of_helper = time.thread_time(), helper_s()
    table = work()
    cpu_s = [time.thread_time() - began + helper_s() - of_helper, time.process_time()]
    facts = table.column("facts").to_pylist()
    first = json.loads(facts[0])
    first[CPU_S] = {**first.get(CPU_S, {}), stage: cpu_s}
    column = pa.array([json.dumps(first), *facts[1:]], pa.string())
    place = table.schema.get_field_index("facts")
    return table.set_column(place, table.schema.field(place), column)

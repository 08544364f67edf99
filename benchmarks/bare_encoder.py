"""The encoder without a pipeline: texts in memory in, vectors out; the same pieces, the same number of processes.

What a build is measured against. Pieces are handed out one by one to whichever process is free, as an actor pool does.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from operators.chunker import ChunkConfig, Chunker
from operators.cleaner import CleanConfig, Cleaner
from operators.encoder import Encoder
from operators.encoding.encode_config import EncodeConfig, configured_model
from operators.piece_store import vectors_of
from operators.sources.listing import list_sources
from operators.sources.pieces import plan_pieces
from operators.sources.read_config import ReadConfig
from operators.sources.readers import PieceReader

END_TIMEOUT_S = 3600.0
# Ray 2.60 starts its workers at niceness 15 (unless this variable is set). On a machine that also does other work the
# bare encoder would get a larger part of it otherwise.
RAY_NICENESS_VARIABLE = "RAY_worker_niceness"
RAY_NICENESS = 15


@dataclass(frozen=True)
class BareRun:
    """Seconds from the first piece's begin to the last one's end, and seconds in the encoder of all processes."""

    seconds: float
    busy_s: float


def write_pieces(source: str, folder: Path, read: ReadConfig) -> list[Path]:
    """Arrow files with the rows (texts, as nothing is set to be cleaned) of the pieces of `source`, in source order."""
    folder.mkdir(parents=True, exist_ok=True)
    reader, cleaner = PieceReader(read), Cleaner(CleanConfig())
    files = []
    for number, piece in enumerate(plan_pieces(list_sources([source]).objects, read).pieces({})):
        files.append(folder / f"{number:05d}.arrow")
        _write(files[-1], cleaner(reader.read(piece).rows)[0])
    return files


def run_bare(files: list[Path], chunk: ChunkConfig, encode: EncodeConfig, workers: int) -> BareRun:
    """Tokenize and encode all pieces by `workers` processes; vectors are left beside the files (see `bare_vectors`).

    Not timed: start of the processes, loading of tokenizer, model and pieces, writing of the vectors.
    """
    context = multiprocessing.get_context("spawn")
    barrier, following, results = context.Barrier(workers), context.Value("l", 0), context.Queue()
    arguments = (files, chunk, encode, barrier, following, results)
    processes = [context.Process(target=_work, args=arguments, daemon=True) for _ in range(workers)]
    for process in processes:
        process.start()
    times = [_next_result(results, processes) for _ in processes]
    for process in processes:
        process.join()
    return BareRun(max(end for _, end, _ in times) - min(begin for begin, _, _ in times), sum(t[2] for t in times))


def _next_result(results: Any, processes: list[Any]) -> tuple[float, float, float]:
    deadline = time.monotonic() + END_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            found: tuple[float, float, float] = results.get(timeout=1.0)
            return found
        except queue.Empty:
            failed = [process.exitcode for process in processes if process.exitcode]
            if failed:
                break
    for process in processes:
        process.kill()
    raise RuntimeError(f"a process of the bare encoder ended with {failed}" if failed else "the bare encoder hangs")


def _work(
    files: list[Path], chunk: ChunkConfig, encode: EncodeConfig, barrier: Any, following: Any, results: Any
) -> None:
    os.nice(max(0, int(os.environ.get(RAY_NICENESS_VARIABLE, RAY_NICENESS)) - os.nice(0)))
    spec = configured_model(encode)
    chunker, encoder = Chunker(chunk, spec), Encoder(encode, spec)
    chunker.setup()
    encoder.setup()
    pieces = [_read(file) for file in files]
    done: dict[int, pa.Table] = {}
    busy = 0.0
    barrier.wait()
    begin = time.monotonic()
    while True:
        with following.get_lock():
            number = following.value
            following.value += 1
        if number >= len(pieces):
            break
        chunks, *_ = chunker(pieces[number])
        started = time.monotonic()
        done[number] = encoder(chunks)
        busy += time.monotonic() - started
    end = time.monotonic()
    for number, table in done.items():
        _write(files[number].with_suffix(".encoded"), table)
    results.put((begin, end, busy))


def _write(file: Path, table: pa.Table) -> None:
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _read(file: Path) -> pa.Table:
    with pa.OSFile(str(file), "rb") as source, pa.ipc.open_file(source) as reader:
        return reader.read_all()


def bare_vectors(files: list[Path]) -> dict[tuple[str, int], bytes]:
    """(doc_id, chunk_no) -> the bytes of its float16 vector, as the last `run_bare` made them."""
    found: dict[tuple[str, int], bytes] = {}
    for file in files:
        encoded = _read(file.with_suffix(".encoded"))
        vectors = vectors_of(encoded)
        names = zip(encoded.column("doc_id").to_pylist(), encoded.column("chunk_no").to_pylist(), strict=True)
        found |= {name: vector.tobytes() for name, vector in zip(names, vectors, strict=True)}
    return found

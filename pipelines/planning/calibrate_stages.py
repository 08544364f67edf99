"""What the stages behind the encoder cost here: each runs on small made pieces in this process, on one thread.

Three corpora of equal vectors separate the costs of a piece, of a row and of a byte of text: few large pieces, many
small ones, and few large ones of long texts. Each time is the processor's,
and the least of REPEATS, so that what else the machine does hardly counts.
d dimensions, n rows.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from kernels.topk import exact_search
from operators import schemas
from operators.artifact.list_run import RunReader
from operators.artifact.manifest import Segment, part_ref
from operators.artifact.quantizer import Quantizer
from operators.cleaner import CleanConfig, Cleaner
from operators.documents import TAKES_PART, Ledger, rows_of_documents, winners_of
from operators.hash_runs import read_pass, write_hash_run
from operators.piece_store import EncodedPiece, commit_piece
from operators.query_sample import QUERIES_PER_PIECE, query_table
from operators.row_ids import DocumentHashes, repeats
from operators.shard_builder import PieceOfShard
from operators.sources.listing import list_sources
from operators.sources.pieces import Piece, plan_pieces
from operators.sources.read_config import ReadConfig
from operators.sources.readers import PieceReader
from operators.storage.commits import CommitRecord
from operators.storage.store import Store
from pipelines import index_stages
from pipelines.numbering import number_in_one_task
from pipelines.planning.calibrate_bytes import small_objects, two_sizes
from pipelines.planning.calibrate_encoder import rows_of

REPEATS = 3
ROWS = 4096
LARGE, SMALL = 4, 32  # pieces that the rows are cut into
LONG = 4  # times as long are the long texts
NUM_TEXTS = LONG * ROWS  # all different: what is repeated would be compressed away
LISTS = 16  # so few that finding them costs nothing beside the rest
QUERIES = 256
LEDGER_DOCUMENTS = 200_000
PASS_HASHES, PASS_RUNS = 2_000_000, 20  # of one pass over ids


@dataclass(frozen=True)
class Made:
    """Committed pieces of one made corpus."""

    pieces: list[CommitRecord]
    rows: int
    text_bytes: int
    commit_s: float


def least_s(
    work: Callable[[int], Any], repeats: int = REPEATS, clock: Callable[[], float] = time.process_time
) -> float:
    """Seconds of the fastest of a few calls of work(repeat), of the processor: what else the machine does hardly counts."""
    times = []
    for repeat in range(repeats):
        began = clock()
        work(repeat)
        times.append(clock() - began)
    return min(times)


def clustered(n: int, d: int, seed: int = 1) -> npt.NDArray[np.float32]:
    """Unit vectors around 64 centres, float32 [n, d]."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((64, d), np.float32)
    found = centres[rng.integers(0, 64, n)] + 0.7 * rng.standard_normal((n, d), np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def make_pieces(store: Store, prefix: str, texts: Sequence[str], num_pieces: int, d: int) -> Made:
    """Commit ROWS rows in so many pieces, as the stream would."""
    vectors = clustered(ROWS, d)
    per_piece = ROWS // num_pieces
    schema = schemas.encoded(d)
    tables = []
    for begin in range(0, ROWS, per_piece):
        chosen = [texts[number % len(texts)] for number in range(begin, begin + per_piece)]
        halves = pa.array(vectors[begin : begin + per_piece].astype(np.float16).ravel())
        columns = [
            pa.array([f"d{number:015d}" for number in range(begin, begin + per_piece)]),
            pa.array(np.zeros(per_piece, np.int32)),
            pa.array(np.zeros(per_piece, np.int32)),
            pa.array([len(text) for text in chosen], pa.int32()),
            pa.array(chosen, pa.large_string()),
            pa.array(["corpus.parquet"] * per_piece),
            pa.array(np.arange(begin, begin + per_piece)),
            pa.array([number.to_bytes(16, "little") for number in _mixed(begin, per_piece)], pa.binary(16)),
            pa.FixedSizeListArray.from_arrays(halves, type=schemas.vector_type(d)),
        ]
        tables.append(pa.table(columns, schema=schema))
    words = [" ".join(text.split()[:12]) for text in texts[:QUERIES_PER_PIECE]]
    queries = query_table(_mixed_words(len(words)), words, vectors[: len(words)])
    records: list[CommitRecord] = []

    def commit_all(repeat: int) -> None:
        records[:] = [
            commit_piece(
                store,
                f"{prefix}/{repeat}",
                EncodedPiece(f"{number:032d}", table, schemas.REJECTS.empty_table(), per_piece, queries),
                "calibration",
            )
            for number, table in enumerate(tables)
        ]

    seconds = least_s(commit_all)
    return Made(records, ROWS, sum(len(texts[n % len(texts)].encode()) for n in range(ROWS)), seconds)


def _mixed_words(count: int) -> npt.NDArray[np.uint64]:
    return np.random.default_rng(2).integers(0, 1 << 63, count).astype(np.uint64)


def _mixed(begin: int, count: int) -> list[int]:
    rng = np.random.default_rng(begin)
    return [int(a) << 64 | int(b) for a, b in rng.integers(0, 1 << 63, (count, 2)).tolist()]


def split(few: float, many: float, long: float, made: Sequence[Made]) -> tuple[float, float, float]:
    """(a piece, a row, a byte of text) from seconds for few large pieces, many small ones, and large ones of long texts."""
    piece = max(0.0, (many - few) / (SMALL - LARGE))
    byte = max(0.0, (long - few) / (made[2].text_bytes - made[0].text_bytes))
    return piece, max(0.0, (few - LARGE * piece - made[0].text_bytes * byte) / ROWS), byte


def measure_stages(store: Store, texts: Sequence[str], d: int, M: int) -> dict[str, float]:
    """Seconds a piece, a row, a byte of text and so on, by coefficient."""
    from pipelines.index_stages import Threads

    Threads(1).apply()
    long_texts = [" ".join(texts[number * LONG : (number + 1) * LONG]) for number in range(ROWS)]
    made = [
        make_pieces(store, "few", texts, LARGE, d),
        make_pieces(store, "many", texts, SMALL, d),
        make_pieces(store, "long", long_texts, LARGE, d),
    ]
    found: dict[str, float] = {}

    def add(name: str, seconds: Sequence[float]) -> None:
        names = (f"{name}_s_per_piece", f"{name}_s_per_row", f"{name}_s_per_text_byte")
        found.update(zip(names, split(seconds[0], seconds[1], seconds[2], made), strict=True))

    add("commit", [one.commit_s for one in made])
    add("number", [least_s(partial(_number_rows, store, one)) for one in made])
    add("read", _read_s(store, texts, long_texts))
    quantizer = _quantizer(d, LISTS, M)
    entry = quantizer.write(store)
    rule = quantizer.assignment.to_json()
    trained = CommitRecord("train", "calibration", "0", {"quantizer": entry}, {"assignment": rule})
    groups = [_group(one) for one in made]
    share = 0.1  # of the rows, about what a training sample of a large corpus takes of a piece or less

    def draw(number: int, repeat: int) -> None:
        key = f"sample/{number}-{repeat}"
        index_stages.sample_group(store.url, key, groups[number], share, QUERIES, "calibration")

    add("sample", [least_s(partial(draw, number)) for number in range(3)])
    shards: dict[int, CommitRecord] = {}
    one = index_stages.Threads(1)

    def shard(number: int, repeat: int) -> None:
        key = f"shards/shard-{number}-{repeat}"
        shards[number] = index_stages.shard(store.url, key, groups[number], trained, one, "calibration")

    shard_s = [least_s(partial(shard, number)) for number in range(3)]
    vectors = clustered(ROWS, d).astype(np.float16)
    codes_s = least_s(lambda _: quantizer.encode(vectors))
    add("shard", [seconds - codes_s for seconds in shard_s])
    found["encode_codes_s_per_row_dim"] = codes_s / ROWS / d
    found |= _merge_and_verify(store, quantizer, entry, shards, made)
    add("ledger", [least_s(partial(_write_documents, store, made[number], number)) for number in range(3)])
    found["check_s_per_doc"] = _ledger_check_s() / LEDGER_DOCUMENTS
    found["pass_s_per_hash"] = pass_s(store) / PASS_HASHES
    return found | _sizes(store, made, shards, groups, trained, texts, d)


def _sizes(
    store: Store,
    made: Sequence[Made],
    shards: dict[int, CommitRecord],
    groups: Sequence[list[PieceOfShard]],
    trained: CommitRecord,
    texts: Sequence[str],
    d: int,
) -> dict[str, float]:
    """Bytes of what was written, by coefficient."""
    found: dict[str, float] = {}
    encoded = [sum(record.objects["encoded"].size_bytes for record in one.pieces) - 2.0 * d * ROWS for one in made]
    names = ("encoded_bytes_per_piece", "encoded_bytes_per_row", "encoded_bytes_per_text_byte")
    found |= dict(zip(names, split(encoded[0], encoded[1], encoded[2], made), strict=True))
    half_group = groups[0][: LARGE // 2]
    half = index_stages.shard(
        store.url, "shards/shard-9-0", half_group, trained, index_stages.Threads(1), "calibration"
    )
    rows = [float(shard.objects["rows"].size_bytes) for shard in (half, shards[0], shards[2])]
    more_text = made[2].text_bytes - made[0].text_bytes
    found["rows_bytes_per_text_byte"] = (rows[2] - rows[1]) / more_text
    per_run, per_row = two_sizes((ROWS / 2, rows[0]), (ROWS, rows[1]))
    found["rows_bytes_per_run"] = per_run
    found["rows_bytes_per_row"] = per_row - found["rows_bytes_per_text_byte"] * made[0].text_bytes / ROWS

    def documents(pieces: list[CommitRecord]) -> tuple[float, float]:
        key = f"bytes/documents-{len(pieces)}.parquet"
        table, _, _ = index_stages.write_piece_documents(store.url, key, [(record, 0, []) for record in pieces])
        return table["num_rows"], table["object"]["size_bytes"]

    found["documents_bytes_per_table"], found["documents_bytes_per_doc"] = two_sizes(
        documents(made[0].pieces[:2]), documents(made[0].pieces)
    )
    return found | small_objects(store, made[0].pieces[0], "segments/made-0-0/part-00000.json", texts, d)


def _merge_and_verify(
    store: Store, quantizer: Quantizer, entry: Any, shards: dict[int, CommitRecord], made: Sequence[Made]
) -> dict[str, float]:
    """Costs of a row and of a byte of text when shards become a part, when it is verified, and in the exact search."""
    found: dict[str, float] = {}
    parts: dict[int, str] = {}

    def merge(number: int, repeat: int) -> None:
        parts[number] = f"segments/made-{number}-{repeat}/part-00000"
        index_stages.merge(
            store.url, parts[number], [shards[number]], (0, LISTS), quantizer.digest, 64 << 20, "calibration"
        )

    def verify(number: int, _: int) -> None:
        ref = part_ref(store, parts[number] + ".json")
        report = index_stages.check_part(
            store.url, ref, entry, quantizer.assignment, Segment("made", 0, ROWS, []), index_stages.Threads(1)
        )
        assert not report.problems, report.problems

    more_bytes = made[2].text_bytes - made[0].text_bytes
    times = {
        "merge": [least_s(partial(merge, number)) for number in (0, 2)],
        "verify": [least_s(partial(verify, number)) for number in (0, 2)],
    }
    for name, (short_s, long_s) in times.items():
        byte = max(0.0, (long_s - short_s) / more_bytes)
        found[f"{name}_s_per_text_byte"] = byte
        found[f"{name}_s_per_row"] = max(0.0, (short_s - made[0].text_bytes * byte) / ROWS)
    record = shards[0]
    opened = least_s(lambda _: RunReader(store, record.unit, record.objects, record.facts).read_rows(0, 1))
    found["open_run_s"] = opened
    reader = RunReader(store, record.unit, record.objects, record.facts)
    queries = clustered(QUERIES, quantizer.d, seed=3)
    exact_s = least_s(lambda _: exact_search(queries, [(0, reader.read_vectors(0, ROWS))], 64, metric="ip"))
    found["exact_search_s_per_row_dim_query"] = exact_s / ROWS / quantizer.d / QUERIES
    return found


def _write_documents(store: Store, made: Made, number: int, repeat: int) -> None:
    placed: list[tuple[CommitRecord, int, list[int]]] = [(record, 0, []) for record in made.pieces]
    index_stages.write_piece_documents(store.url, f"segments/made/documents-{number}-{repeat}.parquet", placed)


def _ledger_check_s() -> float:
    """Seconds in which the winners of LEDGER_DOCUMENTS documents are found again, as `verify` does."""
    rng = np.random.default_rng(5)
    n = LEDGER_DOCUMENTS
    doc_hash, text_hash = (rng.integers(0, 1 << 63, (n, 2)).astype(np.uint64) for _ in range(2))
    ledger = Ledger(
        doc_hash, text_hash, np.arange(n, dtype=np.int64), np.ones(n, np.int32), np.full(n, TAKES_PART, np.int8)
    )

    def check(_: int) -> None:
        wins, _duplicates = winners_of(ledger, drop_equal_texts=False)
        rows_of_documents(ledger.row_id_N[wins], ledger.num_chunks_N[wins], n)

    return least_s(check)


def pass_s(store: Store) -> float:
    """Seconds in which PASS_HASHES hashes are written, read again and compared, beside the reading of their pieces."""
    rng = np.random.default_rng(7)
    each = PASS_HASHES // PASS_RUNS
    groups = [
        DocumentHashes(
            rng.integers(0, 1 << 63, (each, 1)).astype(np.uint64),
            np.arange(each) + (number << 32),
            np.ones(each, np.int32),
        )
        for number in range(PASS_RUNS)
    ]

    def once(repeat: int) -> None:
        runs = [write_hash_run(store, f"hashes/{repeat}-{number}", one, 1) for number, one in enumerate(groups)]
        again, _first = repeats(read_pass(store, runs, 0).words_NW)
        assert not len(again), "made hashes must differ"

    return least_s(once)


def _read_s(store: Store, texts: Sequence[str], long_texts: Sequence[str]) -> list[float]:
    """Seconds to read and clean the rows from Parquet in few pieces, many pieces, and with long texts."""
    cleaner = Cleaner(CleanConfig())
    times = []
    with tempfile.TemporaryDirectory(prefix="vectormill-calibration-") as folder:
        for name, chosen, pieces in (("few", texts, LARGE), ("many", texts, SMALL), ("long", long_texts, LARGE)):
            path = f"{folder}/{name}.parquet"
            rows = rows_of([chosen[number % len(chosen)] for number in range(ROWS)])
            pq.write_table(rows.select(["doc_id", "text"]), path, row_group_size=ROWS // pieces)
            read = ReadConfig(piece_rows=ROWS // pieces)
            planned = plan_pieces(list_sources([path]).objects, read).pieces({})
            reader = PieceReader(read, store)
            times.append(least_s(partial(_read_pieces, reader, cleaner, planned)))
    return times


def _read_pieces(reader: PieceReader, cleaner: Cleaner, pieces: Sequence[Piece], _: int) -> None:
    for piece in pieces:
        cleaner(reader.read(piece).rows)


def _number_rows(store: Store, made: Made, _: int) -> None:
    number_in_one_task(store.url, made.pieces, False)


def _group(made: Made) -> list[PieceOfShard]:
    rows = made.rows // len(made.pieces)
    return [PieceOfShard(record, number * rows, rows, []) for number, record in enumerate(made.pieces)]


def _quantizer(d: int, nlist: int, M: int) -> Quantizer:
    """Untrained: rows of the data as centroids, random codewords. What it costs to use does not depend on their values."""
    rng = np.random.default_rng(4)
    codebooks = 0.1 * rng.standard_normal((M, 256, d // M), np.float32)
    return Quantizer("ip", clustered(nlist, d, seed=6), codebooks, 8)

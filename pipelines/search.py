"""`search`: questions in, the best chunks of the published version out, encoded by the corpus's own code and model.

Q queries, d dimensions, k hits.
"""

from __future__ import annotations

import json
import posixpath
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from operators.artifact.index import Index, Neighbours
from operators.artifact.manifest import Manifest
from operators.cleaner import CleanConfig, clean_text
from operators.encoding.encode_config import EncodeConfig
from operators.encoding.text_encoder import TextEncoder
from operators.errors import ConfigError
from operators.storage.filesystem import filesystem_for, is_local
from operators.storage.store import open_store
from pipelines.index_stages import query_encoder
from pipelines.operating_points import point_for
from pipelines.versions import open_version

# Vectors that a batch of queries scores again: at d = 384 about 100 MB of float32.
CANDIDATES_AT_ONCE = 65_536
RESULT_SUFFIXES = (".json", ".jsonl", ".parquet")

RESULTS = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),  # from 1
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("chunk_no", pa.int32(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
        pa.field("text", pa.large_string(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Query:
    """A question and the id that its results carry."""

    query_id: str
    text: str


def search(
    root: str,
    queries: Sequence[str],
    k: int = 10,
    nprobe: int | None = None,
    refine_factor: int | None = None,
    model: str | None = None,
    version: str | None = None,
    recall: float | None = None,
) -> list[dict[str, Any]]:
    """`[{"query", "hits": [{"rank", "doc_id", "chunk_no", "score", "text"}]}]` in the order of `queries`, best hit first.

    nprobe and refine_factor: None takes what the version stores; recall in their place: what reached it on the version's
    query sample (pipelines/operating_points.py). model: another place of the same model. version: None
    for the published one, "candidate" for the last one that was refused. There are fewer than k hits where the probed lists hold fewer entries. Deterministic.
    Raises IndexNotFoundError, ConfigError (a setting, an empty query, a model that cannot be loaded),
    FingerprintError (another model), IntegrityError (a damaged object).
    """
    check_queries([Query(str(number), text) for number, text in enumerate(queries, 1)])
    store = open_store(root)
    manifest = open_version(store, version)
    if recall is not None:
        if nprobe is not None or refine_factor is not None:
            raise ConfigError("--recall chooses nprobe and the refine factor: leave out --nprobe and --refine-factor")
        nprobe, refine_factor = point_for(store, manifest, recall)
    check_search_settings(manifest, k, nprobe, refine_factor)
    vectors_Qd = encode_queries(manifest, queries, model)
    index = Index(store, manifest)
    found = search_in_batches(index, vectors_Qd, k, nprobe, refine_factor)
    return [
        {"query": query, "hits": _hits(index, scores_k, entries_k)}
        for query, scores_k, entries_k in zip(queries, found.scores_Qk, found.entries_Qk, strict=True)
    ]


def check_search_settings(manifest: Manifest, k: int, nprobe: int | None, refine_factor: int | None) -> None:
    """Raise ConfigError for what cannot be searched with, before a model is loaded for it."""
    if k < 1:
        raise ConfigError(f"k must be at least 1, got {k} (-k)")
    if nprobe is not None and not 1 <= nprobe <= manifest.nlist:
        raise ConfigError(f"nprobe must be in 1..nlist ({manifest.nlist}), got {nprobe} (--nprobe)")
    if refine_factor is not None and refine_factor < 0:
        raise ConfigError(
            f"refine_factor must be at least 0 (0: the order of the codes alone), got {refine_factor} (--refine-factor)"
        )


def corpus_encoder(manifest: Manifest, model: str | None, threads: int | None = None) -> TextEncoder:
    """The encoder that made the version's vectors, for queries. threads: other than the corpus's were.

    Raises ConfigError when the model cannot be loaded, FingerprintError when it is another one.
    """
    stored = manifest.config["encode"]
    # The place and the device are this machine's; what changes a vector is as it was when the corpus was encoded.
    # (float16 is the GPUs' and near to float32. A revision is the hub's; the fingerprint tells whether the model is the one.)
    here = {"device": "auto", "outputs": (), "model": stored["model"] if model is None else model}
    here |= {} if model is None else {"revision": ""}
    here |= {"precision": "float32"} if stored["precision"] == "float16" and not torch.cuda.is_available() else {}
    here |= {} if threads is None else {"threads_per_worker": threads}
    config = EncodeConfig(**{**stored, **here})
    try:
        return query_encoder(config, manifest.model["fingerprint"])
    except ConfigError as error:
        if model is not None:
            raise
        raise ConfigError(
            f"the model that this index was built with cannot be loaded from where it was then ({stored['model']!r}):"
            f" {error}; say where it is now with --model"
        ) from None


def encode_queries(manifest: Manifest, texts: Sequence[str], model: str | None) -> npt.NDArray[np.float32]:
    """Vectors float32 [Q, d] of the texts, cleaned as the corpus was, by the model and settings that made the version."""
    encoder = corpus_encoder(manifest, model)
    stored_clean = manifest.config.get("clean", {})
    clean = CleanConfig(**{**stored_clean, "keep": tuple(stored_clean.get("keep", ()))})
    cleaned = [clean_text(clean, text) for text in texts]
    for text, left in zip(texts, cleaned, strict=True):
        if not left.strip():
            raise ConfigError(
                f"a query must have text, got {text!r}, of which the index's cleaning (clean.*) leaves nothing"
            )
    return encoder.encode_queries(cleaned)


def search_in_batches(
    index: Index, queries_Qd: npt.NDArray[np.float32], k: int, nprobe: int | None, refine_factor: int | None
) -> Neighbours:
    """`Index.search` of any number of queries in bounded memory."""
    refine = index.manifest.quality["refine_factor"] if refine_factor is None else refine_factor
    step = max(1, CANDIDATES_AT_ONCE // max(1, min(k * max(1, refine), index.manifest.ntotal)))
    found = [
        index.search(queries_Qd[start : start + step], k, nprobe=nprobe, refine_factor=refine)
        for start in range(0, len(queries_Qd), step)
    ]
    return Neighbours(
        np.concatenate([f.scores_Qk for f in found]),
        np.concatenate([f.row_ids_Qk for f in found]),
        np.concatenate([f.entries_Qk for f in found]),
    )


def _hits(index: Index, scores_k: npt.NDArray[np.float32], entries_k: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
    there = entries_k >= 0
    lines = zip(index.rows_of(entries_k[there]), scores_k[there].tolist(), strict=True)
    return [
        {"rank": rank, "doc_id": row["doc_id"], "chunk_no": row["chunk_no"], "score": score, "text": row["text"]}
        for rank, (row, score) in enumerate(lines, 1)
    ]


def check_queries(queries: Sequence[Query]) -> None:
    """Raise ConfigError when there is none, when one is empty, or when two share an id."""
    if not queries:
        raise ConfigError("a search needs at least one query, got none; give a question, or a file with --queries")
    for query in queries:
        if not query.text.strip():
            raise ConfigError(f"a query must have text, got {query.text!r} (query {query.query_id})")
    query_id, count = Counter(query.query_id for query in queries).most_common(1)[0]
    if count > 1:
        raise ConfigError(f"query ids must be unique, got {query_id!r} {count} times (--queries); rename all but one")


def read_queries(path: str) -> list[Query]:
    """Queries of a file: .txt (one a line), .jsonl ("text", optional "_id") or .parquet (text, optional _id).

    The id is the `_id`, else the number of the line or row, from 1. Blank lines are skipped.
    Raises ConfigError naming file and line for what is not a query.
    """
    suffix = posixpath.splitext(path)[1].lower()
    if suffix not in (".txt", ".jsonl", ".parquet"):
        raise ConfigError(f"a file of queries must end in .txt, .jsonl or .parquet, got {path!r} (--queries)")
    if suffix == ".parquet":
        queries = _parquet_queries(path)
    else:
        try:
            lines = read_file(path, "--queries").decode().split("\n")  # not splitlines: JSON strings may hold U+2028
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"a file of queries must be UTF-8, {path!r} is not at byte {error.start} (--queries)"
            ) from None
        numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        make = _json_query if suffix == ".jsonl" else _text_query
        queries = [make(line, number, path) for number, line in numbered]
    if not queries:
        raise ConfigError(f"a file of queries must hold at least one, {path!r} holds none (--queries)")
    check_queries(queries)
    return queries


def _text_query(line: str, number: int, path: str) -> Query:
    return Query(str(number), line.strip())


def _json_query(line: str, number: int, path: str) -> Query:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ConfigError(
            f"a line of {path!r} must be a JSON object, line {number} is not: {error} (--queries)"
        ) from None
    if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
        got = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
        raise ConfigError(f'a line of {path!r} must have a string "text", line {number} has {got} (--queries)')
    return Query(str(fields.get("_id", number)), fields["text"])


def _parquet_queries(path: str) -> list[Query]:
    columns = read_columns(path, ("text",), ("_id",), "--queries")
    numbers = range(1, len(columns["text"]) + 1)
    return [
        Query(str(query_id), str(text))
        for query_id, text in zip(columns.get("_id", numbers), columns["text"], strict=True)
    ]


def read_columns(path: str, needed: Sequence[str], optional: Sequence[str], option: str) -> dict[str, list[Any]]:
    """Values of the named columns of a Parquet file. Raises ConfigError naming file, column and the columns it has."""
    data = read_file(path, option)
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        names = file.schema_arrow.names
        for name in needed:
            if name not in names:
                raise ConfigError(f"{path!r} must have a column {name!r}, it has {', '.join(names)} ({option})")
        table = file.read([name for name in (*needed, *optional) if name in names])
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{path!r} must be a Parquet file, and cannot be read as one: {error} ({option})") from None
    for name in table.column_names:
        if table.column(name).null_count:
            row = table.column(name).is_null().to_pylist().index(True)
            raise ConfigError(f"column {name!r} of {path!r} must not hold nulls, row {row + 1} does ({option})")
    return {name: table.column(name).to_pylist() for name in table.column_names}


def read_table_columns(path: str, names: Sequence[str], option: str) -> list[Any]:
    """Values of the first of the columns that the Parquet file has. Raises ConfigError naming file and columns."""
    have = _parquet_names(path, option)
    for name in names:
        if name in have:
            return read_columns(path, (name,), (), option)[name]
    raise ConfigError(f"{path!r} must have a column {' or '.join(names)}, it has {', '.join(have)} ({option})")


def _parquet_names(path: str, option: str) -> list[str]:
    try:
        return list(pq.ParquetFile(pa.BufferReader(read_file(path, option))).schema_arrow.names)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{path!r} must be a Parquet file, and cannot be read as one: {error} ({option})") from None


def read_file(path: str, option: str) -> bytes:
    """Whole local or s3:// file. Raises ConfigError where there is none."""
    fs, inner = filesystem_for(path)
    try:
        return bytes(fs.cat_file(inner))
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(f"file {path!r} does not exist or is a folder ({option})") from None


def check_results_path(path: str) -> None:
    """Raise ConfigError for a name that results cannot be written under."""
    if posixpath.splitext(path)[1].lower() not in RESULT_SUFFIXES:
        raise ConfigError(f"results go to a file that ends in {', '.join(RESULT_SUFFIXES)}, got {path!r} (--out)")
    fs, inner = filesystem_for(path)
    folder = posixpath.dirname(inner)
    if is_local(fs) and not fs.isdir(folder):
        raise ConfigError(f"the folder of the results must exist, got {path!r} (--out); make {folder} first")


def write_results(path: str, query_ids: Iterable[str], results: Sequence[dict[str, Any]]) -> int:
    """Number of hits written to `path`, one line each with the columns of RESULTS: .json (a list), .jsonl, .parquet."""
    check_results_path(path)
    lines = [
        {"query_id": query_id, **hit}
        for query_id, result in zip(query_ids, results, strict=True)
        for hit in result["hits"]
    ]
    if path.lower().endswith(".parquet"):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(lines, schema=RESULTS), sink, compression="zstd")
        data = sink.getvalue().to_pybytes()
    elif path.lower().endswith(".jsonl"):
        data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    else:
        data = (json.dumps(lines, ensure_ascii=False, indent=1) + "\n").encode()
    fs, inner = filesystem_for(path)
    fs.pipe_file(inner, data)
    return len(lines)

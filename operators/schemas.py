"""Every Arrow schema of the walk of the data, in the order in which the data takes them.

N rows of a piece, d the vector dimension. `source` is the object's path below the SOURCE argument; `row` is the row's
number in its object (JSONL read by byte range: the byte offset of its line).
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from operators.encoding.outputs import Output

ROWS = pa.schema(
    [
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("text", pa.large_string(), nullable=False),  # the text columns joined by one space
        pa.field("source", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
    ]
)

# Rows after cleaning. text_hash: BLAKE2b-128 of the document's text (UTF-8), by which equal documents are found.
_TEXT_HASH = pa.field("text_hash", pa.binary(16), nullable=False)
CLEANED = pa.schema([*ROWS, _TEXT_HASH])

# Rows that leave the walk. `outcome` is "rejected" (bad input) or "dropped" (good input, nothing to index).
REJECTS = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("doc_id", pa.string()),
        pa.field("outcome", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)

_CHUNK_FIELDS = [
    pa.field("doc_id", pa.string(), nullable=False),
    pa.field("chunk_no", pa.int32(), nullable=False),
    pa.field("start", pa.int32(), nullable=False),  # character offsets into the joined text, [start, end)
    pa.field("end", pa.int32(), nullable=False),
    pa.field("text", pa.large_string(), nullable=False),
    pa.field("source", pa.string(), nullable=False),
    pa.field("row", pa.int64(), nullable=False),
    _TEXT_HASH,  # of the whole document, in each of its chunks
]

# Chunks with their tokens: boundaries are found on tokens, so both come from one operator (docs/decisions/0002).
# The vector of a chunk pools the tokens [pool_start, pool_end) of its sequence.
CHUNKS = pa.schema(
    [
        *_CHUNK_FIELDS,
        pa.field("input_ids", pa.list_(pa.int32())),  # null: the sequence of the row before (late chunking)
        pa.field("pool_start", pa.int32(), nullable=False),
        pa.field("pool_end", pa.int32(), nullable=False),
    ]
)


def encoded(d: int, outputs: Sequence[Output] = ()) -> pa.Schema:
    """Chunks with their vectors, and the columns of further outputs: what a committed piece holds."""
    further = [field for output in outputs for field in output_fields(output)]
    return pa.schema([*_CHUNK_FIELDS, pa.field("vector", vector_type(d), nullable=False), *further])


def output_fields(output: Output) -> list[pa.Field]:
    """Columns of one output: FixedSizeList, sign bits as fixed-size binary, int8 with a column `<name>_scale`."""
    if output.dtype == "binary":
        return [pa.field(output.name, pa.binary(-(-output.dim // 8)), nullable=False)]
    kinds = {"float16": pa.float16(), "float32": pa.float32(), "int8": pa.int8()}
    fields = [pa.field(output.name, list_type(kinds[output.dtype], output.dim), nullable=False)]
    scale = [pa.field(f"{output.name}_scale", pa.float32(), nullable=False)] if output.dtype == "int8" else []
    return fields + scale


def vector_type(d: int) -> pa.DataType:
    """FixedSizeList<float16>[d]."""
    return list_type(pa.float16(), d)


def list_type(item: pa.DataType, length: int) -> pa.DataType:
    """FixedSizeList of `length` items without nulls."""
    return pa.list_(pa.field("item", item, nullable=False), length)


# The row store of a shard or a part, in inverted-list order (list_no, then row_id).
ROW_STORE = pa.schema(
    [
        pa.field("row_id", pa.int64(), nullable=False),
        pa.field("list_no", pa.int32(), nullable=False),
        *_CHUNK_FIELDS,
    ]
)


def row_store(piece: pa.Schema) -> pa.Schema:
    """ROW_STORE with the columns of further outputs that committed pieces of this schema have."""
    known = {*ROW_STORE.names, "vector", "doc_hash"}
    return pa.schema([*ROW_STORE, *(field for field in piece.remove_metadata() if field.name not in known)])


def committed(d: int, outputs: Sequence[Output] = ()) -> pa.Schema:
    """Encoded rows as a piece is committed: with the 64-bit hash of doc_id that duplicates and samples are found by."""
    return encoded(d, outputs).append(pa.field("doc_hash", pa.uint64(), nullable=False))


# Queries drawn from the corpus: they measure recall and set nprobe. First their texts, then their vectors as well.
DRAWN_QUERIES = pa.schema(
    [
        pa.field("order", pa.uint64(), nullable=False),  # hash of the chunk it comes from: the lowest are kept
        pa.field("text", pa.large_string(), nullable=False),
    ]
)
QUERIES = pa.schema([*DRAWN_QUERIES, pa.field("vector", pa.list_(pa.float32()), nullable=False)])


# The ledger: what every source object of a version holds (operators/documents.py). One row an object, in corpus order;
# its documents are the positions [first, first + num_docs) of the documents tables.
SOURCES = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("etag", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("format", pa.string(), nullable=False),
        pa.field("compression", pa.string()),
        pa.field("num_rows_read", pa.int64(), nullable=False),
        pa.field("first", pa.int64(), nullable=False),
        pa.field("num_docs", pa.int64(), nullable=False),
    ]
)

# The best live rows of each query of the sample, best first, by exact search.
EXACT = pa.schema(
    [
        pa.field("row_ids", pa.list_(pa.int64()), nullable=False),
        pa.field("scores", pa.list_(pa.float32()), nullable=False),
    ]
)

_LEDGER_STATE = [
    pa.field("row_id", pa.int64(), nullable=False),  # of the document's first chunk; -1: it has no rows
    pa.field("num_chunks", pa.int32(), nullable=False),  # the rows row_id ... row_id + num_chunks - 1; 0: none
    pa.field("state", pa.int8(), nullable=False),  # documents.TAKES_PART, DELETED or NO_TOKENS
]

# Documents that were read well, in source order, also those that are left out as duplicates.
DOCUMENTS = pa.schema(
    [
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("doc_hash", pa.binary(16), nullable=False),  # BLAKE2b-128 of the id in UTF-8
        pa.field("text_hash", pa.binary(16), nullable=False),
        *_LEDGER_STATE,
    ]
)

# What holds in place of the tables' own columns: tables are shared with earlier versions and never change.
AMENDED = pa.schema([pa.field("position", pa.int64(), nullable=False), *_LEDGER_STATE])

"""Every Arrow schema of the walk of the data, in the order in which the data takes them.

N rows of a piece, d the vector dimension. `source` is the object's path below the SOURCE argument; `row` is the row's
number in its object (JSONL read by byte range: the byte offset of its line).
"""

from __future__ import annotations

import pyarrow as pa

ROWS = pa.schema(
    [
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("text", pa.large_string(), nullable=False),  # the text columns joined by one space
        pa.field("source", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
    ]
)

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
]

# Chunks with their tokens: boundaries are found on tokens, so both come from one operator (docs/decisions/0002).
CHUNKS = pa.schema([*_CHUNK_FIELDS, pa.field("input_ids", pa.list_(pa.int32()), nullable=False)])


def encoded(d: int) -> pa.Schema:
    """Chunks with their vectors: what a committed piece holds."""
    return pa.schema([*_CHUNK_FIELDS, pa.field("vector", vector_type(d), nullable=False)])


def vector_type(d: int) -> pa.DataType:
    """FixedSizeList<float16>[d]."""
    return pa.list_(pa.field("item", pa.float16(), nullable=False), d)


# The row store of a shard or a part, in inverted-list order (list_no, then row_id).
ROW_STORE = pa.schema(
    [
        pa.field("row_id", pa.int64(), nullable=False),
        pa.field("list_no", pa.int32(), nullable=False),
        *_CHUNK_FIELDS,
    ]
)


def committed(d: int) -> pa.Schema:
    """Encoded rows as a piece is committed: with the 64-bit hash of doc_id that duplicates and samples are found by."""
    return encoded(d).append(pa.field("doc_hash", pa.uint64(), nullable=False))


# Queries drawn from the corpus: they measure recall and set nprobe.
QUERIES = pa.schema(
    [
        pa.field("order", pa.uint64(), nullable=False),  # hash of the chunk it comes from: the lowest are kept
        pa.field("text", pa.large_string(), nullable=False),
        pa.field("vector", pa.list_(pa.float32()), nullable=False),
    ]
)

"""Chunks with tokens in, chunks with vectors out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from operators import schemas
from operators.errors import SourceError
from operators.model import load_spec
from operators.query_sample import draw_queries, query_table
from operators.text_encoder import EncodeConfig, NonFiniteVectorError, TextEncoder


class Encoder:
    """Operator from a table of CHUNKS to a table of `schemas.encoded(d)`, row for row.

    The vectors are made in float32 (unit length if the model normalises) and stored in float16. The same table gives
    the same bits for the same semantic settings and the same kind of processor.
    """

    def __init__(self, config: EncodeConfig, model_path: str | Path) -> None:
        self.config = config
        self.model_path = model_path
        self._encoder: TextEncoder | None = None

    def setup(self) -> None:
        """Loads the model. Sets the number of torch threads of this process."""
        if self._encoder is None:
            encoder = TextEncoder(self.config, load_spec(self.model_path, self.config.pooling))
            encoder.setup()
            self._encoder = encoder

    def __call__(self, chunks: pa.Table) -> pa.Table:
        """The chunks without input_ids, with `vector` FixedSizeList<float16>[d].

        Raises SourceError that names doc_id and chunk_no of the first vector with NaN or an infinity.
        """
        self.setup()
        assert self._encoder is not None
        lists = chunks.column("input_ids").combine_chunks()
        offsets = lists.offsets.to_numpy()
        try:
            vectors = self._encoder.encode_ids((lists.flatten().to_numpy(), offsets - offsets[0]))
        except NonFiniteVectorError as error:
            raise _non_finite(chunks, error.index, str(error)) from error
        with np.errstate(over="ignore"):  # checked by the next line, with the row's name
            halves = vectors.astype(np.float16)
        bad = np.flatnonzero(~np.isfinite(halves).all(axis=1))
        if len(bad):
            raise _non_finite(chunks, int(bad[0]), "a component is beyond the range of float16 (65504)")
        schema = schemas.encoded(halves.shape[1])
        values = pa.Array.from_buffers(pa.float16(), halves.size, [None, pa.py_buffer(halves)])
        column = pa.FixedSizeListArray.from_arrays(values, type=schemas.vector_type(halves.shape[1]))
        columns = [column if name == "vector" else chunks.column(name) for name in schema.names]
        return pa.table(columns, schema=schema)

    def queries(self, chunks: pa.Table) -> pa.Table:
        """The piece's share of the query sample (schemas.QUERIES), encoded as queries are."""
        self.setup()
        assert self._encoder is not None
        order, texts = draw_queries(chunks)
        return query_table(order, texts, self._encoder.encode_queries(texts))


def _non_finite(chunks: pa.Table, index: int, detail: str) -> SourceError:
    row = chunks.select(["doc_id", "chunk_no", "source"]).slice(index, 1).to_pylist()[0]
    return SourceError(
        f"vectors must be finite, got NaN or an infinity for doc_id {row['doc_id']!r} chunk_no {row['chunk_no']} "
        f"({row['source']}): {detail}"
    )

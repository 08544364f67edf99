"""Chunks with tokens in, chunks with vectors out.

Shapes: N chunks, S sequences, D vector dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from operators import schemas
from operators.encoding.encode_config import EncodeConfig
from operators.encoding.model_folder import ModelSpec
from operators.encoding.outputs import Output, parse_outputs, represent
from operators.encoding.parity import Parity, compare, plain_vectors
from operators.encoding.text_encoder import Ints, NonFiniteVectorError, Spans, TextEncoder
from operators.errors import ConfigError, SourceError
from operators.query_sample import query_table

NOT_THE_INDEX_ENCODER = "the encoder does not give the vectors that the index was built with"


class Encoder:
    """Operator from a table of CHUNKS to a table of `schemas.encoded(d, outputs)`, row for row.

    spec: from `configured_model`. The vectors are made in float32 (unit length if the model normalises) and stored in
    float16. The same table gives the same bits for the same semantic settings and the same kind of processor.
    """

    def __init__(self, config: EncodeConfig, spec: ModelSpec) -> None:
        self.config = config
        self.text_encoder = TextEncoder(config, spec)
        self.outputs: tuple[Output, ...] = parse_outputs(config.outputs, spec.d)

    def setup(self) -> None:
        """Loads the model. Sets the number of torch threads of this process."""
        self.text_encoder.setup()

    def __call__(self, chunks: pa.Table) -> pa.Table:
        """The chunks without their tokens, with `vector` FixedSizeList<float16>[D] and the columns of `encode.outputs`.

        Raises SourceError that names doc_id and chunk_no of the first vector with NaN or an infinity.
        """
        vectors_ND = self._vectors(chunks)
        with np.errstate(over="ignore"):  # checked by the next line, with the row's name
            halves_ND = vectors_ND.astype(np.float16)
        bad = np.flatnonzero(~np.isfinite(halves_ND).all(axis=1))
        if len(bad):
            raise _non_finite(chunks, int(bad[0]), "a component is beyond the range of float16 (65504)")
        made = {"vector": _fixed_size_list(halves_ND)}
        for output in self.outputs:
            made |= _columns(output, vectors_ND, self.text_encoder.spec.normalize)
        schema = schemas.encoded(vectors_ND.shape[1], self.outputs)
        columns = [made[name] if name in made else chunks.column(name) for name in schema.names]
        return pa.table(columns, schema=schema)

    def _vectors(self, chunks: pa.Table) -> npt.NDArray[np.float32]:
        """float32 [N, D]. Raises SourceError that names the document of the first with NaN or an infinity."""
        try:
            return self.text_encoder.encode_ids(*pooled_spans(chunks))
        except NonFiniteVectorError as error:
            raise _non_finite(chunks, error.index, str(error)) from error

    def queries(self, drawn: pa.Table) -> pa.Table:
        """The piece's share of the query sample, schemas.DRAWN_QUERIES, encoded as queries are: schemas.QUERIES."""
        texts = drawn.column("text").to_pylist()
        try:
            return query_table(drawn.column("order").to_numpy(), texts, self.text_encoder.encode_queries(texts))
        except NonFiniteVectorError as error:
            raise SourceError(f"a query drawn from the piece ({texts[error.index]!r}): {error}") from error

    def check_parity(self, chunks: pa.Table, num_compared: int) -> Parity:
        """The chunks as a run encodes them against plain float32; of the sequences `num_compared`, evenly spaced by length.

        All chunks share the batches, as in a run. Raises SourceError for a vector with NaN, and ConfigError that names the worst text when a bound of the settings
        (encode.min_parity, encode.min_mean_parity) is not kept.
        """
        (flat, offsets), spans = pooled_spans(chunks)
        found_ND = self._vectors(chunks)
        by_length = np.argsort(np.diff(offsets), kind="stable")
        places = np.linspace(0, len(by_length) - 1, min(num_compared, len(by_length))).astype(np.int64)
        picked = np.sort(by_length[places])
        compared = np.flatnonzero(np.isin(spans.sequence_N, picked))
        renumbered = np.searchsorted(picked, spans.sequence_N[compared])
        plain_ND = plain_vectors(
            self.config,
            self.text_encoder.spec,
            [flat[offsets[s] : offsets[s + 1]] for s in picked.tolist()],
            Spans(renumbered, spans.start_N[compared], spans.end_N[compared]),
        )
        parity = compare(found_ND[compared], plain_ND)
        if problem := parity.problem(self.config):
            row = chunks.select(["doc_id", "chunk_no", "source"]).slice(int(compared[parity.worst]), 1).to_pylist()[0]
            raise ConfigError(
                f"the encoder does not give the model's vectors, nothing was encoded: {problem}; worst of {parity.num_vectors}"
                f" is doc_id {row['doc_id']!r} chunk_no {row['chunk_no']} ({row['source']}, cosine {parity.minimum:.6f}), with"
                f" encode.precision {self.config.precision} and {self.text_encoder.attention} attention; use"
                " encode.precision=float32 (or bfloat16 in place of int8), or lower the bound if this is meant"
            )
        return parity

    def compare_queries(self, texts: Sequence[str], stored_QD: npt.NDArray[np.float32]) -> dict[str, float]:
        """Cosines of the texts' vectors, encoded as queries now, to those that were made with the index, as facts.

        Raises ConfigError when a bound of the settings (encode.min_parity, encode.min_mean_parity) is not kept.
        """
        parity = compare(self.text_encoder.encode_queries(list(texts)), stored_QD)
        if problem := parity.problem(self.config):
            raise ConfigError(
                f"{NOT_THE_INDEX_ENCODER}, nothing was encoded: {problem}; worst of"
                f" {parity.num_vectors} is the query {texts[parity.worst]!r} (cosine {parity.minimum:.6f}). Another kind of"
                " processor or device does not explain that much: compare the model's files and the libraries"
            )
        return {"reference_cosine_min": parity.minimum, "reference_cosine_mean": parity.mean}


def pooled_spans(chunks: pa.Table) -> tuple[tuple[Ints, Ints], Spans]:
    """The sequences of CHUNKS, (flat token ids, int64 [S + 1] offsets), and what each chunk pools of them."""
    lists = chunks.column("input_ids").combine_chunks()
    begins_N = np.asarray(lists.is_valid())
    sequence_N = np.cumsum(begins_N, dtype=np.int64) - 1
    if len(sequence_N) and sequence_N[0] < 0:
        raise ValueError(
            "the first of the chunks must carry its tokens, got null: a table was cut inside of a document"
        )
    present = lists.filter(pa.array(begins_N)) if not begins_N.all() else lists
    offsets = present.offsets.to_numpy().astype(np.int64)
    spans = Spans(
        sequence_N,
        chunks.column("pool_start").to_numpy().astype(np.int64),
        chunks.column("pool_end").to_numpy().astype(np.int64),
    )
    return (present.flatten().to_numpy().astype(np.int64), offsets - offsets[0]), spans


def _columns(output: Output, vectors_ND: npt.NDArray[np.float32], normalize: bool) -> dict[str, pa.Array]:
    """The columns of one output: one, or for int8 the codes and their scale."""
    found = represent(vectors_ND, output.dim, output.dtype, normalize)
    if isinstance(found, tuple):
        codes_ND, scale_N = found
        return {output.name: _fixed_size_list(codes_ND), f"{output.name}_scale": pa.array(scale_N)}
    if output.dtype == "binary":
        values = pa.py_buffer(np.ascontiguousarray(found))
        return {output.name: pa.Array.from_buffers(pa.binary(found.shape[1]), len(found), [None, values])}
    return {output.name: _fixed_size_list(found)}


def _fixed_size_list(values_ND: npt.NDArray[np.generic]) -> pa.Array:
    item = pa.from_numpy_dtype(values_ND.dtype)
    flat = pa.Array.from_buffers(item, values_ND.size, [None, pa.py_buffer(np.ascontiguousarray(values_ND))])
    return pa.FixedSizeListArray.from_arrays(flat, type=schemas.list_type(item, values_ND.shape[1]))


def _non_finite(chunks: pa.Table, index: int, detail: str) -> SourceError:
    row = chunks.select(["doc_id", "chunk_no", "source"]).slice(index, 1).to_pylist()[0]
    return SourceError(
        f"vectors must be finite, got NaN or an infinity for doc_id {row['doc_id']!r} chunk_no {row['chunk_no']} "
        f"({row['source']}): {detail}"
    )

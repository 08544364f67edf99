"""The loops of kernels.rescore, compiled by numba. Imported only where numba is, and the processor widens halves by itself.

Shapes: Q queries, N rows, P pairs, C candidates of a query, k best of them, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.rescore import LANES

Array = Any  # numba compiles for the dtypes of the signature

# A row is asked from memory so many pairs before it is read: rows lie anywhere, and one costs most of a microsecond to come.
# Measured, microseconds for 160 rows of 384 among 200,000: 34 at 0, 22 at 1, 19 at 2, 20 at 4 to 32; 5 where all are in the cache.
AHEAD = 8
LINE_HALVES = 32  # of a cache line

_HALF, _FLOAT, _INT32 = ir.HalfType(), ir.FloatType(), ir.IntType(32)
_HALVES, _FLOATS = ir.VectorType(_HALF, LANES), ir.VectorType(_FLOAT, LANES)


def _readonly(dtype: Any, ndim: int) -> Any:
    return types.Array(dtype, ndim, "C", readonly=True)


def _row_pointer(context: Any, builder: Any, array_type: Any, array: Any, row: Any) -> tuple[Any, Any]:
    """Address of row `row` of a matrix in C order, and its length."""
    matrix = context.make_array(array_type)(context, builder, array)
    zero = context.get_constant(types.intp, 0)
    pointer = cgutils.get_item_pointer(context, builder, array_type, matrix, [row, zero], wraparound=False)
    return pointer, cgutils.unpack_tuple(builder, matrix.shape)[1]


def _sum_of_terms(is_product: bool) -> Any:
    """An intrinsic: the score of one pair, in LANES sums side by side that are added up from the first to the last.

    As vector instructions, which neither numba's nor LLVM's own vectorizer finds. Without fused multiplication and addition: they
    would have other last bits than the array code.
    """

    @intrinsic
    def terms(_: Any, queries_QD: Any, q: Any, halves_ND: Any, r: Any) -> tuple[Any, Callable[..., Any]]:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            query, _ = _row_pointer(context, builder, signature.args[0], arguments[0], arguments[1])
            row, num_dims = _row_pointer(context, builder, signature.args[2], arguments[2], arguments[3])
            row = builder.bitcast(row, _HALF.as_pointer())
            whole = builder.and_(num_dims, ir.Constant(num_dims.type, -LANES))
            lanes = cgutils.alloca_once_value(builder, ir.Constant(_FLOATS, [0.0] * LANES))

            def term(d: Any, half_type: Any, float_type: Any) -> Any:
                half_at = builder.bitcast(builder.gep(row, [d]), half_type.as_pointer())
                float_at = builder.bitcast(builder.gep(query, [d]), float_type.as_pointer())
                x = builder.fpext(builder.load(half_at, align=2), float_type)
                y = builder.load(float_at, align=4)
                if is_product:
                    return builder.fmul(x, y)
                apart = builder.fsub(x, y)
                return builder.fmul(apart, apart)

            zero, step = ir.Constant(num_dims.type, 0), ir.Constant(num_dims.type, LANES)
            with cgutils.for_range_slice(builder, zero, whole, step, inc=True) as (d, _):
                builder.store(builder.fadd(builder.load(lanes), term(d, _HALVES, _FLOATS)), lanes)
            with cgutils.for_range_slice(builder, whole, num_dims, ir.Constant(num_dims.type, 1), inc=True) as (d, _):
                place = builder.trunc(builder.sub(d, whole), _INT32)
                held = builder.load(lanes)
                more = builder.fadd(builder.extract_element(held, place), term(d, _HALF, _FLOAT))
                builder.store(builder.insert_element(held, more, place), lanes)
            held, total = builder.load(lanes), ir.Constant(_FLOAT, 0.0)
            for lane in range(LANES):
                total = builder.fadd(total, builder.extract_element(held, ir.Constant(_INT32, lane)))
            return total if is_product else builder.fneg(total)

        return types.float32(queries_QD, types.intp, halves_ND, types.intp), generate

    return terms


def _prefetch_row(_: Any, halves_ND: Any, r: Any) -> tuple[Any, Callable[..., Any]]:
    """Ask for a row's cache lines."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row, num_dims = _row_pointer(context, builder, signature.args[0], arguments[0], arguments[1])
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, _INT32, _INT32, _INT32])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        zero, step = ir.Constant(num_dims.type, 0), ir.Constant(num_dims.type, LINE_HALVES)
        with cgutils.for_range_slice(builder, zero, num_dims, step, inc=True) as (d, _):
            address = builder.bitcast(builder.gep(row, [d]), byte)
            builder.call(prefetch, [address, _INT32(0), _INT32(3), _INT32(1)])  # to read, into all caches, data
        return context.get_dummy_value()

    return types.void(halves_ND, types.intp), generate


_product, _distance = _sum_of_terms(True), _sum_of_terms(False)
_prefetch: Any = intrinsic(_prefetch_row)
_QUERIES, _ROWS = _readonly(types.float32, 2), _readonly(types.uint16, 2)


@njit(nogil=True, error_model="numpy")
def _is_worse(score: Any, row: Any, than_score: Any, than_row: Any) -> Any:
    return score < than_score or (score == than_score and row > than_row)


@njit(nogil=True, error_model="numpy")
def _sink(scores: Array, rows: Array, size: Any, score: Any, row: Any) -> None:
    """Put a candidate in the place of the root of a heap of `size`."""
    place = 0
    while True:
        below = 2 * place + 1
        if below >= size:
            break
        if below + 1 < size and _is_worse(scores[below + 1], rows[below + 1], scores[below], rows[below]):
            below += 1
        if not _is_worse(scores[below], rows[below], score, row):
            break
        scores[place], rows[place] = scores[below], rows[below]
        place = below
    scores[place], rows[place] = score, row


@njit(
    types.void(
        _QUERIES, _readonly(types.int64, 1), _ROWS, _readonly(types.int64, 1), types.boolean, types.float32[::1]
    ),
    nogil=True,
    cache=True,
    error_model="numpy",
)
def score_pairs(
    queries_QD: Array, query_P: Array, halves_ND: Array, row_P: Array, is_product: bool, out_P: Array
) -> None:
    """As kernels.rescore.score_pairs, with the halves as their bits."""
    for p in range(min(AHEAD, len(row_P))):
        _prefetch(halves_ND, row_P[p])
    for p in range(len(row_P)):
        if p + AHEAD < len(row_P):
            _prefetch(halves_ND, row_P[p + AHEAD])
        if is_product:
            out_P[p] = _product(queries_QD, query_P[p], halves_ND, row_P[p])
        else:
            out_P[p] = _distance(queries_QD, query_P[p], halves_ND, row_P[p])


@njit(
    types.void(_QUERIES, _ROWS, _readonly(types.int64, 2), types.boolean, types.float32[:, ::1], types.int64[:, ::1]),
    nogil=True,
    cache=True,
    error_model="numpy",
)
def best_rows(
    queries_QD: Array, halves_ND: Array, row_QC: Array, is_product: bool, score_Qk: Array, best_Qk: Array
) -> None:
    """As kernels.rescore.best_rows, into `score_Qk` and `best_Qk`, which hold -inf and -1."""
    num_queries, num_candidates = row_QC.shape
    k = best_Qk.shape[1]
    candidates = row_QC.reshape(-1)
    for p in range(min(AHEAD, len(candidates))):
        if candidates[p] >= 0:
            _prefetch(halves_ND, candidates[p])
    for q in range(num_queries):
        scores, rows = score_Qk[q], best_Qk[q]  # a heap, the worst at its root
        held = 0
        for c in range(num_candidates):
            ahead = q * num_candidates + c + AHEAD
            if ahead < len(candidates) and candidates[ahead] >= 0:
                _prefetch(halves_ND, candidates[ahead])
            r = row_QC[q, c]
            if r < 0:
                continue
            score = _product(queries_QD, q, halves_ND, r) if is_product else _distance(queries_QD, q, halves_ND, r)
            if held < k:
                place = held
                held += 1
                while place > 0:
                    above = (place - 1) // 2
                    if not _is_worse(score, r, scores[above], rows[above]):
                        break
                    scores[place], rows[place] = scores[above], rows[above]
                    place = above
                scores[place], rows[place] = score, r
            elif k > 0 and _is_worse(scores[0], rows[0], score, r):
                _sink(scores, rows, k, score, r)
        for end in range(held - 1, 0, -1):  # the worst that is left goes to the end
            score, r = scores[end], rows[end]
            scores[end], rows[end] = scores[0], rows[0]
            _sink(scores, rows, end, score, r)

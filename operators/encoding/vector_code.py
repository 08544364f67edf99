"""Vector code that numba's compiler does not find by itself, written as LLVM's and called from compiled functions.

Addresses and lengths are int64; bfloat16 travels as uint16. All but `float_bits` and `bits_float` need AVX512-BF16.
Imported only where numba is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

ROWS, COLUMNS = 8, 32  # of the tile that lives in registers: 8 rows of 2 registers of 16 lanes

# 2 ** f for f in -0.5..0.5, highest power first: a fit at Chebyshev's points, relative error below 5e-6.
_POWER_OF_TWO = (0.0096760371, 0.0559220356, 0.240221074, 0.693121034, 1.00000008)


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


def _multiply_tile(
    typingctx: Any, a: Any, a_stride: Any, b: Any, b_stride: Any, c: Any, c_stride: Any, num_pairs: Any
) -> Any:
    """c[r, 0:32] = sum over p of the two products of the bfloat16 pairs a[r, p] and b[p, 0:32], for r in 0..7.

    Addresses of int32 pairs (a, b) and float32 (c); strides in elements of 4 bytes.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, a_stride, b, b_stride, c, c_stride, num_pairs = arguments
        i64, i32, f32 = ir.IntType(64), ir.IntType(32), ir.FloatType()
        floats, ints, halves = ir.VectorType(f32, 16), ir.VectorType(i32, 16), ir.VectorType(_BFloat(), 32)
        product = builder.module.declare_intrinsic(
            "llvm.x86.avx512bf16.dpbf16ps.512", (), ir.FunctionType(floats, [floats, halves, halves])
        )

        def at(base: Any, offset: Any, kind: Any) -> Any:
            address = builder.add(base, builder.shl(offset, i64(2)))
            return builder.inttoptr(address, ir.PointerType(kind))

        before = builder.block
        loop = builder.append_basic_block("pairs")
        after = builder.append_basic_block("store")
        builder.branch(loop)
        builder.position_at_end(loop)
        p = builder.phi(i64)
        p.add_incoming(i64(0), before)
        sums = []
        for _ in range(ROWS * 2):
            total = builder.phi(floats)
            total.add_incoming(ir.Constant(floats, [0.0] * 16), before)
            sums.append(total)
        row_of_b = builder.mul(p, b_stride)
        right = []
        for part in range(2):
            loaded = builder.load(at(b, builder.add(row_of_b, i64(16 * part)), ints), align=4)
            right.append(builder.bitcast(loaded, halves))
        found = []
        for row in range(ROWS):
            pair = builder.load(at(a, builder.add(builder.mul(i64(row), a_stride), p), i32), align=4)
            one = builder.insert_element(ir.Constant(ints, ir.Undefined), pair, i32(0))
            left = builder.shuffle_vector(one, ir.Constant(ints, ir.Undefined), ir.Constant(ints, [0] * 16))
            left = builder.bitcast(left, halves)
            for part in range(2):
                found.append(builder.call(product, [sums[2 * row + part], left, right[part]]))
        following = builder.add(p, i64(1))
        p.add_incoming(following, loop)
        for total, value in zip(sums, found, strict=True):
            total.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed("<", following, num_pairs), loop, after)
        builder.position_at_end(after)
        for row in range(ROWS):
            for part in range(2):
                target = builder.add(builder.mul(i64(row), c_stride), i64(16 * part))
                builder.store(found[2 * row + part], at(c, target, floats), align=4)
        return context.get_dummy_value()

    return types.void(*([types.int64] * 7)), build


def _softmax_row(typingctx: Any, scores: Any, out: Any, lo: Any, end: Any, first: Any, last: Any, factor: Any) -> Any:
    """out[j] = 2 ** ((scores[j] - largest) * factor) as bfloat16 for j in first..last - 1, else 0, for j in lo..end - 1.

    Returns their sum, which is NaN if a score is NaN or +inf. Addresses of float32 and of bfloat16; lo and end are
    multiples of 16.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scores, out, lo, end, first, last, factor = arguments
        i64, i32, f32 = ir.IntType(64), ir.IntType(32), ir.FloatType()
        floats, ints, halves = ir.VectorType(f32, 16), ir.VectorType(i32, 16), ir.VectorType(_BFloat(), 16)

        def all_lanes(value: Any, kind: Any) -> Any:
            one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, i32(0))
            return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(ints, [0] * 16))

        def constant(value: Any) -> Any:
            return ir.Constant(floats, [float(np.float32(value))] * 16)

        def call(name: Any, result: Any, *values: Any) -> Any:
            kind = ir.FunctionType(result, [value.type for value in values])
            return builder.call(builder.module.declare_intrinsic(name, (), kind), list(values))

        def fma(x: Any, y: Any, z: Any) -> Any:
            return call("llvm.fma.v16f32", floats, x, y, z)

        lanes = ir.Constant(ints, list(range(16)))
        firsts = all_lanes(builder.trunc(first, i32), ints)
        lasts = all_lanes(builder.trunc(last, i32), ints)
        nothing = constant(-np.inf)

        def loop(initial: Any) -> Any:
            """Begins a loop over the vectors; returns its column, its running value, its scores and its mask."""
            before, body, after = builder.block, builder.append_basic_block("row"), builder.append_basic_block("next")
            builder.branch(body)
            builder.position_at_end(body)
            column, running = builder.phi(i64), builder.phi(floats)
            column.add_incoming(lo, before)
            running.add_incoming(initial, before)
            address = builder.add(scores, builder.shl(column, i64(2)))
            loaded = builder.load(builder.inttoptr(address, ir.PointerType(floats)), align=4)
            index = builder.add(all_lanes(builder.trunc(column, i32), ints), lanes)
            seen = builder.and_(builder.icmp_signed(">=", index, firsts), builder.icmp_signed("<", index, lasts))
            return body, after, column, running, builder.select(seen, loaded, nothing), seen

        def close(body: Any, after: Any, column: Any, running: Any, value: Any) -> Any:
            following = builder.add(column, i64(16))
            column.add_incoming(following, body)
            running.add_incoming(value, body)
            builder.cbranch(builder.icmp_signed("<", following, end), body, after)
            builder.position_at_end(after)

        body, after, column, running, loaded, _ = loop(nothing)
        best = builder.select(builder.fcmp_ordered(">", loaded, running), loaded, running)
        close(body, after, column, running, best)
        largest = all_lanes(call("llvm.vector.reduce.fmax.v16f32", f32, best), floats)
        factors, magic = all_lanes(factor, floats), constant(12582912.0)

        body, after, column, running, loaded, seen = loop(constant(0.0))
        x = builder.fmul(builder.fsub(loaded, largest), factors)
        least = constant(-126.0)
        x = builder.select(builder.fcmp_ordered(">", least, x), least, x)  # NaN stays
        shifted = builder.fadd(x, magic)  # 1.5 * 2^23: rounds to an integer, found in the low bits
        f = builder.fsub(x, builder.fsub(shifted, magic))
        y = constant(_POWER_OF_TWO[0])
        for coefficient in _POWER_OF_TWO[1:]:
            y = fma(y, f, constant(coefficient))
        exponent = builder.shl(builder.bitcast(shifted, ints), ir.Constant(ints, [23] * 16))
        y = builder.bitcast(builder.add(builder.bitcast(y, ints), exponent), floats)
        y = builder.select(seen, y, constant(0.0))
        total = builder.fadd(running, y)
        rounded = call("llvm.x86.avx512bf16.cvtneps2bf16.512", halves, y)
        address = builder.add(out, builder.shl(column, i64(1)))
        builder.store(rounded, builder.inttoptr(address, ir.PointerType(halves)), align=2)
        close(body, after, column, running, total)
        add = builder.module.declare_intrinsic(
            "llvm.vector.reduce.fadd.v16f32", (), ir.FunctionType(f32, [f32, floats])
        )
        return builder.call(add, [ir.Constant(f32, 0.0), total], fastmath=("reassoc",))

    return types.float32(*([types.int64] * 6), types.float32), build


def _scale_row(typingctx: Any, source: Any, target: Any, num: Any, factor: Any) -> Any:
    """target[0:num] = source * factor: float32 to bfloat16, addresses; num is a multiple of 16."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, target, num, factor = arguments
        i64, i32, f32 = ir.IntType(64), ir.IntType(32), ir.FloatType()
        floats, halves = ir.VectorType(f32, 16), ir.VectorType(_BFloat(), 16)
        convert = builder.module.declare_intrinsic(
            "llvm.x86.avx512bf16.cvtneps2bf16.512", (), ir.FunctionType(halves, [floats])
        )
        none = ir.Constant(floats, ir.Undefined)
        factors = builder.shuffle_vector(
            builder.insert_element(none, factor, i32(0)), none, ir.Constant(ir.VectorType(i32, 16), [0] * 16)
        )
        before, body, after = builder.block, builder.append_basic_block("scale"), builder.append_basic_block("scaled")
        builder.branch(body)
        builder.position_at_end(body)
        column = builder.phi(i64)
        column.add_incoming(i64(0), before)
        address = builder.add(source, builder.shl(column, i64(2)))
        loaded = builder.load(builder.inttoptr(address, ir.PointerType(floats)), align=4)
        address = builder.add(target, builder.shl(column, i64(1)))
        rounded = builder.call(convert, [builder.fmul(loaded, factors)])
        builder.store(rounded, builder.inttoptr(address, ir.PointerType(halves)), align=2)
        following = builder.add(column, i64(16))
        column.add_incoming(following, body)
        builder.cbranch(builder.icmp_signed("<", following, num), body, after)
        builder.position_at_end(after)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.float32), build


def _interleave(typingctx: Any, even: Any, odd: Any, target: Any, num: Any) -> Any:
    """target[2 * d], target[2 * d + 1] = even[d], odd[d] for d < num: addresses of uint16; num is a multiple of 32."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        even, odd, target, num = arguments
        i64, i32 = ir.IntType(64), ir.IntType(32)
        halves = ir.VectorType(ir.IntType(16), 32)
        before, body, after = builder.block, builder.append_basic_block("zip"), builder.append_basic_block("zipped")
        builder.branch(body)
        builder.position_at_end(body)
        column = builder.phi(i64)
        column.add_incoming(i64(0), before)
        rows = []
        for base in (even, odd):
            address = builder.add(base, builder.shl(column, i64(1)))
            rows.append(builder.load(builder.inttoptr(address, ir.PointerType(halves)), align=2))
        for part in range(2):
            order = [16 * part + i // 2 + 32 * (i % 2) for i in range(32)]
            mixed = builder.shuffle_vector(*rows, ir.Constant(ir.VectorType(i32, 32), order))
            address = builder.add(builder.add(target, builder.shl(column, i64(2))), i64(64 * part))
            builder.store(mixed, builder.inttoptr(address, ir.PointerType(halves)), align=2)
        following = builder.add(column, i64(32))
        column.add_incoming(following, body)
        builder.cbranch(builder.icmp_signed("<", following, num), body, after)
        builder.position_at_end(after)
        return context.get_dummy_value()

    return types.void(*([types.int64] * 4)), build


def _transpose(typingctx: Any, source: Any, source_stride: Any, target: Any, target_stride: Any) -> Any:
    """target[p, j] = source[j, p] for 16 x 16 numbers of 4 bytes; addresses, strides in bytes."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, source_stride, target, target_stride = arguments
        i64, i32 = ir.IntType(64), ir.IntType(32)
        ints = ir.VectorType(i32, 16)

        def at(base: Any, stride: Any, row: Any) -> Any:
            address = builder.add(base, builder.mul(stride, i64(row)))
            return builder.inttoptr(address, ir.PointerType(ints))

        rows = [builder.load(at(source, source_stride, row), align=2) for row in range(16)]
        for width in (1, 2, 4, 8):  # swaps the off-diagonal blocks of this width, as for a matrix of such blocks
            for row in range(16):
                if row & width:
                    continue
                upper, lower = rows[row], rows[row + width]
                above = [j if not j & width else 16 + j - width for j in range(16)]
                below = [j + width if not j & width else 16 + j for j in range(16)]
                rows[row] = builder.shuffle_vector(upper, lower, ir.Constant(ints, above))
                rows[row + width] = builder.shuffle_vector(upper, lower, ir.Constant(ints, below))
        for row in range(16):
            builder.store(rows[row], at(target, target_stride, row), align=4)
        return context.get_dummy_value()

    return types.void(*([types.int64] * 4)), build


def _float_bits(typingctx: Any, x: Any) -> Any:
    """The bits of a float32 as uint32."""
    return types.uint32(types.float32), lambda context, builder, sig, args: builder.bitcast(args[0], ir.IntType(32))


def _bits_float(typingctx: Any, x: Any) -> Any:
    """The float32 of these bits, a uint32."""
    return types.float32(types.uint32), lambda context, builder, sig, args: builder.bitcast(args[0], ir.FloatType())


multiply_tile: Any = intrinsic(_multiply_tile)
softmax_row: Any = intrinsic(_softmax_row)
scale_row: Any = intrinsic(_scale_row)
interleave: Any = intrinsic(_interleave)
transpose: Any = intrinsic(_transpose)
float_bits: Any = intrinsic(_float_bits)
bits_float: Any = intrinsic(_bits_float)

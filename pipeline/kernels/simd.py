"""Vectors of sixteen float32 for numba: one AVX-512 register, two AVX registers, or whatever LLVM makes of it.

numba emits no vector instruction for a loop over the lanes of a row (seen in its assembly), so the vector type and the
few operations on it are given to LLVM directly.  Loads and stores assume the alignment of one element only.
"""

import numba as nb
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

LANES = 16  # lanes of one vector; one cache line of float32
f4 = nb.float32

_VECTOR = ir.VectorType(ir.FloatType(), LANES)
_BYTES = ir.VectorType(ir.IntType(8), LANES)


class _Float32x16(types.Type):
    def __init__(self):
        super().__init__("float32x16")


float32x16 = _Float32x16()


@register_model(_Float32x16)
class _Float32x16Model(models.PrimitiveModel):
    def __init__(self, dmm, fe):
        super().__init__(dmm, fe, _VECTOR)


def _call(builder, name, result, args):
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, [a.type for a in args]), name)
    return builder.call(function, args)


def _pointer(context, builder, array_type, array, offset, vector):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [offset]), vector.as_pointer())


@intrinsic
def load(typing_context, array, offset):
    """array[offset : offset + 16] of a contiguous float32 array."""

    def generate(context, builder, signature, args):
        value = builder.load(_pointer(context, builder, signature.args[0], args[0], args[1], _VECTOR))
        value.align = 4
        return value

    return float32x16(array, types.intp), generate


@intrinsic
def load_int8(typing_context, array, offset):
    """array[offset : offset + 16] of a contiguous int8 array, as floats."""

    def generate(context, builder, signature, args):
        value = builder.load(_pointer(context, builder, signature.args[0], args[0], args[1], _BYTES))
        value.align = 1
        return builder.sitofp(value, _VECTOR)

    return float32x16(array, types.intp), generate


@intrinsic
def store(typing_context, array, offset, vector):
    """array[offset : offset + 16] = vector."""

    def generate(context, builder, signature, args):
        builder.store(args[2], _pointer(context, builder, signature.args[0], args[0], args[1], _VECTOR)).align = 4
        return context.get_dummy_value()

    return types.void(array, types.intp, float32x16), generate


@intrinsic
def splat(typing_context, scalar):
    """The same number in every lane."""

    def generate(context, builder, signature, args):
        undefined = ir.Constant(_VECTOR, ir.Undefined)
        first = builder.insert_element(undefined, args[0], ir.Constant(ir.IntType(32), 0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        return builder.shuffle_vector(first, undefined, zeros)

    return float32x16(types.float32), generate


@intrinsic
def fma(typing_context, x, y, z):
    """x * y + z, rounded once."""

    def generate(context, builder, signature, args):
        return _call(builder, "llvm.fma.v16f32", _VECTOR, args)

    return float32x16(float32x16, float32x16, float32x16), generate


@intrinsic
def absolute(typing_context, x):
    def generate(context, builder, signature, args):
        return _call(builder, "llvm.fabs.v16f32", _VECTOR, args)

    return float32x16(float32x16), generate


@intrinsic
def largest(typing_context, x):
    """The largest of the sixteen numbers."""

    def generate(context, builder, signature, args):
        return _call(builder, "llvm.vector.reduce.fmax.v16f32", ir.FloatType(), args)

    return types.float32(float32x16), generate


def _binary(operation):
    @intrinsic
    def apply(typing_context, x, y):
        def generate(context, builder, signature, args):
            if operation.startswith("llvm."):
                return _call(builder, f"{operation}.v16f32", _VECTOR, args)
            return getattr(builder, operation)(*args)

        return float32x16(float32x16, float32x16), generate

    return apply


add, sub, mul, div = _binary("fadd"), _binary("fsub"), _binary("fmul"), _binary("fdiv")
minimum, maximum = _binary("llvm.minnum"), _binary("llvm.maxnum")


@intrinsic
def _power_of_two(typing_context, fraction, shifted):
    """fraction * 2**k, where the integer k stands in the low bits of `shifted` (see `exp2`)."""

    def generate(context, builder, signature, args):
        integers = ir.VectorType(ir.IntType(32), LANES)
        exponent = builder.shl(builder.bitcast(args[1], integers), ir.Constant(integers, [23] * LANES))
        return builder.bitcast(builder.add(builder.bitcast(args[0], integers), exponent), _VECTOR)

    return float32x16(float32x16, float32x16), generate


@nb.njit(inline="always")
def exp2(x):
    """2**x for |x| <= 126, relative error below 2e-7; larger |x| are cut to 126.

    x = k + f with k whole and |f| <= 1/2: adding 1.5 * 2**23 rounds x to k and leaves k in the low bits, so the scaling
    by 2**k is one integer addition; 2**f is a polynomial of degree 5 (smallest largest relative error, fitted by us).
    """
    x = minimum(maximum(x, splat(f4(-126.0))), splat(f4(126.0)))
    shifted = add(x, splat(f4(12582912.0)))
    f = sub(x, sub(shifted, splat(f4(12582912.0))))
    p = splat(f4(0.00132764717))
    p = fma(p, f, splat(f4(0.00967554154)))
    p = fma(p, f, splat(f4(0.0555071328)))
    p = fma(p, f, splat(f4(0.240221197)))
    p = fma(p, f, splat(f4(0.693146967)))
    p = fma(p, f, splat(f4(1.0)))
    return _power_of_two(p, shifted)


@nb.njit(inline="always")
def sigmoid(x):
    """1 / (1 + exp(-x)), no table and no branch.

    Relative error below 2e-6 for x >= -20 and below 5e-6 for x >= -87 (x log2(e) is rounded to float32); never below
    2**-126.
    """
    one = splat(f4(1.0))
    return div(one, add(one, exp2(mul(x, splat(f4(-1.4426950408889634))))))

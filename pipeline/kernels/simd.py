"""Vectors of sixteen numbers for numba: float32 (one AVX-512 register, two AVX registers, or whatever LLVM makes of
it) and float64 for sums and certificates.

numba emits no vector instruction for a loop over the lanes of a row (seen in its assembly), so the vector types and the
few operations on them are given to LLVM directly.  Loads and stores assume the alignment of one element only; arrays
from `aligned` keep a vector within one cache line, which is a quarter of the time of a sweep.
"""

import math

import numba as nb
import numpy as np
from llvmlite import ir
from numba.core import cgutils, errors, types
from numba.extending import intrinsic, models, register_model

LANES = 16  # lanes of one vector; one cache line of float32
CACHE_LINE = 64  # bytes
f4 = nb.float32


def _vector(element):
    return ir.VectorType(element, LANES)


_FLOATS, _DOUBLES = _vector(ir.FloatType()), _vector(ir.DoubleType())
_BYTES, _INTS, _LONGS = _vector(ir.IntType(8)), _vector(ir.IntType(32)), _vector(ir.IntType(64))


class Float32x16(types.Type):
    def __init__(self):
        super().__init__("float32x16")


class Float64x16(types.Type):
    def __init__(self):
        super().__init__("float64x16")


float32x16, float64x16 = Float32x16(), Float64x16()


@register_model(Float32x16)
class _Float32x16Model(models.PrimitiveModel):
    def __init__(self, dmm, fe):
        super().__init__(dmm, fe, _FLOATS)


@register_model(Float64x16)
class _Float64x16Model(models.PrimitiveModel):
    def __init__(self, dmm, fe):
        super().__init__(dmm, fe, _DOUBLES)


_LLVM = {float32x16: _FLOATS, float64x16: _DOUBLES}


def aligned(size: int, dtype=np.float32) -> np.ndarray:
    """Zeros (size,) that start at a cache line."""
    dtype = np.dtype(dtype)
    buffer = np.zeros(size * dtype.itemsize + CACHE_LINE, np.uint8)
    start = -buffer.ctypes.data % CACHE_LINE
    return buffer[start : start + size * dtype.itemsize].view(dtype)


def _call(builder, name, result, args):
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, [a.type for a in args]), name)
    return builder.call(function, args)


def _suffix(vector):
    return "v16f32" if vector == float32x16 else "v16f64"


def _element(context, builder, array_type, array, offset):
    if array_type.layout != "C":  # offsets count elements in memory: a strided view would give others, silently
        raise errors.NumbaTypeError(f"{array_type} is not contiguous")
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [offset])


def _pointer(context, builder, array_type, array, offset, vector):
    return builder.bitcast(_element(context, builder, array_type, array, offset), vector.as_pointer())


@intrinsic
def at(typing_context, array, offset):
    """array[offset] without numba's test for a negative offset."""

    def generate(context, builder, signature, args):
        return builder.load(_element(context, builder, signature.args[0], args[0], args[1]))

    return array.dtype(array, types.intp), generate


@intrinsic
def prefetch(typing_context, array, offset):
    """Ask for the cache line of array[offset]; an offset beyond the end is harmless."""

    def generate(context, builder, signature, args):
        byte = ir.IntType(8).as_pointer()
        place = builder.bitcast(_element(context, builder, signature.args[0], args[0], args[1]), byte)
        number = ir.IntType(32)
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [byte, number, number, number]), "llvm.prefetch.p0"
        )
        builder.call(function, [place, number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@intrinsic
def load(typing_context, array, offset):
    """array[offset : offset + 16] of a contiguous float32 array."""

    def generate(context, builder, signature, args):
        value = builder.load(_pointer(context, builder, signature.args[0], args[0], args[1], _FLOATS))
        value.align = 4
        return value

    return float32x16(array, types.intp), generate


@intrinsic
def load_int8(typing_context, array, offset):
    """array[offset : offset + 16] of a contiguous int8 array, as floats."""

    def generate(context, builder, signature, args):
        value = builder.load(_pointer(context, builder, signature.args[0], args[0], args[1], _BYTES))
        value.align = 1
        return builder.sitofp(value, _FLOATS)

    return float32x16(array, types.intp), generate


@intrinsic
def store(typing_context, array, offset, vector):
    """array[offset : offset + 16] = vector, both float32 or both float64."""

    def generate(context, builder, signature, args):
        place = _pointer(context, builder, signature.args[0], args[0], args[1], _LLVM[signature.args[2]])
        builder.store(args[2], place).align = 4
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


def _splatted(builder, scalar, vector):
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_INTS, [0] * LANES))


@intrinsic
def splat(typing_context, scalar):
    """The same float32 in every lane."""
    return float32x16(types.float32), lambda c, builder, s, args: _splatted(builder, args[0], _FLOATS)


@intrinsic
def splat64(typing_context, scalar):
    """The same float64 in every lane."""
    return float64x16(types.float64), lambda c, builder, s, args: _splatted(builder, args[0], _DOUBLES)


@intrinsic
def widen(typing_context, x):
    """float32 to float64, exactly."""
    return float64x16(float32x16), lambda c, builder, s, args: builder.fpext(args[0], _DOUBLES)


@intrinsic
def narrow(typing_context, x):
    """float64 to float32, rounded."""
    return float32x16(float64x16), lambda c, builder, s, args: builder.fptrunc(args[0], _FLOATS)


@intrinsic
def fma(typing_context, x, y, z):
    """x * y + z, rounded once."""

    def generate(context, builder, signature, args):
        return _call(builder, f"llvm.fma.{_suffix(signature.return_type)}", args[0].type, args)

    return x(x, x, x), generate


@intrinsic
def absolute(typing_context, x):
    def generate(context, builder, signature, args):
        return _call(builder, f"llvm.fabs.{_suffix(signature.return_type)}", args[0].type, args)

    return x(x), generate


@intrinsic
def largest(typing_context, x):
    """The largest of the sixteen float32."""

    def generate(context, builder, signature, args):
        return _call(builder, "llvm.vector.reduce.fmax.v16f32", ir.FloatType(), args)

    return types.float32(float32x16), generate


def _binary(operation):
    @intrinsic
    def apply(typing_context, x, y):
        def generate(context, builder, signature, args):
            if operation.startswith("llvm."):
                return _call(builder, f"{operation}.{_suffix(signature.return_type)}", args[0].type, args)
            return getattr(builder, operation)(*args)

        return x(x, x), generate

    return apply


add, sub, mul, div = _binary("fadd"), _binary("fsub"), _binary("fmul"), _binary("fdiv")
minimum, maximum = _binary("llvm.minnum"), _binary("llvm.maxnum")


@intrinsic
def _power_of_two(typing_context, fraction, shifted):
    """fraction * 2**k, where the integer k stands in the low bits of `shifted` (see `exp2`)."""

    def generate(context, builder, signature, args):
        integers, place = (_INTS, 23) if signature.return_type == float32x16 else (_LONGS, 52)
        exponent = builder.shl(builder.bitcast(args[1], integers), ir.Constant(integers, [place] * LANES))
        return builder.bitcast(builder.add(builder.bitcast(args[0], integers), exponent), args[0].type)

    return fraction(fraction, fraction), generate


# the bits of 2/3: mantissas are taken from [2/3, 4/3), so that a logarithm near 0 has no cancellation
_TWO_THIRDS = {float32x16: (_INTS, 23, 0x3F2AAAAB), float64x16: (_LONGS, 52, 0x3FE5555555555555)}


@intrinsic
def _exponent(typing_context, x):
    """k of x = m 2**k with m in [2/3, 4/3), as floats; x positive and normal."""

    def generate(context, builder, signature, args):
        integers, place, base = _TWO_THIRDS[signature.return_type]
        above = builder.sub(builder.bitcast(args[0], integers), ir.Constant(integers, [base] * LANES))
        return builder.sitofp(builder.ashr(above, ir.Constant(integers, [place] * LANES)), args[0].type)

    return x(x), generate


@intrinsic
def _mantissa(typing_context, x):
    """m of x = m 2**k with m in [2/3, 4/3); x positive and normal."""

    def generate(context, builder, signature, args):
        integers, place, base = _TWO_THIRDS[signature.return_type]
        bits = builder.bitcast(args[0], integers)
        above = builder.sub(bits, ir.Constant(integers, [base] * LANES))
        exponent = builder.and_(above, ir.Constant(integers, [-(1 << place)] * LANES))
        return builder.bitcast(builder.sub(bits, exponent), args[0].type)

    return x(x), generate


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


@nb.njit(inline="always")
def log(x):
    """Natural logarithm of positive normal float32; relative error below 3e-7, near 1 too, where it is 0.

    log m = 2 artanh(s), s = (m - 1) / (m + 1), |s| <= 1/5: the series ends after s**9.
    """
    m = _mantissa(x)
    s = div(sub(m, splat(f4(1.0))), add(m, splat(f4(1.0))))
    z = mul(s, s)
    p = splat(f4(2.0 / 9.0))
    p = fma(p, z, splat(f4(2.0 / 7.0)))
    p = fma(p, z, splat(f4(2.0 / 5.0)))
    p = fma(p, z, splat(f4(2.0 / 3.0)))
    p = fma(p, z, splat(f4(2.0)))
    return fma(_exponent(x), splat(f4(0.6931471805599453)), mul(p, s))


@nb.njit(inline="always")
def exp(x):
    """e**x for |x| <= 87, float32; relative error below 2e-6 for |x| <= 20 and below 5e-6 beyond; see `sigmoid`."""
    return exp2(mul(x, splat(f4(1.4426950408889634))))


_INVERSE_FACTORIALS = tuple(1.0 / math.factorial(k) for k in range(13, -1, -1))
_ARTANH = tuple(2.0 / (2 * k + 1) for k in range(11, -1, -1))
_LN2_HIGH, _LN2_LOW = 0.693147180369123816490, 1.90821492927058770002e-10  # the first has 21 zeros at its end


@nb.njit(inline="always")
def exp64(x):
    """e**x of float64 for |x| <= 700, relative error below 4e-16; larger |x| are cut to 700.  Taylor to x**13."""
    x = minimum(maximum(x, splat64(-700.0)), splat64(700.0))
    shift = splat64(6755399441055744.0)  # 1.5 * 2**52: see `exp2`
    shifted = fma(x, splat64(1.4426950408889634), shift)
    k = sub(shifted, shift)
    r = fma(k, splat64(-_LN2_LOW), fma(k, splat64(-_LN2_HIGH), x))
    p = splat64(_INVERSE_FACTORIALS[0])
    for coefficient in _INVERSE_FACTORIALS[1:]:
        p = fma(p, r, splat64(coefficient))
    return _power_of_two(p, shifted)


@nb.njit(inline="always")
def log64(x):
    """Natural logarithm of positive normal float64, relative error below 6e-16, near 1 too; see `log`."""
    m = _mantissa(x)
    s = div(sub(m, splat64(1.0)), add(m, splat64(1.0)))
    z = mul(s, s)
    p = splat64(_ARTANH[0])
    for coefficient in _ARTANH[1:]:
        p = fma(p, z, splat64(coefficient))
    k = _exponent(x)
    return fma(k, splat64(_LN2_HIGH), fma(k, splat64(_LN2_LOW), mul(p, s)))

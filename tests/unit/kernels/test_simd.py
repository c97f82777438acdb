from fractions import Fraction

import numpy as np
import pytest
from numba import njit
from numba.core.errors import NumbaError
from numpy.testing import assert_allclose, assert_array_equal

from pipeline.kernels import simd
from pipeline.kernels.simd import CACHE_LINE, LANES, aligned, f4, load, load_int8, narrow, splat, splat64, store, widen

RANDOM = np.random.default_rng(0).normal(size=(5, LANES)).astype(np.float32) * 100
SMALLEST = float(np.finfo(np.float32).tiny)  # the smallest normal float32


def vectorwise(function):
    """function(x) for arrays of whole vectors."""

    @njit
    def apply(x, out):
        for at in range(0, x.size, LANES):
            store(out, at, function(load(x, at)))

    return apply


exp2_of, sigmoid_of, log_of, exp_of = map(vectorwise, (simd.exp2, simd.sigmoid, simd.log, simd.exp))


@njit
def double_at(high, low, at):
    """Sixteen float64 that no float32 holds: the exact sums of two."""
    return simd.add(widen(load(high, at)), widen(load(low, at)))


@njit
def exp64_of(high, low, factor, out):
    for at in range(0, high.size, LANES):
        store(out, at, simd.exp64(simd.mul(double_at(high, low, at), splat64(factor))))


@njit
def log64_of(high, low, factor, out):
    for at in range(0, high.size, LANES):
        store(out, at, simd.log64(simd.mul(double_at(high, low, at), splat64(factor))))


@njit
def arithmetic(x, y, z, out):
    X, Y, Z = load(x, 0), load(y, 0), load(z, 0)
    store(out, 0, simd.add(X, Y))
    store(out, LANES, simd.sub(X, Y))
    store(out, 2 * LANES, simd.mul(X, Y))
    store(out, 3 * LANES, simd.div(X, Y))
    store(out, 4 * LANES, simd.minimum(X, Y))
    store(out, 5 * LANES, simd.maximum(X, Y))
    store(out, 6 * LANES, simd.absolute(X))
    store(out, 7 * LANES, simd.fma(X, Y, Z))
    return simd.largest(X)


@njit
def arithmetic64(x, y, z, low, out):
    X, Y, Z = double_at(x, low, 0), double_at(y, low, 0), double_at(z, low, 0)
    store(out, 0, simd.add(X, Y))
    store(out, LANES, simd.sub(X, Y))
    store(out, 2 * LANES, simd.mul(X, Y))
    store(out, 3 * LANES, simd.div(X, Y))
    store(out, 4 * LANES, simd.minimum(X, Y))
    store(out, 5 * LANES, simd.maximum(X, Y))
    store(out, 6 * LANES, simd.absolute(X))
    store(out, 7 * LANES, simd.fma(X, Y, Z))
    store(out, 8 * LANES, splat64(0.1))


@njit
def wide_and_back(high, low, wide, back):
    store(wide, 0, widen(load(high, 0)))
    store(back, 0, narrow(double_at(high, low, 0)))


@njit
def elements(array, out):
    for i in range(array.size):
        out[i] = simd.at(array, i)


@njit
def ask_for(array, offset):
    simd.prefetch(array, offset)
    return simd.at(array, 0)


@njit
def moves(source, bytes_, at, out, to):
    store(out, to, load(source, at))
    store(out, to + LANES, load_int8(bytes_, at))
    store(out, to + 2 * LANES, splat(source[at]))


def sweep_of(low, high, size=LANES << 14):
    return np.linspace(low, high, size, dtype=np.float64).astype(np.float32)


def applied(function, x):
    out = np.full_like(x, np.nan)
    function(x, out)
    return out.astype(np.float64)


def test_exp2_is_within_2e_7_relative():
    x = sweep_of(-126, 126)
    want = np.exp2(x.astype(np.float64))
    assert np.abs(applied(exp2_of, x) / want - 1).max() < 2e-7


def test_exp2_is_exact_at_whole_numbers():
    x = np.resize(np.arange(-126, 127), LANES * 16).astype(np.float32)
    assert_array_equal(applied(exp2_of, x), np.exp2(x.astype(np.float64)))


def test_exp2_is_cut_beyond_126():
    x = np.resize([-np.inf, -1e30, -127, 127, 1e30, np.inf], LANES).astype(np.float32)
    assert_array_equal(applied(exp2_of, x), np.exp2(np.clip(x, -126, 126), dtype=np.float64))


@pytest.mark.parametrize(("reach", "bound"), [(20, 2e-6), (87, 5e-6)])
def test_sigmoid_is_within_its_relative_error(reach, bound):
    """The error comes from rounding x log2(e) to float32, so it grows with -x."""
    x = sweep_of(-reach, 90)
    want = 1 / (1 + np.exp(-x.astype(np.float64)))
    assert np.abs(applied(sigmoid_of, x) / want - 1).max() < bound


def test_sigmoid_stays_between_0_and_1_far_out():
    found = applied(sigmoid_of, np.resize([-np.inf, -1e30, -90, 90, 1e30, np.inf], LANES).astype(np.float32))
    assert ((found >= 0) & (found <= 1)).all()
    assert_array_equal(found[[0, 1, 2]] < 1e-37, True)
    assert_array_equal(found[[3, 4, 5]], 1)


def test_sigmoid_is_a_half_at_0():
    assert_array_equal(applied(sigmoid_of, np.zeros(LANES, np.float32)), 0.5)


def test_arithmetic_is_numpys_lane_by_lane():
    x, y, z = RANDOM[:3]
    out = np.empty(8 * LANES, np.float32)
    arithmetic(x, y, z, out)
    want = [x + y, x - y, x * y, x / y, np.minimum(x, y), np.maximum(x, y), np.abs(x)]
    assert_array_equal(out.reshape(8, LANES)[:7], want)


def test_fma_rounds_once():
    x = np.full(LANES, 1 + 2**-12, np.float32)
    z = -(x * x)  # what is left is the rounding error of the product, which two roundings lose
    out = np.empty(8 * LANES, np.float32)
    arithmetic(x, x, z, out)
    assert_array_equal(out[7 * LANES :], x.astype(np.float64) ** 2 + z)
    assert (out[7 * LANES :] != 0).all()


@pytest.mark.parametrize("lane", range(LANES))
def test_largest_looks_at_every_lane(lane):
    x = -np.arange(1, LANES + 1, dtype=np.float32)
    x[lane] = 7
    assert arithmetic(x, x, x, np.empty(8 * LANES, np.float32)) == f4(7)


@pytest.mark.parametrize("at", [0, 1, 3, 16, 17])
def test_loads_and_stores_need_no_alignment_and_touch_sixteen(at):
    source = np.arange(64, dtype=np.float32) / 3
    bytes_ = np.arange(-32, 32).astype(np.int8)
    out = np.full(100, np.nan, np.float32)
    moves(source, bytes_, at, out, at)
    want = np.full(100, np.nan, np.float32)
    want[at : at + 48] = np.concatenate([source[at : at + 16], bytes_[at : at + 16], np.full(16, source[at])])
    assert_array_equal(out, want)


def test_log_is_within_3e_7_relative():
    wide = np.exp(sweep_of(np.log(SMALLEST) + 1e-3, 88.7).astype(np.float64)).astype(np.float32)
    near_one = np.float32(1) + np.arange(-LANES * 2000, LANES * 2000).astype(np.float32) / 2**23
    for x in (wide, sweep_of(0.4, 2.5), near_one):
        assert x.min() >= SMALLEST
        want, found = np.log(x.astype(np.float64)), applied(log_of, x)
        assert_array_equal(found[x == 1], 0)
        assert np.abs(found[x != 1] / want[x != 1] - 1).max() < 3e-7


@pytest.mark.parametrize(("reach", "bound"), [(20, 2e-6), (87, 5e-6)])
def test_exp_is_within_its_relative_error(reach, bound):
    x = sweep_of(-reach, reach)
    assert np.abs(applied(exp_of, x) / np.exp(x.astype(np.float64)) - 1).max() < bound


def doubles(high, seed):
    """(high, low) float32 and their sums, float64 of full length."""
    high = np.asarray(high, np.float32)
    low = (high * np.random.default_rng(seed).uniform(-1, 1, high.size) * 2.0**-26).astype(np.float32)
    return high, low, high.astype(np.float64) + low.astype(np.float64)


def relative_error(found, want):
    return float(np.abs(found.astype(np.longdouble) / want - 1).max())


@pytest.mark.parametrize("reach", [1e-6, 1, 87, 700])
def test_exp64_is_within_4e_16_relative(reach):
    high, low, x = doubles(sweep_of(-reach, reach, LANES << 12), 0)
    x = np.clip(x, -700, 700)
    out = np.empty(high.size)
    exp64_of(high, low, 1.0, out)
    assert relative_error(out, np.exp(x.astype(np.longdouble))) < 4e-16


def test_exp64_is_cut_beyond_700():
    high = np.resize([-np.inf, -1e30, -701, 701, 1e30, np.inf], LANES).astype(np.float32)
    out = np.empty(LANES)
    exp64_of(high, np.zeros(LANES, np.float32), 1.0, out)
    assert_allclose(out, np.exp(np.clip(high.astype(np.float64), -700, 700)), rtol=4e-16)


@pytest.mark.parametrize("factor", [1.0, 2.0**-890, 2.0**890])
def test_log64_is_within_6e_16_relative(factor):
    near_one = np.float32(1) + np.arange(-LANES * 500, LANES * 500).astype(np.float32) / 2**23
    wide = np.exp(sweep_of(-86, 88, LANES << 12).astype(np.float64))
    for high in (wide, sweep_of(0.4, 2.5, LANES << 12), near_one):
        high, low, x = doubles(high, 1)
        low[x == 1], x[x == 1] = 1e-12, 1 + np.float64(np.float32(1e-12))
        out = np.empty(high.size)
        log64_of(high, low, factor, out)
        assert relative_error(out, np.log(x.astype(np.longdouble) * np.longdouble(factor))) < 6e-16


def test_log64_of_1_is_0():
    out = np.full(LANES, np.nan)
    log64_of(np.ones(LANES, np.float32), np.zeros(LANES, np.float32), 1.0, out)
    assert_array_equal(out, 0)


def test_arithmetic_of_doubles_is_numpys_lane_by_lane():
    x, y, z, low = RANDOM[0], RANDOM[1], RANDOM[2], RANDOM[3] * np.float32(1e-9)
    out = np.empty(9 * LANES)
    arithmetic64(x, y, z, low, out)
    x, y, _ = (v.astype(np.float64) + low.astype(np.float64) for v in (x, y, z))
    want = [x + y, x - y, x * y, x / y, np.minimum(x, y), np.maximum(x, y), np.abs(x)]
    assert_array_equal(out.reshape(9, LANES)[:7], want)
    assert_array_equal(out[8 * LANES :], 0.1)
    assert (x != x.astype(np.float32)).all()


def test_fma_of_doubles_rounds_once():
    x = np.full(LANES, 1 + 2**-22, np.float32)  # the square of x + 2**-46 has more bits than a float64
    low = np.full(LANES, 2.0**-46, np.float32)
    z = np.full(LANES, -1 - 2**-46, np.float32)
    out = np.empty(9 * LANES)
    arithmetic64(x, x, z, low, out)
    sums = x.astype(np.float64) + low, z.astype(np.float64) + low
    want = [Fraction(a) ** 2 + Fraction(b) for a, b in zip(*sums, strict=True)]
    assert_array_equal(out[7 * LANES : 8 * LANES], [float(w) for w in want])
    assert (out[7 * LANES : 8 * LANES] != sums[0] ** 2 + sums[1]).all()


def test_widening_is_exact_and_narrowing_rounds_to_nearest():
    high, low, x = doubles(RANDOM[0], 2)
    wide, back = np.empty(LANES), np.empty(LANES, np.float32)
    wide_and_back(high, low, wide, back)
    assert_array_equal(wide, high.astype(np.float64))
    assert_array_equal(back, x.astype(np.float32))
    ties = np.resize([1 + 2**-24, 1 + 3 * 2.0**-24], LANES)  # half way between two float32: to the even one
    wide_and_back(np.ones(LANES, np.float32), (ties - 1).astype(np.float32), wide, back)
    assert_array_equal(back, ties.astype(np.float32))


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64, np.float32, np.float64])
def test_at_is_the_element_there(dtype):
    array = np.arange(-7, 50, 3).astype(dtype)
    out = np.empty_like(array)
    elements(array, out)
    assert_array_equal(out, array)
    elements(array[5:], out)  # a view that starts inside
    assert_array_equal(out[:-5], array[5:])


def test_arrays_with_strides_are_refused():
    """Offsets count elements in memory: every eighth row would be the first eighth."""
    strided, out = np.arange(64, dtype=np.float32)[::2], np.zeros(32, np.float32)
    for call in (lambda: elements(strided, out), lambda: ask_for(strided, 0), lambda: exp_of(strided, out)):
        with pytest.raises(NumbaError, match="not contiguous"):
            call()


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64, np.float32])
def test_prefetching_changes_nothing_inside_or_beyond_the_array(dtype):
    array = np.arange(1, 40).astype(dtype)
    before = array.copy()
    for offset in (0, 38, 39, 10**6, 10**15, -1, -(10**15)):
        assert ask_for(array, offset) == 1
    assert_array_equal(array, before)


@pytest.mark.parametrize("dtype", [np.int8, np.float32, np.float64])
@pytest.mark.parametrize("size", [1, 15, 16, 17, 1000])
def test_aligned_arrays_are_zeros_that_start_at_a_cache_line(size, dtype):
    kept = [aligned(size, dtype) for _ in range(20)]  # kept alive, so that they lie in different places
    for array in kept:
        assert array.ctypes.data % CACHE_LINE == 0
        assert (array.shape, array.dtype) == ((size,), np.dtype(dtype))
        assert_array_equal(array, 0)
        array[:] = 1
    assert all((array == 1).all() for array in kept)

import numpy as np
import pytest
from numba import njit
from numpy.testing import assert_array_equal

from pipeline.kernels import simd
from pipeline.kernels.simd import LANES, f4, load, load_int8, splat, store

RANDOM = np.random.default_rng(0).normal(size=(5, LANES)).astype(np.float32) * 100


@njit
def exp2_of(x, out):
    for at in range(0, x.size, LANES):
        store(out, at, simd.exp2(load(x, at)))


@njit
def sigmoid_of(x, out):
    for at in range(0, x.size, LANES):
        store(out, at, simd.sigmoid(load(x, at)))


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

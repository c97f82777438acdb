import numpy as np
import pytest
from numpy.testing import assert_array_equal

from pipeline.kernels.lanes import sample, signs, uniform
from pipeline.kernels.simd import CACHE_LINE, LANES
from tests.reference import splitmix64

KEYS = [0, 1, 2**63 - 1, 2**63, 2**64 - 1, 0x9E3779B97F4A7C15]


@pytest.mark.parametrize("key", KEYS)
def test_uniform_is_splitmix64(key):
    found = [uniform(np.uint64(key), i) for i in range(200)]
    assert found == [number / 2**53 for number in (z >> 11 for z in splitmix64(key, 200))]


def test_the_reference_is_the_published_generator():
    """First numbers of java.util.SplittableRandom's mixer, as its authors and Vigna's splitmix64.c have them."""
    assert splitmix64(0, 3) == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert splitmix64(1234567, 2) == [6457827717110365317, 3203168211198807973]


def test_uniform_is_even_over_0_to_1():
    n = 20_000
    for key in (0, 1, 77):
        found = np.sort([uniform(np.uint64(key), i) for i in range(n)])
        assert found[0] >= 0 and found[-1] < 1
        # Kolmogorov's distance; 2.2 / sqrt(n) is exceeded once in 8,000 times
        assert np.abs(found - (np.arange(n) + 0.5) / n).max() < 2.2 / np.sqrt(n)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.999, 1.0])
def test_a_sample_has_the_share_that_is_wanted(share):
    n = 100_000
    chosen = sample(n, np.uint64(5), share)
    assert chosen.dtype == bool
    assert abs(chosen.mean() - share) <= 4.5 * np.sqrt(share * (1 - share) / n)


def test_a_row_is_drawn_by_key_and_row_alone():
    long, short = sample(1000, np.uint64(5), 0.4), sample(300, np.uint64(5), 0.4)
    assert_array_equal(long[:300], short)
    assert_array_equal(long, [uniform(np.uint64(5), i) < 0.4 for i in range(1000)])
    assert (long != sample(1000, np.uint64(6), 0.4)).mean() > 0.3
    wider = sample(1000, np.uint64(5), 0.6)
    assert (wider >= long).all()  # a larger share adds rows and loses none


def slow_signs(inside, positives, keep, keys):
    sign = np.zeros((len(inside), LANES), np.int8)
    for lane, rows in enumerate(positives):
        drawn = [number / 2**64 for number in splitmix64(keys[lane], len(inside))]
        for i in range(len(inside)):
            if not inside[i]:
                continue
            if i in rows:
                sign[i, lane] = 1
            elif drawn[i] < keep[lane]:
                sign[i, lane] = -1
    return sign.ravel()


@pytest.mark.parametrize("count", [1, 3, 16])
def test_signs_equal_a_slow_loop(count):
    rng = np.random.default_rng(count)
    n = 150
    inside = rng.random(n) < 0.7
    positives = [np.flatnonzero(rng.random(n) < 0.2).astype(np.int32) for _ in range(count)]
    positives[0] = positives[0][:0]
    keep, keys = rng.random(count), rng.integers(0, 2**64, count, np.uint64)
    keep[-1] = 1.0
    found = signs(inside, positives, keep, keys)
    assert found.dtype == np.int8
    assert_array_equal(found, slow_signs(inside, positives, keep, [int(key) for key in keys]))
    everything = slow_signs(inside, positives, np.full(count, 2.0), [0] * count)
    assert_array_equal(signs(inside, positives), everything)


def test_signs_start_at_a_cache_line():
    assert signs(np.ones(100, bool), [np.arange(3)]).ctypes.data % CACHE_LINE == 0


def test_positives_are_never_drawn_and_negatives_are_close_to_their_share():
    n, share = 50_000, 0.03
    positives = [np.arange(0, n, 10), np.arange(5), np.arange(5)]
    sign = signs(np.ones(n, bool), positives, [share] * 3, np.array([4, 5, 5], np.uint64)).reshape(-1, LANES)
    for lane, rows in enumerate(positives):
        assert_array_equal(np.flatnonzero(sign[:, lane] > 0), rows)
        rest = n - rows.size
        assert abs((sign[:, lane] < 0).sum() - share * rest) < 4.5 * np.sqrt(share * rest)
    assert_array_equal(sign[:, 1], sign[:, 2])  # the same key draws the same rows
    assert (sign[5:, 0] != sign[5:, 1]).any()

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import expit
from sklearn.metrics import brier_score_loss, log_loss

from pipeline.config import CalibrateConfig
from pipeline.kernels.calibration import calibration_error, isotonic, log_odds_at, platt, temperature
from pipeline.kernels.curves import BINS, bin_centres, histogram
from pipeline.kernels.thresholds import Histograms, peers, prior
from pipeline.learners.probabilities import MEASURES, fit, maps, without_each

ALONE = CalibrateConfig(pooling=0)


def histograms_of(S, Y):
    """Scores and gold (n, L) -> the histograms of these rows."""
    found = [histogram(np.ascontiguousarray(s), np.ascontiguousarray(y)) for s, y in zip(S.T, Y.T, strict=True)]
    bins = [np.flatnonzero(p + n) for p, n in found]
    indptr = np.concatenate([[0], np.cumsum([b.size for b in bins])])
    flat = [np.concatenate([c[i][b] for c, b in zip(found, bins, strict=True)]) for i in (0, 1)]
    return Histograms(indptr, np.concatenate(bins).astype(np.int32), *flat)


def problem(n=3000, L=8, seed=0, a=1.0, b=0.0, K=3):
    """Labels from frequent to rare whose log-odds are a score + b; pooled, folds, and the rows of each fold."""
    rng = np.random.default_rng(seed)
    S = rng.normal(np.linspace(-1, -5, L), 2.0, (n, L)).astype(np.float32)
    Y = rng.random((n, L)) < expit(a * S.astype(np.float64) + b)
    fold = np.arange(n) % K
    rows = [(S[fold == f], Y[fold == f]) for f in range(K)]
    return histograms_of(S, Y), [histograms_of(*r) for r in rows], rows


def dense(h, label):
    own = slice(h.indptr[label], h.indptr[label + 1])
    out = np.zeros((2, BINS))
    out[:, h.bins[own]] = h.positives[own], h.negatives[own]
    return out


def test_platt_is_fitted_to_own_counts_and_pseudo_positives_of_peers():
    pooled, folds, _ = problem()
    found = maps(pooled, folds, CalibrateConfig(pooling=7))
    bucket, peer_p, peer_n = peers(pooled)
    for label in range(pooled.size):
        p, n = dense(pooled, label)
        like = prior(pooled, label, bucket[label], peer_p, peer_n)
        # to the last bit: the table holds these
        assert (found.a[label], found.b[label]) == platt(bin_centres(), p + 7 * like[0], n + 7 * like[1])
    assert found.calibration == ["platt"] * pooled.size
    assert not any(k.size for k in found.knot_score)


def test_kinds():
    pooled, folds, _ = problem()
    found = maps(pooled, folds, CalibrateConfig(calibration="temperature"))
    totals = [t.astype(float) for t in pooled.totals()]
    assert set(found.a) == {temperature(bin_centres(), *totals)}
    assert set(found.b) == {0.0}
    found = maps(pooled, folds, CalibrateConfig(calibration="none"))
    assert (set(found.a), set(found.b), set(found.calibration)) == ({1.0}, {0.0}, {"none"})
    for m in MEASURES:
        assert_allclose(getattr(found, f"{m}_after"), getattr(found, f"{m}_before"), rtol=1e-12)


def test_isotonic_is_for_labels_with_enough_positives():
    pooled, folds, _ = problem()
    support = pooled.support()
    enough = int(np.sort(support)[4])
    found = maps(pooled, folds, CalibrateConfig(calibration="isotonic", isotonic_positives=enough, pooling=0))
    plain = maps(pooled, folds, ALONE)
    assert found.calibration == ["isotonic" if s >= enough else "platt" for s in support]
    assert len(set(found.calibration)) == 2
    for label, kind in enumerate(found.calibration):
        if kind == "isotonic":
            knots = isotonic(bin_centres(), *dense(pooled, label))
            assert_array_equal(found.knot_score[label], knots[0])
            assert_array_equal(found.knot_log_odds[label], knots[1])
        assert found.knot_score[label].size == found.knot_log_odds[label].size
        assert (found.knot_score[label].size > 0) == (kind == "isotonic")
    assert_array_equal(found.a, plain.a)
    assert_array_equal(found.b, plain.b)


@pytest.mark.parametrize("kind", ["platt", "isotonic", "temperature", "none"])
def test_labels_without_positives_or_rows_keep_their_score(kind):
    rng = np.random.default_rng(0)
    S = rng.normal(-1, 2, (900, 4)).astype(np.float32)
    Y = rng.random((900, 4)) < expit(0.4 * S)
    Y[:, 1] = False
    parts = [histograms_of(S[f::3], Y[f::3]) for f in range(3)]
    # label 4 has no rows
    folds = [h._replace(indptr=np.append(h.indptr, h.indptr[-1])) for h in parts]
    found = maps(without_each(folds)[0], folds, CalibrateConfig(calibration=kind))
    for label in (1, 4):
        assert (found.a[label], found.b[label], found.calibration[label]) == (1.0, 0.0, "none")
        assert found.knot_score[label].size == 0
    for m in MEASURES:
        for side in ("before", "after"):
            column = getattr(found, f"{m}_{side}")
            assert_array_equal(np.isnan(column), [False, True, False, False, True])
            # all labels have the same rows
            assert_allclose(found.pooled[f"{m}_{side}"], np.nanmean(column))


def test_nothing_known_at_all():
    nothing = Histograms(np.zeros(4, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.int64))
    for folds in ([nothing, nothing], []):
        found = maps(nothing, folds, CalibrateConfig())
        assert_array_equal(found.a, np.ones(3))
        assert found.calibration == ["none"] * 3
        assert np.isnan(list(found.pooled.values())).all()


def test_before_is_the_sigmoid_of_the_score():
    pooled, folds, rows = problem()
    found = maps(pooled, folds, ALONE)
    S, Y = (np.concatenate(x) for x in zip(*rows, strict=True))
    centre = bin_centres()[np.clip(np.floor((S.astype(np.float64) + 16) * 32), 0, BINS - 1).astype(int)]
    for label in range(pooled.size):
        said = expit(centre[:, label])
        assert_allclose(found.brier_before[label], brier_score_loss(Y[:, label], said), rtol=1e-9)
        assert_allclose(found.log_loss_before[label], log_loss(Y[:, label], said), rtol=1e-9)
        p, n = dense(pooled, label)
        assert_allclose(found.ece_before[label], calibration_error(p, n, (p + n) * expit(bin_centres())), rtol=1e-9)


@pytest.mark.parametrize("kind", ["platt", "isotonic", "temperature"])
def test_after_is_judged_on_rows_the_map_was_not_fitted_to(kind):
    pooled, folds, _ = problem()
    cfg = CalibrateConfig(calibration=kind, pooling=5, isotonic_positives=200)
    found = maps(pooled, folds, cfg)
    assert found.out_of_fold
    gap, nats, squares = np.zeros((pooled.size, BINS)), np.zeros(pooled.size), np.zeros(pooled.size)
    for f, held_out in enumerate(folds):
        rest = without_each([h for g, h in enumerate(folds) if g != f])[0]
        bucket, peer_p, peer_n = peers(rest)
        common = temperature(bin_centres(), *(t.astype(float) for t in rest.totals()))
        for label in range(pooled.size):
            p, n = dense(rest, label)
            like = prior(rest, label, bucket[label], peer_p, peer_n)
            p, n = p + 5 * like[0], n + 5 * like[1]
            if found.calibration[label] == "isotonic":
                z = log_odds_at(bin_centres(), *isotonic(bin_centres(), p, n))
            elif found.calibration[label] == "platt":
                a, b = platt(bin_centres(), p, n)
                z = a * bin_centres() + b
            else:
                z = common * bin_centres()
            p, n = dense(held_out, label)
            nats[label] += p @ np.logaddexp(0, -z) + n @ np.logaddexp(0, z)
            squares[label] += p @ expit(-z) ** 2 + n @ expit(z) ** 2
            gap[label] += (p + n) * expit(z)
    for label in range(pooled.size):
        p, n = dense(pooled, label)
        assert_allclose(found.ece_after[label], calibration_error(p, n, gap[label]), rtol=1e-3, atol=1e-7)
    assert_allclose(found.log_loss_after, nats / 3000, rtol=1e-6)
    assert_allclose(found.brier_after, squares / 3000, rtol=1e-6)
    assert set(found.calibration) == ({"isotonic", "platt"} if kind == "isotonic" else {kind})


@pytest.mark.parametrize("kind", ["platt", "isotonic", "temperature"])
def test_a_fold_does_not_move_the_map_it_is_judged_by(kind):
    _, folds, rows = problem()
    S, Y = rows[1]
    other = histograms_of(S + 3, ~Y)
    kinds = np.full(folds[0].size, kind, object)
    start = fit(folds[2], kinds, 10.0)
    one = fit(without_each(folds)[1][1], kinds, 10.0, start)
    two = fit(without_each([folds[0], other, folds[2]])[1][1], kinds, 10.0, start)
    for x, y in zip((one.a, one.b, *one.knot_score, *one.knot_log_odds),
                    (two.a, two.b, *two.knot_score, *two.knot_log_odds), strict=True):  # fmt: skip
        assert_array_equal(x, y)
    # nor does it matter where the fit starts: `start` has seen the held-out fold
    elsewhere = fit(without_each(folds)[1][1], kinds, 10.0, fit(other, kinds, 10.0))
    assert_allclose(elsewhere.a, one.a, rtol=1e-4)
    assert_allclose(elsewhere.b, one.b, rtol=1e-4, atol=1e-4)


def test_without_each_is_the_sum_of_the_others():
    pooled, folds, rows = problem(K=4)
    whole, rests = without_each(folds)
    for name in Histograms._fields:
        assert_array_equal(getattr(whole, name), getattr(pooled, name))
    for f, rest in enumerate(rests):
        S, Y = (np.concatenate([r[i] for g, r in enumerate(rows) if g != f]) for i in (0, 1))
        expected = histograms_of(S, Y)
        for label in range(pooled.size):
            assert_array_equal(dense(rest, label), dense(expected, label))


def test_calibration_helps_a_distorted_problem_and_little_harms_a_calibrated_one():
    pooled, folds, _ = problem(a=0.4, b=-1.0, n=9000)
    for kind in ("platt", "isotonic", "temperature"):
        found = maps(pooled, folds, CalibrateConfig(calibration=kind))
        for m in ("brier", "log_loss", "ece"):
            assert found.pooled[f"{m}_after"] < found.pooled[f"{m}_before"], (kind, m)
        if kind != "temperature":
            assert (found.log_loss_after <= found.log_loss_before).all()
    pooled, folds, _ = problem(n=9000)
    for kind in ("platt", "isotonic", "temperature"):
        found = maps(pooled, folds, CalibrateConfig(calibration=kind))
        assert found.pooled["log_loss_after"] < 1.005 * found.pooled["log_loss_before"]


def test_pooling_pulls_rare_labels_to_their_peers():
    rng = np.random.default_rng(0)
    n, L = 3000, 12
    S = rng.normal(-4, 1.5, (n, L)).astype(np.float32)
    Y = rng.random((n, L)) < expit(0.8 * S - 1.5)
    Y[:, 0] = False
    Y[np.argsort(S[:, 0])[5:8], 0] = True  # three positives, with the lowest scores
    h = histograms_of(S, Y)
    slopes = [maps(h, [], CalibrateConfig(pooling=w)).a[0] for w in (0, 1, 10, 1000)]
    assert slopes[0] == 0.05
    assert slopes[1] <= slopes[2] < slopes[3]
    like = prior(h, 0, *(x[0] if i == 0 else x for i, x in enumerate(peers(h))))
    assert_allclose(slopes[3], platt(bin_centres(), 1e3 * like[0], 1e3 * like[1])[0], rtol=0.05)


@pytest.mark.parametrize("K", [0, 1])
def test_one_fold_is_judged_on_its_own_rows_and_says_so(K):
    pooled, _, _ = problem(a=0.5)
    found = maps(pooled, [pooled] * K, ALONE)
    assert found.out_of_fold is False
    for label in range(pooled.size):
        p, n = dense(pooled, label)
        z = found.a[label] * bin_centres() + found.b[label]
        assert_allclose(found.log_loss_after[label], (p @ np.logaddexp(0, -z) + n @ np.logaddexp(0, z)) / 3000)
    assert (found.log_loss_after <= found.log_loss_before + 1e-4).all()  # smoothed targets cost a little


@pytest.mark.parametrize("kind", ["platt", "isotonic"])
def test_positives_in_one_fold_alone(kind):
    _, _, rows = problem()
    for f, (_, Y) in enumerate(rows):
        if f != 1:
            Y[:, 3] = False
    folds = [histograms_of(*r) for r in rows]
    pooled = without_each(folds)[0]
    kinds = np.full(8, kind, object)
    for pooling, others in ((10.0, True), (0.0, False)):
        found = maps(pooled, folds, CalibrateConfig(calibration=kind, pooling=pooling))
        assert np.isfinite(found.log_loss_after).all()
        assert found.log_loss_after[3] > 0
        # without a positive in the rest: the peers' map, or none at all
        rest = without_each(folds)[1][1]
        lines = fit(rest, kinds, pooling, fit(pooled, kinds, pooling))
        assert rest.support()[3] == 0
        z = lines.log_odds(3, bin_centres())
        if not others:
            assert_array_equal(z, bin_centres())
            continue
        _, peer_p, peer_n = peers(rest)  # the rarest labels are the nearest
        p, n = (
            own + pooling * like[0] / peer_p[0].sum()
            for own, like in zip(dense(rest, 3), (peer_p, peer_n), strict=True)
        )
        if kind == "platt":
            a, b = platt(bin_centres(), p, n)
            assert_allclose(z, a * bin_centres() + b, rtol=1e-4, atol=1e-3)
        else:
            assert_allclose(z, log_odds_at(bin_centres(), *isotonic(bin_centres(), p, n)))

import warnings

import matplotlib
import numpy as np
import pyarrow as pa
import pytest
from numpy.testing import assert_allclose

from pipeline import figures

CURVE = {"cut": [2.0, 0.5, -1.0], "tp": [1, 2, 4], "fp": [0, 1, 5], "positives": 5}
BINS = [
    {"probability": 0.002, "positives": 0.003, "pairs": 900_000},
    {"probability": 0.4, "positives": 0.35, "pairs": 700},
    {"probability": 0.97, "positives": 1.0, "pairs": 3},
]


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a glyph that is missing, a layout that does not fit
        warnings.simplefilter("error", RuntimeWarning)  # a ratio or a logarithm of 0
        yield


@pytest.fixture
def drawn(monkeypatch):
    """The figures themselves instead of their bytes."""
    monkeypatch.setattr(figures, "_png", lambda figure: figure)


def counts(train, support, f1):
    columns = zip(("train_support", "support", "f1"), (train, support, f1), strict=True)
    kinds = {"train_support": pa.int64(), "support": pa.int64(), "f1": pa.float64()}
    return pa.table({name: pa.array(values, kinds[name]) for name, values in columns})


def zipf(labels):
    train = 9000 // np.arange(1, labels + 1)
    support = train // 4
    f1 = [None if s == 0 else s / (s + 3) for s in support.tolist()]
    return counts(train, support, f1)


DRAWINGS = {
    "label_scatter": lambda: figures.label_scatter(zipf(300)),
    "label_scatter, dense": lambda: figures.label_scatter(zipf(5000)),
    "label_scatter, 3 labels": lambda: figures.label_scatter(zipf(3)),
    "support_curve": lambda: figures.support_curve(zipf(300)),
    "support_curve, 5000 labels": lambda: figures.support_curve(zipf(5000)),
    "support_curve, one label": lambda: figures.support_curve(zipf(1)),
    "reliability": lambda: figures.reliability(BINS),
    "reliability, linear": lambda: figures.reliability(BINS[1:2]),
    "label_curve": lambda: figures.label_curve(**CURVE, threshold=0.5, title="spark"),
}

EMPTY = {
    "no labels": lambda: figures.label_scatter(zipf(0)),
    "no label has an F1": lambda: figures.label_scatter(counts([3, 0], [0, 0], [None, None])),
    "no labels by support": lambda: figures.support_curve(zipf(0)),
    "no training documents": lambda: figures.support_curve(counts([0, 0], [1, 2], [0.0, 0.0])),
    "no test positives": lambda: figures.support_curve(counts([5, 2], [0, 0], [None, 0.0])),
    "no bins": lambda: figures.reliability([]),
    "bins without pairs": lambda: figures.reliability([{"probability": 0.5, "positives": 0.0, "pairs": 0}]),
    "one bin at 0": lambda: figures.reliability([{"probability": 0.0, "positives": 0.0, "pairs": 7}]),
    "no positives": lambda: figures.label_curve([], [], [], 0, None, "never seen"),
}


@pytest.mark.parametrize("draw", [*DRAWINGS.values(), *EMPTY.values()], ids=[*DRAWINGS, *EMPTY])
def test_is_a_png_and_the_same_twice(draw):
    png = draw()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert b"Software" not in png
    assert draw() == png


def test_settings_of_matplotlib_stay_as_they_were():
    before = dict(matplotlib.rcParams)
    figures.label_scatter(zipf(3), dark=True)
    assert dict(matplotlib.rcParams) == before


def test_dark_differs_from_light():
    for draw, data in (
        (figures.label_scatter, zipf(9)),
        (figures.support_curve, zipf(9)),
        (figures.reliability, BINS),
    ):
        assert draw(data, dark=True) != draw(data)


def test_every_label_with_an_f1_is_a_point(drawn):
    table = counts([0, 10, 500], [1, 2, 0], [0.0, 0.75, None])
    axes = figures.label_scatter(table).axes[0]
    assert_allclose(axes.collections[0].get_offsets(), [[figures.NONE, 0.0], [10, 0.75]])
    assert "2 labels (1 without" in axes.get_title(loc="left")
    assert axes.get_xticklabels()[0].get_text() == "0"


@pytest.mark.parametrize("values", [[1], [40, 44], [1, 3, 900_000], [figures.NONE, 7]])
def test_log_axis_holds_its_values_and_has_ticks(drawn, values):
    axes = figures.label_scatter(counts(np.floor(values), [1] * len(values), [0.5] * len(values))).axes[0]
    low, high = axes.get_xlim()
    assert low < min(values)
    assert max(values) < high
    assert 2 <= len(axes.get_xticks()) <= 8


def test_median_needs_several_labels_of_similar_support(drawn):
    assert not figures.label_scatter(zipf(20)).axes[0].lines
    assert figures.label_scatter(zipf(300)).axes[0].lines


def test_groups_hold_half_and_nine_tenths_of_the_positives(drawn):
    # 100 positives: 50 | 30 + 10 | 5 + 5
    table = counts([5, 30, 50, 10, 5], [1, 1, 1, 1, 0], [0.1, 0.4, 0.9, 0.6, 0.8])
    bars = figures.support_curve(table).axes[1]
    assert_allclose([bar.get_width() for bar in bars.patches], [0.9, 0.5, 0.1])


def test_reliability_draws_a_share_of_0_or_1_at_the_edge_of_the_logit_axes(drawn):
    axes = figures.reliability(BINS).axes[0]
    seen, edge = (collection.get_offsets() for collection in axes.collections)
    assert axes.get_xscale() == axes.get_yscale() == "logit"
    assert_allclose(seen, [[0.002, 0.003], [0.4, 0.35]])
    assert_allclose(edge, [[0.97, axes.get_ylim()[1]]])


def test_reliability_shows_the_pairs_of_every_bin_that_has_some(drawn):
    bins = [*BINS[::-1], {"probability": 0.6, "positives": 0.0, "pairs": 0}]
    axes, pairs = figures.reliability(bins).axes
    assert [text.get_text() for text in pairs.texts] == ["900k", "700", "3"]
    assert_allclose(axes.lines[1].get_xdata(), [0.002, 0.4, 0.97])


def test_reliability_is_linear_where_no_bin_is_at_an_end(drawn):
    assert figures.reliability(BINS[1:2]).axes[0].get_xscale() == "linear"


def test_label_curve_draws_the_ratios(drawn):
    figure = figures.label_curve(**CURVE, threshold=-0.25, title="spark")
    precision, recall, f1, threshold = figure.axes[0].lines
    assert_allclose(precision.get_xdata(), CURVE["cut"])
    assert_allclose(precision.get_ydata(), [1, 2 / 3, 4 / 9])
    assert_allclose(recall.get_ydata(), [1 / 5, 2 / 5, 4 / 5])
    assert_allclose(f1.get_ydata(), [2 / 6, 4 / 8, 8 / 14])
    assert_allclose(threshold.get_xdata(), [-0.25, -0.25])


def test_the_chosen_threshold_is_marked():
    pictures = [figures.label_curve(**CURVE, threshold=t, title="spark") for t in (0.5, -1.0, None)]
    assert len(set(pictures)) == 3


@pytest.mark.parametrize("title", ["$\\frac{1}{2$", "a\u202eb\n\x1b[31m", "\U0001f680 \u65e5\u672c", "x" * 300, "<b>&"])
def test_any_label_can_be_a_title(title):
    assert figures.label_curve(**CURVE, threshold=0.5, title=title)


def test_a_title_is_escaped_and_cut(drawn):
    figure = figures.label_curve(**CURVE, threshold=0.5, title="a\u202e\U0001f680" + "x" * 300)
    title = figure.axes[0].get_title(loc="left")
    assert title.startswith("a\\u202e\\U0001f680xxx")
    assert len(title) == 60

"""Counts and curves -> figures (PNG).

A figure is drawn on its own canvas, without pyplot's global state, and the same input gives the same bytes.
"""

import contextlib
import io
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from numpy.typing import ArrayLike, NDArray

from pipeline.errors import shown
from pipeline.kernels.counts import support_groups

FONT = "DejaVu Sans"  # comes with matplotlib, so every machine draws the same
DENSE = 2_000  # labels; above it points would hide one another, and hexagons count them
NONE = 0.5  # where a support of 0 stands on a log axis


class Palette(NamedTuple):
    """Colours of a figure; blue, orange and green stay apart for colour-blind readers."""

    page: str
    ink: str
    muted: str
    grid: str
    blue: str
    orange: str
    green: str
    shades: str


LIGHT = Palette("#ffffff", "#1c2127", "#5b6572", "#e3e7ec", "#1f66b5", "#c4570c", "#14805e", "Blues")
DARK = Palette("#1a1e24", "#e6e9ee", "#9aa5b1", "#323a44", "#6cb0f5", "#f0975a", "#4fc3a1", "Blues_r")


def label_scatter(label_counts: pa.Table, dark: bool = False) -> bytes:
    """F1 of each label against its training support.  Labels whose F1 is 0/0 are left out and counted in the title."""
    train, f1 = _column(label_counts, "train_support"), _column(label_counts, "f1")
    drawn = ~np.isnan(f1)
    with _canvas(dark) as (figure, colours):
        axes = figure.subplots()
        if not drawn.any():
            return _empty(figure, axes, "no label has an F1: the test fold has no positives and no tags")
        x, y = np.maximum(train[drawn], NONE), f1[drawn]
        low, high = _log_axis(axes, "x", x)
        if x.size > DENSE:
            cells = axes.hexbin(
                x, y, gridsize=(36, 14), xscale="log", bins="log", mincnt=1, linewidths=0.2, cmap=colours.shades
            )
            _log_axis(axes, "x", x)  # hexbin puts its own ticks
            bar = figure.colorbar(cells, ax=axes, label="labels", pad=0.01, aspect=30)
            bar.outline.set_visible(False)
            _log_axis(bar.ax, "y", cells.get_array())
        else:
            size, alpha = (26, 0.75) if x.size < 300 else (14, 0.45)
            axes.scatter(x, y, s=size, alpha=alpha, color=colours.blue, linewidths=0, clip_on=False)
        _median(axes, x, y, colours)
        axes.set_xlim(low, high)
        axes.set_ylim(-0.04, 1.04)
        axes.set(xlabel="training documents of the label", ylabel="F1 on the test fold")
        left_out = f" ({np.sum(~drawn):,} without an F1 left out)" if not drawn.all() else ""
        axes.set_title(f"F1 of {_labels(x.size)}{left_out}")
        return _png(figure)


def reliability(bins: list[dict], dark: bool = False) -> bytes:
    """Share of positives against mean predicted probability, and the pairs of each bin.

    bins: {"probability": mean in 0..1, "positives": share in 0..1, "pairs": count}.  The axes are logit where a
    bin's mean is below 0.01 or above 0.99: nearly all pairs of a corpus with many labels stand there.
    """
    bins = sorted((b for b in bins if b["pairs"] > 0), key=lambda b: b["probability"])
    p, share, pairs = (np.array([b[name] for b in bins], float) for name in ("probability", "positives", "pairs"))
    with _canvas(dark) as (figure, colours):
        if not bins:
            return _empty(figure, figure.subplots(), "no probabilities: the test fold is empty")
        axes, counts = figure.subplots(1, 2, width_ratios=(1.35, 1))
        low, high = 0.0, 1.0
        if p.min() < 0.01 or p.max() > 0.99:
            low, high = _logit_axes(axes, np.concatenate([p, share]))
        else:
            axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
        diagonal = np.linspace(low, high, 200)
        axes.plot(diagonal, diagonal, color=colours.muted, linestyle="--", linewidth=1, label="perfect")
        x, y = np.clip(p, low, high), np.clip(share, low, high)
        size = 18 + 16 * np.log10(pairs)
        seen = (share > 0) & (share < 1)
        axes.plot(x, y, color=colours.blue, linewidth=1, alpha=0.6)
        axes.scatter(x[seen], y[seen], s=size[seen], color=colours.blue, zorder=3, clip_on=False)
        if not seen.all():
            axes.scatter(
                x[~seen],
                y[~seen],
                s=size[~seen],
                facecolor=colours.page,
                edgecolor=colours.blue,
                zorder=3,
                clip_on=False,
                label="no positive, or only positives",
            )
        axes.legend(loc="upper left")
        axes.set(xlabel="mean predicted probability", ylabel="share of positives")
        axes.set_title("Reliability")

        row = np.arange(len(bins))
        counts.barh(row, pairs, left=0.5, color=colours.blue, height=0.72)
        counts.set_xscale("log")
        counts.set_xlim(0.5, pairs.max() * 60)  # room for the number beside the longest bar
        for j, n in zip(row, pairs, strict=True):
            counts.text((n + 0.5) * 1.25, j, _compact(n), va="center", fontsize=8.5)
        counts.set_yticks(row, [f"{value:.1g}" if value < 0.01 else f"{value:.2f}" for value in p], fontsize=8.5)
        counts.set_ylim(-0.8, max(len(bins), 6) - 0.2)
        counts.grid(False)
        counts.tick_params(axis="both", length=0)
        counts.xaxis.set_major_locator(NullLocator())
        counts.xaxis.set_minor_locator(NullLocator())
        counts.spines["bottom"].set_visible(False)
        counts.set(xlabel="document-label pairs (log)", ylabel="mean predicted probability of the bin")
        counts.set_title("Pairs in each bin")
        return _png(figure)


def support_curve(label_counts: pa.Table, dark: bool = False) -> bytes:
    """Labels by training support, cut into head, torso and tail, with macro F1 of each group.

    Groups as in `support_groups`.  Macro F1 is over the labels with positives in the test fold.
    """
    train = _column(label_counts, "train_support").astype(np.int64)
    order = np.argsort(-train, kind="stable")
    train = train[order]
    support, f1 = (_column(label_counts, name)[order] for name in ("support", "f1"))
    with _canvas(dark) as (figure, colours):
        if train.sum() == 0:
            return _empty(figure, figure.subplots(), "no label has a training document")
        curve, bars = figure.subplots(1, 2, width_ratios=(1.35, 1))
        groups = support_groups(train)
        edges = [0, *np.cumsum([labels.size for labels in groups.values()])]
        names, tints = tuple(groups), (colours.blue, colours.green, colours.orange)

        rank = np.arange(1, train.size + 1)
        left, right = _log_axis(curve, "x", rank)
        low, high = _log_axis(curve, "y", np.maximum(train, NONE))
        curve.step(rank, np.maximum(train, NONE), where="mid", color=colours.ink, linewidth=1.6)
        walls = [left, *(end + 0.5 for end in edges[1:-1]), right]
        for name, tint, (start, stop), labels in zip(names, tints, pairwise(walls), np.diff(edges), strict=True):
            if labels:
                curve.axvspan(start, stop, color=tint, alpha=0.16, linewidth=0)
                curve.text(np.sqrt(start * stop), high, name, ha="center", va="bottom", color=tint, fontsize=9.5)
        curve.set(xlim=(left, right), ylim=(low, high))
        curve.set(xlabel="labels, most frequent first", ylabel="training documents")
        curve.set_title("Support", pad=20)

        for row, (name, tint, (start, stop)) in enumerate(zip(names, tints, pairwise(edges), strict=True)):
            counted = f1[start:stop][support[start:stop] > 0]
            mean = counted.mean() if counted.size else 0.0
            bars.barh(row, mean, color=tint, height=0.42)
            value = f"{mean:.3f}" if counted.size else "not defined"
            bars.text(mean + 0.02, row, value, va="center", fontweight="bold")
            bars.text(0, row - 0.3, name, va="bottom", color=tint, fontsize=9.5, fontweight="bold")
            size = f"{_labels(stop - start)}, {counted.size:,} with test positives"
            bars.text(0, row + 0.27, size, va="top", color=colours.muted, fontsize=8.5)
        bars.set(xlim=(0, 1.15), ylim=(2.6, -0.6), yticks=[], xticks=[0, 0.25, 0.5, 0.75, 1])
        bars.spines["left"].set_visible(False)
        bars.grid(axis="y", visible=False)
        bars.set(xlabel="macro F1")
        bars.set_title("Macro F1 by group", pad=20)
        return _png(figure)


def label_curve(
    cut: ArrayLike, tp: ArrayLike, fp: ArrayLike, positives: int, threshold: float | None, title: str
) -> bytes:
    """Precision, recall and F1 of one label against the cut; scores >= cut[j] hold tp[j] positives and fp[j] negatives.

    cut, tp, fp: (m,), a row of the table `curves`.  threshold: the chosen cut; None: never tagged.
    """
    cut, tp, fp = np.asarray(cut, float), np.asarray(tp, np.int64), np.asarray(fp, np.int64)
    with _canvas(dark=False) as (figure, colours):
        axes = figure.subplots()
        axes.set_title(_drawable(title), parse_math=False)
        if not cut.size or not positives:
            return _empty(figure, axes, "no curve: the label has no positives")
        ratios = (
            ("precision", tp / np.maximum(tp + fp, 1), colours.green, "-."),
            ("recall", tp / positives, colours.orange, "--"),
            ("F1", 2 * tp / np.maximum(tp + fp + positives, 1), colours.blue, "-"),
        )
        marker = "o" if cut.size < 40 else ""
        for name, values, colour, line in ratios:
            axes.plot(cut, values, line, color=colour, label=name, linewidth=2, marker=marker, markersize=4)
        if threshold is not None and np.isfinite(threshold):
            axes.axvline(threshold, color=colours.ink, linewidth=1.4, linestyle=":", label=f"threshold {threshold:.3f}")
        else:
            axes.plot([], [], " ", label="no threshold: never tagged")
        axes.set_ylim(-0.03, 1.03)
        axes.set(xlabel="cut on the score (log-odds)", ylabel=f"out of fold, {int(positives):,} positives")
        figure.legend(loc="outside lower center", ncols=4)
        return _png(figure)


@contextlib.contextmanager
def _canvas(dark) -> Iterator[tuple[Figure, Palette]]:
    colours = DARK if dark else LIGHT
    style: dict[Any, Any] = {
        "font.family": FONT,
        "font.size": 10.5,
        "axes.titlesize": 11.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 10,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
        "grid.linewidth": 0.8,
        "legend.frameon": False,
        "legend.fontsize": 9.5,
        "figure.facecolor": colours.page,
        "axes.facecolor": colours.page,
        "axes.edgecolor": colours.muted,
        "axes.labelcolor": colours.ink,
        "axes.titlecolor": colours.ink,
        "text.color": colours.ink,
        "xtick.color": colours.muted,
        "ytick.color": colours.muted,
        "grid.color": colours.grid,
    }
    with matplotlib.rc_context(style):
        yield Figure(figsize=(7, 4.2), dpi=150, layout="constrained"), colours


def _png(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})  # else the bytes change with matplotlib's version
    return buffer.getvalue()


def _empty(figure, axes: Axes, message):
    axes.set_axis_off()
    axes.text(0.5, 0.5, message, ha="center", va="center", transform=axes.transAxes)
    return _png(figure)


def _column(table, name) -> NDArray[np.float64]:
    return table[name].cast(pa.float64()).to_numpy()


def _log_axis(axes: Axes, side, values) -> tuple[float, float]:
    """A log axis with plain numbers at 1, 2, 5 or at powers of ten; a value of `NONE` is written 0."""
    steps = np.array([m * 10.0**e for e in range(-1, 13) for m in (1, 2, 5)])
    low, high = values.min(), values.max()
    first = np.searchsorted(steps, low, side="right") - 1
    last = max(np.searchsorted(steps, high), first + 1)
    ticks = steps[first : last + 1]
    if len(ticks) > 7:
        ticks = ticks[np.isclose(np.log10(ticks) % 1, 0)]
    if low == NONE:
        ticks = np.append(NONE, ticks[ticks >= 1])
    axes.set(**{f"{side}scale": "log"})
    axis = getattr(axes, f"{side}axis")
    axis.set_major_locator(FixedLocator(ticks.tolist()))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: "0" if value == NONE else _compact(value)))
    return float(steps[first]) / 1.12, float(steps[last]) * 1.12


def _logit_axes(axes, values):
    """Logit axes that hold all values strictly between 0 and 1; returns their limits, where 0 and 1 are drawn."""
    inside = np.append(values[(values > 0) & (values < 1)], [0.1, 0.9])
    near_0, near_1 = (
        10.0 ** np.arange(max(np.floor(np.log10(tail.min()) + 1e-9), -9), 0) for tail in (inside, 1 - inside)
    )
    low, high = near_0[0] * 0.8, 1 - near_1[0] * 0.8
    ticks = [*_thinned(near_0), 0.5, *(1 - _thinned(near_1))[::-1]]
    axes.set(xscale="logit", yscale="logit", xlim=(low, high), ylim=(low, high))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(_probability))
    return low, high


def _thinned(decades):
    """0.1 and as many of the smaller powers of ten as have room on an axis."""
    return decades[::-1][:: 1 + len(decades) // 4][::-1]


def _probability(value, _):
    return f"1e{np.log10(value):.0f}" if value < 0.001 else f"{value:.9f}".rstrip("0")


def _median(axes, x, y, colours):
    """Median F1 of the labels of similar support, where there are enough of them."""
    if x.size < 30 or x.min() == x.max():
        return
    edges = np.geomspace(x.min(), x.max() * 1.001, 11)
    group = np.digitize(x, edges)
    full = [members for k in range(1, 11) if (members := group == k).sum() >= 5]
    axes.plot(
        [np.exp(np.log(x[m]).mean()) for m in full],
        [np.median(y[m]) for m in full],
        color=colours.orange,
        linewidth=2,
        marker="o",
        markersize=4,
        label="median of labels with similar support",
    )
    axes.legend(loc="lower right", frameon=True, framealpha=0.85, edgecolor="none")


def _compact(n):
    """1, 950, 1.2k, 34k, 5.6M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.1f}".removesuffix(".0") + unit if n < 10 * size else f"{n / size:.0f}{unit}"
    return f"{n:g}"


def _labels(n):
    return f"{n:,} label" if n == 1 else f"{n:,} labels"


def _drawable(text):
    """`text` in characters that the font has; others, such as emoji, as escapes instead of empty boxes."""
    font = get_font(findfont(FONT))
    known = (c if font.get_char_index(ord(c)) else c.encode("unicode_escape").decode() for c in shown(text))
    return shown("".join(known), limit=60)

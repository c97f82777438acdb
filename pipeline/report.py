"""Numbers of a fitted run -> one page of HTML.

The page asks for nothing outside itself: figures are data URIs, and its content security policy allows one script by
the hash of its text.  Every text is escaped, and characters that do not show, or that turn text around, are written
U+XXXX.
"""

import base64
import functools
import hashlib
import json
import math
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable

import numpy as np
import pyarrow as pa
from jinja2 import Environment, PackageLoader
from markupsafe import Markup, escape

from pipeline import figures

FREQUENT, LOWEST = 500, 100  # rows of the two label tables; a browser stays quick and the page below 2 MB
PAIRS = 20  # rows of the table of errors that go together
FREQUENT_PAIRS = [("documents", "descending"), ("expected", "ascending"), ("label_id", "ascending")]
LABEL_CHARACTERS, TEXT_CHARACTERS = 160, 1_000
CHIPS = 40  # labels of each kind beside an example
LOOK_ALIKES = 20  # groups, and labels of a group

# Cyrillic and Greek letters, and the dotless i, that a reader takes for Latin ones (a few of Unicode's confusables)
SIMILAR = str.maketrans(
    "\u0430\u0432\u0435\u043a\u043c\u043d\u043e\u0440\u0441\u0442\u0443\u0445\u0455\u0456\u0458\u04bb"
    "\u03b1\u03b9\u03ba\u03bd\u03bf\u03c1\u03c4\u03c5\u0131",
    "abekmhopctyxsijhaikvoptui",
)

SUPPORT = (
    "Labels by training support, with macro F1 by group. The head holds half of all training positives, head and torso "
    "together 90 %."
)
SCATTER = "F1 of each label against its training support. Labels whose F1 is 0/0 are left out."
RELIABILITY = (
    "Mean predicted probability and share of positives of each bin. On the dashed line a probability can be taken at "
    "its word; above it labels are more likely than said, below it less. With many labels nearly all pairs are plain "
    "negatives in the first bin."
)

MEANINGS = {
    "Tags": {
        "micro_precision": "share of all tags given that are gold",
        "micro_recall": "share of all gold labels that were tagged",
        "micro_f1": "harmonic mean of the two: every document-label pair counts the same",
        "macro_f1": "mean F1 of the labels with positives in the test fold: every such label counts the same",
        "macro_f1_all": "mean F1 of every label of the label table, also those the test fold lacks",
        "weighted_f1": "mean F1 of the labels, weighted by their support",
        "samples_f1": "mean over documents of the F1 of their tags",
        "jaccard_samples": "mean over documents of |tags and gold| / |tags or gold|",
        "hamming_loss": "share of all document-label pairs that are wrong; lower is better",
        "subset_accuracy": "share of documents whose tags are exactly the gold labels",
        "hierarchical_precision": "share of tags and their ancestors that are gold or ancestors of gold",
        "hierarchical_recall": "share of gold and its ancestors that are tags or ancestors of tags",
        "hierarchical_f1": "harmonic mean of the two",
    },
    "Whole ranking": {
        "lrap": "mean over gold labels of the share of gold among the labels ranked at or above it",
        "coverage_error": "mean place of the last gold label; lower is better",
        "ranking_loss": "share of (gold, other) label pairs in the wrong order; lower is better",
        "average_precision_macro": "mean over labels of the area under precision and recall",
        "average_precision_micro": "the same area with all document-label pairs pooled",
        "roc_auc_macro": "mean over labels of the chance that a positive scores above a negative",
    },
    "First places of the ranking": {
        "p_at": "share of the top {k} labels that is gold",
        "r_at": "share of a document's gold labels that is in the top {k}",
        "rp_at": "gold labels in the top {k}, over the most there could be",
        "ndcg_at": "gold labels in the top {k}, discounted by their place; 1 is the best order",
        "map_at": "mean precision at the places of the gold labels in the top {k}",
        "psp_at": "as P@{k}, with rare labels counting more (inverse propensity); 1 is the best order",
    },
    "Probabilities": {
        "ece": "mean distance of predicted probability and share of positives; lower is better",
        "brier": "mean squared error of the probabilities; lower is better",
        "log_loss": "mean cross-entropy in nats; lower is better",
    },
}


def render(
    *,
    title: str,
    metrics: dict,
    label_counts: pa.Table,
    reliability_bins: list[dict],
    stages: list[dict],
    settings: dict[str, object],
    examples: list[dict],
    facts: dict,
    rules: dict | None = None,
    confusions: pa.Table | None = None,
    problems: dict | None = None,
) -> str:
    """The page.

    metrics: content of metrics.json; `groups` may be missing.  label_counts: the table of that name.
    reliability_bins: see `figures.reliability`.  facts: what is known of the corpus.
    stages: [{"stage", "seconds", "cpu_seconds", "peak_bytes", "rows", "summary"}].  settings: {"train.C": 10.0, ...}.
    rules: what rules between labels changed: {"before": {metric: value}, "after": ..., "changes": {kind: {"added",
        "removed"}}}.
    confusions: the table of that name; the most frequent pairs are shown.
    problems: see `stages.problems.data_problems`.
    examples: [{"doc_id", "text", "gold": [...], "tags": [{"label", "probability"}]}].
    """
    frequent, lowest = label_rows(label_counts)
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            title=title,
            values=metrics["metrics"],
            intervals=metrics["intervals"],
            conventions=metrics["conventions"],
            counts=metrics["counts"],
            groups=metric_groups(metrics["metrics"]),
            figures=[
                _figure(figures.support_curve, label_counts, SUPPORT),
                _figure(figures.label_scatter, label_counts, SCATTER),
                _figure(figures.reliability, reliability_bins, RELIABILITY),
            ],
            frequent=frequent,
            lowest=lowest,
            n_labels=label_counts.num_rows,
            left_out=label_counts.num_rows - len(frequent) - len(lowest),
            look_alikes=look_alikes(label_counts["label"].to_pylist()),
            stages=stages,
            slowest=max((stage["seconds"] or 0 for stage in stages), default=0),
            settings=settings,
            examples=[_judged(example) for example in examples],
            facts=facts,
            rules=rules,
            support_groups=metrics.get("groups"),
            instead=[] if confusions is None else confusions.sort_by(FREQUENT_PAIRS)[:PAIRS].to_pylist(),
            problems=problems,
            chips=CHIPS,
            most_alike=LOOK_ALIKES,
        )
    )


def label_rows(label_counts: pa.Table) -> tuple[list[dict], list[dict]]:
    """Rows of the page: the most frequent labels of the test fold, and of the others those with the lowest F1.

    The second holds labels with positives only, the more frequent first where F1 is the same.
    """
    support, train, f1 = (label_counts[name].to_numpy() for name in ("support", "train_support", "f1"))
    order = np.lexsort((-train, -support))  # stable: then by label_id
    frequent, rest = np.split(order, [FREQUENT]) if order.size > FREQUENT + LOWEST else (order, order[:0])
    rest = rest[support[rest] > 0]
    lowest = rest[np.argsort(f1[rest], kind="stable")[:LOWEST]]
    return label_counts.take(frequent).to_pylist(), label_counts.take(lowest).to_pylist()


def metric_groups(metrics: dict[str, float]) -> list[tuple[str, list[tuple[str, str]]]]:
    """(group, [(metric, meaning)]) in reading order; a metric without a known meaning stands in the group Other."""
    known: dict[str, tuple[str, str]] = {}
    for group, meanings in MEANINGS.items():
        for name, meaning in meanings.items():
            for metric in metrics:
                family, at, k = metric.rpartition("_")
                if metric == name or (at and family == name and k.isdigit()):
                    known[metric] = group, meaning.format(k=k)
    groups = [(group, [(m, text) for m, (g, text) in known.items() if g == group]) for group in MEANINGS]
    groups.append(("Other", [(m, "") for m in metrics if m not in known]))
    return [(group, rows) for group, rows in groups if rows]


def look_alikes(labels: Iterable[str]) -> list[list[str]]:
    """Groups of labels that differ only in case, spaces, Unicode form, invisible characters or letters of like shape.

    >>> look_alikes(["Spark", "spark ", "Kafka"])
    [['Spark', 'spark ']]
    """
    groups = defaultdict(list)
    for label in labels:
        plain = unicodedata.normalize("NFKC", label).casefold().translate(SIMILAR)
        words = "".join(c for c in plain if c.isprintable() or c.isspace()).split()
        groups[" ".join(words)].append(label)
    return [group for group in groups.values() if len(group) > 1]


def visible(text: str, keep: str = "", limit: int | None = None) -> Markup:
    """`text` for HTML: escaped, and characters that do not show as <u>U+XXXX</u>, except those in `keep`."""
    cut = text if limit is None else text[:limit]
    shown = "".join(str(escape(c)) if c.isprintable() or c in keep else f"<u>{_code_point(c)}</u>" for c in cut)
    return Markup(shown + _rest(cut, text))


def spelled(text: str) -> Markup:
    """`text` with the code point of every character that is not ASCII, to tell look-alikes apart."""
    cut = text[:LABEL_CHARACTERS]
    parts = (f"{c if c.isprintable() else ''}<u>{_code_point(c)}</u>" if c > "~" else visible(c) for c in cut)
    return Markup("".join(parts) + _rest(cut, text))


def _rest(cut, text):
    return "" if len(cut) == len(text) else f'<i title="{len(text):,} characters in all">…</i>'


def _code_point(c):
    return f"U+{ord(c):04X}"


def _plain(text):
    """As `visible`, without elements: for the title of the window."""
    return "".join(c if c.isprintable() else _code_point(c) for c in text)


def _undefined(why):
    return Markup('<span class="none" title="{}">–</span>').format(why)


def _number(value, why="not defined"):
    """Three decimals; small values keep two digits; None and NaN are a dash that says why."""
    if value is None or math.isnan(value):
        return _undefined(why)
    return f"{value:.2g}" if 0 < abs(value) < 0.01 else f"{value:,.3f}"


def _ratio(value, why):
    """Three decimals always, so that a column lines up."""
    return _undefined(why) if value is None else f"{value:.3f}"


def _count(value):
    return _undefined("not known") if value is None else f"{value:,}"


def _seconds(value):
    return _undefined("not measured") if value is None else f"{value:,.1f}"


def _bytes(value):
    if not value:
        return _undefined("not measured")
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def _fact(value):
    """A number, a text, or the parts of a dict in one line."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_fact(part)}" for name, part in value.items()) or "none"
    if isinstance(value, (int, float)):
        return f"{value:,}"
    return "not known" if value is None else str(value)


def _setting(value):
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False, default=str)


def _judged(example):
    """The example with its tags told apart: hits, false tags, gold labels that were missed."""
    gold = set(example["gold"])
    tags = [(tag["label"], tag["probability"]) for tag in example["tags"]]
    said = {label for label, _ in tags}
    return {
        "doc_id": example["doc_id"],
        "text": example["text"],
        "untagged": not tags and not gold,
        "kinds": [
            ("hit", "✓", [tag for tag in tags if tag[0] in gold]),
            ("false", "✗", [tag for tag in tags if tag[0] not in gold]),
            ("missed", "○", [(label, None) for label in example["gold"] if label not in said]),
        ],
    }


def _figure(draw: Callable[..., bytes], data, caption):
    light, dark = (base64.b64encode(draw(data, dark=dark)).decode() for dark in (False, True))
    return {"caption": caption, "light": f"data:image/png;base64,{light}", "dark": f"data:image/png;base64,{dark}"}


def _sha256(text):
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@functools.cache
def _environment():
    def finalize(value):
        """Every value of the template passes here, so no text reaches the page unescaped or invisible."""
        return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(
        loader=PackageLoader("pipeline"),
        autoescape=True,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": _number,
        "ratio": _ratio,
        "count": _count,
        "seconds": _seconds,
        "bytes": _bytes,
        "fact": _fact,
        "setting": _setting,
        "plain": _plain,
        "spelled": spelled,
        "label": functools.partial(visible, limit=LABEL_CHARACTERS),
        "prose": functools.partial(visible, keep="\n\t\u00a0", limit=TEXT_CHARACTERS),
        "sha256": _sha256,
    }
    return environment

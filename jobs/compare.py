"""What `tagmill compare A B` prints: by how much two runs differ on the same test documents, and how sure that is."""

import json
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.table import Table as Grid
from rich.text import Text

from jobs.show import GROUPS, console
from pipeline.errors import ConfigError, shown
from pipeline.kernels import bootstrap
from pipeline.kernels.bootstrap import Comparison
from pipeline.store import Run

LABELS = 20  # rows of each label table on the screen
CONVENTIONS = ("if_undefined", "propensity_a", "propensity_b")  # settings of evaluate that change what a metric means


class Judged(NamedTuple):
    """The test fold of a run; `documents` as the table test_documents has it, `names` of its label ids."""

    run: Run
    documents: pa.Table
    names: list[str]
    metrics: dict[str, float]
    conventions: dict[str, float]


def compare(
    run_a: Run, run_b: Run, as_json: bool, replicates: int = 1000, confidence: float = 0.95, seed: int = 0
) -> None:
    """Metrics and labels of two runs side by side, B less A, with intervals from the same resampled documents."""
    a, b = judged(run_a), judged(run_b)
    for name in CONVENTIONS:
        if a.conventions[name] != b.conventions[name]:
            raise ConfigError(
                f"evaluate.{name} is {a.conventions[name]} in {a.run.root} and {b.conventions[name]} in {b.run.root}; "
                f"expected the same: run `tagmill calibrate --run {b.run.root} "
                f"--set evaluate.{name}={a.conventions[name]}`"
            )
    names, found = compared(a, b, replicates, confidence, seed)
    value = summary(a, b, names, found) | {"replicates": replicates, "confidence": confidence, "seed": seed}
    if as_json:
        print(json.dumps(value, indent=1, ensure_ascii=False))
    else:
        _print(value)


def judged(run: Run) -> Judged:
    """What the run's evaluation left.  ConfigError where it was made by a version that did not keep its documents."""
    settings = run.info["config"]["evaluate"]
    again = f"run `tagmill calibrate --run {run.root}`"
    if "test_documents" not in run.finished("evaluate")["tables"]:
        raise ConfigError(
            f"{run.root}: has no table test_documents, as it was evaluated by an older version; "
            f"expected the test documents with their tags: {again}"
        )
    documents = run.read("test_documents").sort_by("row").combine_chunks()
    sizes = pc.unique(pc.list_value_length(documents["measures"])).to_pylist()
    if sizes != [len(bootstrap.MEASURES)]:
        raise ConfigError(
            f"{run.root}: test_documents has {shown(sizes)} measures a document; "
            f"expected {len(bootstrap.MEASURES)}, as this version writes them: {again}"
        )
    labels = run.read("labels", ["label_id", "label"]).sort_by("label_id")
    metrics = json.loads(run.files("metrics.json")[0].read_text())["metrics"]
    conventions = {name: settings[name] for name in CONVENTIONS}
    return Judged(run, documents, labels["label"].to_pylist(), metrics, conventions)


def compared(a: Judged, b: Judged, replicates: int, confidence: float, seed: int) -> tuple[list[str], Comparison]:
    """Names of the labels, those of A and then those that only B knows, and the comparison over all of them."""
    order = _matched(a, b)
    b = b._replace(documents=b.documents.take(order).combine_chunks())
    ids = {name: label_id for label_id, name in enumerate(a.names)}
    of_b = np.array([ids.setdefault(name, len(ids)) for name in b.names], np.int64)
    of_a = np.arange(len(a.names))
    gold = _lists(a.documents["gold"], of_a)
    _expect_same_gold(a, b, gold, _lists(b.documents["gold"], of_b), list(ids))
    undefined = float(a.conventions["if_undefined"])

    def units(judged, renumbered):
        tags = _lists(judged.documents["tags"], renumbered)
        measures = _flat(judged.documents["measures"]).reshape(-1, len(bootstrap.MEASURES))
        return bootstrap.units_of(*gold, *tags, measures, len(ids), undefined)

    found = bootstrap.compare(
        units(a, of_a), units(b, of_b), len(ids), a.metrics, b.metrics, replicates, confidence, seed, undefined
    )
    return list(ids), found


def _matched(a, b):
    """Rows of B in the order of A.  ConfigError where one has a test document that the other has not."""
    ids_a, ids_b = a.documents["doc_id"], b.documents["doc_id"]
    place = pc.index_in(ids_a, value_set=ids_b.combine_chunks())
    only_a, only_b = place.null_count, len(ids_b) - (len(place) - place.null_count)
    if only_a or only_b:
        strangers = [
            f"such as {shown(ids.filter(pc.invert(pc.is_in(ids, value_set=others.combine_chunks())))[0])} "
            for ids, others, only in ((ids_a, ids_b, only_a), (ids_b, ids_a, only_b))
            if only
        ]
        raise ConfigError(
            f"the test folds differ: {only_a:,} of {len(ids_a):,} documents only in {a.run.root}, {only_b:,} of "
            f"{len(ids_b):,} only in {b.run.root}, {strangers[0]}(doc_id); expected the same documents: "
            "fit both from the same input with the same split.* settings"
        )
    return place


def _flat(column):
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False)


def _lists(column, renumbered):
    """A column of lists of label ids -> indptr (n + 1,), ids after `renumbered`, ascending in a document."""
    lengths = pc.list_value_length(column).to_numpy()
    row = np.repeat(np.arange(len(lengths)), lengths)
    label = renumbered[_flat(column)]
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), label[np.lexsort((label, row))]


def _expect_same_gold(a, b, gold_a, gold_b, names):
    width = len(names)
    pairs = [
        np.repeat(np.arange(len(indptr) - 1), np.diff(indptr)) * width + labels for indptr, labels in (gold_a, gold_b)
    ]
    differ = np.setxor1d(*pairs, assume_unique=True)
    if differ.size:
        row, label = divmod(int(differ[0]), width)
        holder, other = (a, b) if differ[0] in pairs[0] else (b, a)
        raise ConfigError(
            f"the gold labels differ on {np.unique(differ // width).size:,} test documents: "
            f"{shown(a.documents['doc_id'][row])} has {shown(names[label])} in {holder.run.root} and not in "
            f"{other.run.root}; expected the same gold: fit both from the same input"
        )


def summary(a: Judged, b: Judged, names: list[str], found: Comparison) -> dict[str, Any]:
    """Everything that is printed, as JSON has it: all metrics, and all labels that are better or worse."""
    metrics = {
        name: {
            "a": float(found.a[k]),
            "b": float(found.b[k]),
            "difference": float(found.difference[k]),
            "interval": found.interval[k].tolist(),
            "p": float(found.p[k]),
            "b_is": _verdict(name, *found.interval[k]),
        }
        for k, name in enumerate(bootstrap.METRICS)
    }

    def label(j):
        return {
            "label": names[j],
            "support": int(found.support[j]),
            "a": float(found.f1_a[j]),
            "b": float(found.f1_b[j]),
            "difference": float(found.label_difference[j]),
            "interval": found.label_interval[j].tolist(),
            "p": float(found.label_p[j]),
            "holds": bool(found.holds[j]),
        }

    # what holds first, then the largest difference; names settle the rest
    order = sorted(
        np.flatnonzero(found.better | found.worse).tolist(),
        key=lambda j: (not found.holds[j], -abs(found.label_difference[j]), names[j]),
    )
    return {
        "run_a": str(a.run.root),
        "run_b": str(b.run.root),
        "documents": a.documents.num_rows,
        "metrics": metrics,
        "labels": {
            "all": len(names),
            "only_in_a": len(set(a.names) - set(b.names)),
            "only_in_b": len(set(b.names) - set(a.names)),
            "with_positives": int((found.support > 0).sum()),
            "compared": int(found.tested.sum()),
            "by_chance_at_most": found.by_chance,
            "hold": int(found.holds.sum()),
            "better": [label(j) for j in order if found.better[j]],
            "worse": [label(j) for j in order if found.worse[j]],
        },
    }


def _verdict(name, low, high):
    """better, worse, or None where the interval of B less A holds 0."""
    if low <= 0 <= high:
        return None
    return "better" if (low > 0) != (name in bootstrap.LOWER_IS_BETTER) else "worse"


def _print(value):
    out = console(120)
    labels = value["labels"]
    grid = Grid(
        title=f"{value['documents']:,} test documents, {100 * value['confidence']:.4g} % intervals of "
        f"{value['replicates']:,} replicates",
        title_justify="left",
        show_edge=False,
        pad_edge=False,
    )
    for column in ("", "metric"):
        grid.add_column(column, no_wrap=True)
    for column in ("A", "B", "B - A", "interval", "p"):
        grid.add_column(column, justify="right", no_wrap=True)
    grid.add_column("B is")
    for group, names in GROUPS:
        shown_here = [name for name in names if name in value["metrics"]]
        for k, name in enumerate(shown_here):
            row = value["metrics"][name]
            grid.add_row(
                group if k == 0 else "",
                name,
                *_figures(row, 4),
                f"{row['p']:.3f}",
                row["b_is"] or "",
                end_section=k == len(shown_here) - 1,
            )
    out.print(grid)
    for kind in ("better", "worse"):
        _print_labels(out, kind, labels[kind])
    out.print(
        Text(
            f"\n{labels['compared']:,} of {labels['with_positives']:,} labels with a positive in test are decided "
            f"differently: {len(labels['better']):,} better, {len(labels['worse']):,} worse (the interval excludes 0); "
            f"were the runs equal, chance alone would give up to {labels['by_chance_at_most']:.1f}. "
            f"{labels['hold']:,} hold (*) with a false discovery rate of 5 %."
        ),
        soft_wrap=True,
    )
    if labels["only_in_a"] or labels["only_in_b"]:
        out.print(
            Text(
                f"{labels['only_in_a']:,} labels only A knows, {labels['only_in_b']:,} only B; "
                f"averages over labels are over all {labels['all']:,}, so they may differ from those of `tagmill show`."
            ),
            soft_wrap=True,
        )
    for letter in ("a", "b"):
        out.print(Text(f"{letter.upper()}  {value[f'run_{letter}']}"), soft_wrap=True)


def _print_labels(out, kind, rows):
    if not rows:
        return
    grid = Grid(title=f"\nLabels that are {kind} in B ({len(rows):,})", title_justify="left", show_edge=False)
    grid.add_column("label", overflow="ellipsis", max_width=40, no_wrap=True)
    for column in ("test", "F1 A", "F1 B", "B - A", "interval"):
        grid.add_column(column, justify="right", no_wrap=True)
    grid.add_column("")
    for row in rows[:LABELS]:
        grid.add_row(
            Text(shown(row["label"], 60)), f"{row['support']:,}", *_figures(row, 3), "*" if row["holds"] else ""
        )
    out.print(grid)
    if len(rows) > LABELS:
        out.print(f"{len(rows) - LABELS:,} more: --json", highlight=False)


def _figures(row, digits):
    low, high = row["interval"]
    return (
        f"{row['a']:.{digits}f}",
        f"{row['b']:.{digits}f}",
        f"{row['difference']:+.{digits}f}",
        f"{low:+.{digits}f} .. {high:+.{digits}f}",
    )

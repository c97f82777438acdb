"""Scored test documents -> sums that add over documents, and gold scores that cut the curves."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.kernels import calibration, counts, exact, hierarchy, ranking
from pipeline.learners.label_rules import merged_gold
from pipeline.learners.matrix import gold_pairs
from pipeline.learners.tagger import SCORES_AT_ONCE, Decisions, Weights, tag_lists


class Chunk(NamedTuple):
    """Some test documents: CSR features, and gold as in a CSR matrix with label ids ascending in a row."""

    indptr: np.ndarray
    indices: np.ndarray
    values: np.ndarray
    gold_indptr: np.ndarray
    gold_labels: np.ndarray


def chunks(features: Path, folds: Path, documents: Path, labels: list[str], test: int) -> Iterator[Chunk]:
    """The test documents of one part, as many at once as a dense block of scores allows."""
    fold = pq.read_table(folds, columns=["fold"])["fold"].to_numpy()
    rows = np.flatnonzero(fold == test)
    if rows.size == 0:
        return
    table = pq.read_table(features).take(rows)
    gold = pq.read_table(documents, columns=["row", "labels"]).take(rows)
    at_once = max(1, SCORES_AT_ONCE // max(1, len(labels)))
    for start in range(0, rows.size, at_once):
        part = table.slice(start, at_once).combine_chunks()
        named = gold.slice(start, at_once).combine_chunks()
        row, label_id = gold_pairs(named, labels)
        place = np.searchsorted(named["row"].to_numpy(), row)
        order = np.lexsort((label_id, place))
        yield Chunk(
            _indptr(pc.list_value_length(part["indices"]).to_numpy()),
            pc.list_flatten(part["indices"]).to_numpy(),
            pc.list_flatten(part["values"]).to_numpy(),
            _indptr(np.bincount(place, minlength=part.num_rows)),
            label_id[order],
        )


def judge(chunk: Chunk, weights: Weights, decisions: Decisions, inverse_propensity, if_undefined: float, closure=None):
    """Sums of one chunk, and the (label, calibrated log-odds) of its gold pairs.

    closure: ancestors of each label as `hierarchy_closure` gives them; None: no hierarchical sums.
    """
    S, Z, gold_indptr, gold_labels = _judged(chunk, weights, decisions)
    gold = gold_indptr, gold_labels
    tagged, changes = decisions.tagged(S, Z)
    tp, fp, fn = counts.confusion(tagged, *gold)
    extra: dict = {}
    if decisions.rules is not None:
        before = counts.confusion(decisions.before_rules(S, Z), *gold)
        extra |= {f"before_rules_{name}": count for name, count in zip(("tp", "fp", "fn"), before, strict=True)}
        for kind, (added, removed) in changes.items():
            extra |= {f"{kind}_added": added, f"{kind}_removed": removed}
    if closure is not None:
        rows, ids = np.nonzero(tagged)
        sizes = hierarchy.hierarchical_sums(np.searchsorted(rows, np.arange(S.shape[0] + 1)), ids, *gold, *closure)
        extra |= {f"hierarchical_{name}": int(s.sum()) for name, s in zip(("hits", "tags", "gold"), sizes, strict=True)}
    sums = {
        **extra,
        "documents": S.shape[0],
        "tp": tp,
        "fp": fp,
        "fn": fn,
        **counts.set_sums(tagged, *gold, if_undefined),
        **ranking.ranking_sums(Z, *gold, inverse_propensity),
        **ranking.probability_sums(calibration.probability(Z), *gold),
    }
    return sums, ranking.positive_scores(Z, *gold)


def count_negatives(chunk: Chunk, weights: Weights, decisions: Decisions, label_cuts, pooled_cuts) -> dict:
    """Negatives of one chunk between the cuts of the curves, by label and pooled."""
    _, Z, gold_indptr, gold_labels = _judged(chunk, weights, decisions)
    sums: dict[str, np.ndarray] = {}
    for prefix, cuts in (("", label_cuts), ("pooled_", pooled_cuts)):
        between, equal = ranking.no_negatives(cuts)
        ranking.count_negatives(Z, gold_indptr, gold_labels, cuts, between, equal)
        sums |= {f"{prefix}between": between, f"{prefix}equal": equal}
    return sums


def _judged(chunk, weights, decisions):
    """Scores, log-odds and gold, where labels that are one (synonyms) are one."""
    S = weights.score(*chunk[:3])
    Z = decisions.log_odds(S)
    rules = decisions.rules
    if rules is not None and rules.old.size:
        np.maximum.at(Z.T, rules.same[rules.old], Z[:, rules.old].T)
        Z[:, rules.old] = -np.inf
    return S, Z, *merged_gold(rules, chunk.gold_indptr, chunk.gold_labels)


def added(parts: list[dict]) -> dict:
    """All sums added; empty where there are none."""
    total: dict = {}
    for part in parts:
        total = exact.add_sums(total, part) if total else part
    return total


def _indptr(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def label_table(
    support: pa.Table, sums: dict, cuts, curve_sums: dict, names, thresholds: pa.Table, status, if_undefined
) -> pa.Table:
    """The table `label_counts`.  Ratios that are 0/0 are null; AP and AUC of labels without positives too."""
    tp, fp, fn = (np.asarray(sums[name], np.int64) for name in ("tp", "fp", "fn"))
    precision, recall, f1 = counts.precision_recall_f1(tp, fp, fn, np.nan)
    ap = ranking.average_precision_from_counts(cuts, curve_sums["between"], curve_sums["equal"])
    auc = ranking.roc_auc_from_counts(cuts, curve_sums["between"], curve_sums["equal"])
    columns = {
        "label_id": np.arange(len(names), dtype=np.int32),
        "label": names,
        "tp": tp,
        "fp": fp,
        "fn": fn,
        "support": tp + fn,
        "train_support": support["train"].to_numpy(),
        **{
            name: pa.array(values, from_pandas=True)
            for name, values in (
                ("precision", precision),
                ("recall", recall),
                ("f1", f1),
                ("average_precision", ap),
                ("roc_auc", auc),
            )
        },
        "threshold": thresholds["threshold"],
        "status": status,
    }
    return pa.table(columns)


def examples(features, folds, documents, labels, test, weights, decisions, most, characters) -> list[dict]:
    """The first `most` test documents of a part: doc_id, text (cut), gold labels, tags with probability."""
    fold = pq.read_table(folds, columns=["fold"])["fold"].to_numpy()
    rows = np.flatnonzero(fold == test)[:most]
    if rows.size == 0:
        return []
    part = pq.read_table(features).take(rows).combine_chunks()
    S = weights.score(
        _indptr(pc.list_value_length(part["indices"]).to_numpy()),
        pc.list_flatten(part["indices"]).to_numpy(),
        pc.list_flatten(part["values"]).to_numpy(),
    )
    tags = tag_lists(S, decisions, labels).to_pylist()
    shown = pq.read_table(documents, columns=["doc_id", "text", "labels"]).take(rows).to_pylist()
    return [
        {
            "doc_id": document["doc_id"],
            "text": document["text"][:characters],
            "gold": document["labels"],
            "tags": [{"label": tag["label"], "probability": tag["probability"]} for tag in said],
        }
        for document, said in zip(shown, tags, strict=True)
    ]

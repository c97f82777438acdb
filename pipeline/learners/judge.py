"""Scored test documents -> sums that add, gold scores that cut the curves, and what each document adds."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.kernels import bootstrap, calibration, counts, exact, hierarchy, influence, ranking
from pipeline.kernels.influence import Steps
from pipeline.kernels.ranking import Cuts
from pipeline.learners.label_rules import merged_gold
from pipeline.learners.matrix import gold_pairs
from pipeline.learners.tagger import SCORES_AT_ONCE, Decisions, Weights, tag_lists
from pipeline.learners.vectorizer import one_array
from pipeline.storage import read_table
from pipeline.tables import TABLES


class Part(NamedTuple):
    """The files of one part of the document tables."""

    features: Path
    folds: Path
    documents: Path


class Chunk(NamedTuple):
    """Some test documents: scores, and gold as in a CSR matrix with label ids ascending in a row."""

    scores: np.ndarray  # (m, L) float32
    gold_indptr: np.ndarray
    gold_labels: np.ndarray
    row: pa.Array  # int64
    doc_id: pa.Array


class Curves(NamedTuple):
    """Curves of the whole test fold: their cuts, and what a pair adds to the mean of the curves."""

    label: Cuts
    pooled: Cuts
    average_precision: Steps
    pooled_average_precision: Steps
    roc_auc: Steps


def rows_of_fold(folds: Path, fold: int) -> np.ndarray:
    """Places of the documents of a fold in their part."""
    return np.flatnonzero(read_table(folds, columns=["fold"])["fold"].to_numpy() == fold)


def scored(features: Path, rows: np.ndarray, weights: Weights) -> Iterator[np.ndarray]:
    """Scores of some rows of a part, as many at once as a dense block may hold."""
    table = read_table(features).take(rows)
    at_once = _rows_at_once(weights.bias.size)
    for start in range(0, rows.size, at_once):
        part = table.slice(start, at_once).combine_chunks()
        yield weights.score(
            _indptr(pc.list_value_length(part["indices"]).to_numpy()),
            pc.list_flatten(part["indices"]).to_numpy(),
            pc.list_flatten(part["values"]).to_numpy(),
        )


def chunks(part: Part, labels: list[str], test: int, weights: Weights, kept: np.ndarray | None) -> Iterator[Chunk]:
    """The test documents of one part.  kept: their scores where they are known, (rows, L) float32."""
    rows = rows_of_fold(part.folds, test)
    if rows.size == 0:
        return
    gold = read_table(part.documents, columns=["row", "doc_id", "labels"]).take(rows)
    at_once = _rows_at_once(len(labels))
    if kept is None:
        scores = scored(part.features, rows, weights)
    else:
        scores = (kept[start : start + at_once] for start in range(0, rows.size, at_once))
    for start, S in zip(range(0, rows.size, at_once), scores, strict=True):
        named = gold.slice(start, at_once).combine_chunks()
        row, label_id = gold_pairs(named, labels)
        place = np.searchsorted(named["row"].to_numpy(), row)
        order = np.lexsort((label_id, place))
        indptr = _indptr(np.bincount(place, minlength=named.num_rows))
        yield Chunk(S, indptr, label_id[order], one_array(named["row"]), one_array(named["doc_id"]))


def _rows_at_once(n_labels):
    return max(1, SCORES_AT_ONCE // max(1, n_labels))


def gold_scores(chunk: Chunk, decisions: Decisions) -> tuple[np.ndarray, np.ndarray]:
    """Label and calibrated log-odds of the gold pairs of a chunk, which `ranking.positive_cuts` takes."""
    Z, *gold = _log_odds(chunk, decisions)
    return ranking.positive_scores(Z, *gold)


def count_negatives(chunk: Chunk, decisions: Decisions, label_cuts: Cuts, pooled_cuts: Cuts) -> dict:
    """Negatives of one chunk between the cuts of the curves, by label and pooled."""
    Z, gold_indptr, gold_labels = _log_odds(chunk, decisions)
    sums: dict[str, np.ndarray] = {}
    for prefix, cuts in (("", label_cuts), ("pooled_", pooled_cuts)):
        between, equal = ranking.no_negatives(cuts)
        ranking.count_negatives(Z, gold_indptr, gold_labels, cuts, between, equal)
        sums |= {f"{prefix}between": between, f"{prefix}equal": equal}
    return sums


def curves(cuts: Cuts, pooled: Cuts, sums: dict, n: int) -> Curves:
    """The curves of the fold of n documents from the added sums of `count_negatives`."""
    label, all_labels = ((sums[f"{p}between"], sums[f"{p}equal"]) for p in ("", "pooled_"))
    return Curves(
        cuts,
        pooled,
        influence.average_precision_steps(cuts, *label, n),
        influence.average_precision_steps(pooled, *all_labels, n),
        influence.roc_auc_steps(cuts, *label, n),
    )


def judge(
    chunk: Chunk,
    decisions: Decisions,
    fold: Curves,
    inverse_propensity: np.ndarray,
    if_undefined: float,
    closure=None,
) -> tuple[dict, pa.Table]:
    """Sums of one chunk, and its rows of the table `test_documents`.

    closure: ancestors of each label as `hierarchy_closure` gives them; None: no hierarchical sums.
    """
    S = chunk.scores
    Z, gold_indptr, gold_labels = _log_odds(chunk, decisions)
    gold = gold_indptr, gold_labels
    tagged, changes = decisions.tagged(S, Z)
    tp, fp, fn = counts.confusion(tagged, *gold)
    rows, ids = np.nonzero(tagged)
    tags = np.searchsorted(rows, np.arange(S.shape[0] + 1)), ids
    extra: dict = {}
    if decisions.rules is not None:
        before = counts.confusion(decisions.before_rules(S, Z), *gold)
        extra |= {f"before_rules_{name}": count for name, count in zip(("tp", "fp", "fn"), before, strict=True)}
        for kind, (added, removed) in changes.items():
            extra |= {f"{kind}_added": added, f"{kind}_removed": removed}
    if closure is not None:
        sizes = hierarchy.hierarchical_sums(*tags, *gold, *closure)
        extra |= {f"hierarchical_{name}": int(s.sum()) for name, s in zip(("hits", "tags", "gold"), sizes, strict=True)}
    places = ranking.ranking_values(Z, *gold, inverse_propensity)
    probabilities, of_documents = ranking.probability_sums(calibration.probability(Z), *gold, bootstrap.ECE_BINS)
    sums = {
        **extra,
        "documents": S.shape[0],
        "tp": tp,
        "fp": fp,
        "fn": fn,
        **counts.set_sums(tagged, *gold, if_undefined),
        **{name: exact.exact_sum(exact.to_fixed(values)) for name, values in places.items()},
        **probabilities,
    }
    values = places | {f"ece_{b}": of_documents[:, b] for b in range(bootstrap.ECE_BINS)}
    values |= {"brier": of_documents[:, -2], "log_loss": of_documents[:, -1]}
    values["average_precision_macro"] = influence.of_documents(Z, *gold, fold.label, fold.average_precision)
    values["average_precision_micro"] = influence.of_documents(Z, *gold, fold.pooled, fold.pooled_average_precision)
    values["roc_auc_macro"] = influence.of_documents(Z, *gold, fold.label, fold.roc_auc)
    return sums, _document_rows(chunk, gold, tags, np.column_stack([values[name] for name in bootstrap.MEASURES]))


def _document_rows(chunk, gold, tags, measures):
    width = np.arange(len(measures) + 1) * measures.shape[1]
    lists = [
        pa.ListArray.from_arrays(pa.array(indptr, pa.int32()), pa.array(values))
        for indptr, values in (
            (gold[0], gold[1].astype(np.int32)),
            (tags[0], tags[1].astype(np.int32)),
            (width, measures.ravel()),
        )
    ]
    return pa.table([chunk.row, chunk.doc_id, *lists], schema=TABLES["test_documents"].schema)


def _log_odds(chunk, decisions):
    """Log-odds and gold, where labels that are one (synonyms) are one."""
    Z = decisions.log_odds(chunk.scores)
    rules = decisions.rules
    if rules is not None and rules.old.size:
        np.maximum.at(Z.T, rules.same[rules.old], Z[:, rules.old].T)
        Z[:, rules.old] = -np.inf
    return Z, *merged_gold(rules, chunk.gold_indptr, chunk.gold_labels)


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
    ece = ranking.label_calibration_error(sums["gaps_of_labels"], sums["documents"])
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
        "ece": ece,
        "threshold": thresholds["threshold"],
        "status": status,
    }
    return pa.table(columns)


def examples(part: Part, labels, test, weights, kept, decisions, most, characters) -> list[dict]:
    """The first `most` test documents of a part: doc_id, text (cut), gold labels, tags with probability."""
    rows = rows_of_fold(part.folds, test)[:most]
    if rows.size == 0:
        return []
    S = kept[:most] if kept is not None else np.concatenate(list(scored(part.features, rows, weights)))
    tags = tag_lists(S, decisions, labels).to_pylist()
    shown = read_table(part.documents, columns=["doc_id", "text", "labels"]).take(rows).to_pylist()
    return [
        {
            "doc_id": document["doc_id"],
            "text": document["text"][:characters],
            "gold": document["labels"],
            "tags": [{"label": tag["label"], "probability": tag["probability"]} for tag in said],
        }
        for document, said in zip(shown, tags, strict=True)
    ]

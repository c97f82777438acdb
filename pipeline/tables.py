"""Contracts of the tables: columns, types, key, one sentence each."""

from typing import NamedTuple

import pyarrow as pa


class Table(NamedTuple):
    """A table of a run.  `key` orders an export and holds no value twice; `largest_first` goes before it, if given."""

    name: str
    sentence: str
    key: tuple[str, ...]
    schema: pa.Schema
    largest_first: str = ""

    @property
    def order(self) -> list[tuple[str, str]]:
        """Columns by which an export is sorted, each with `ascending` or `descending`."""
        first = [(self.largest_first, "descending")] if self.largest_first else []
        return first + [(name, "ascending") for name in self.key]


# null: not given, not defined, or never
_NULLABLE = {
    "split",
    "sample",
    "threshold",
    "expected_f1",
    "spread",
    "precision",
    "recall",
    "f1",
    "average_precision",
    "roc_auc",
    "brier_before",
    "brier_after",
    "log_loss_before",
    "log_loss_after",
    "ece_before",
    "ece_after",
}


def _table(name, sentence, key, largest_first="", **columns):
    fields = [pa.field(column, kind, nullable=column in _NULLABLE) for column, kind in columns.items()]
    return Table(name, sentence, key, pa.schema(fields), largest_first)


_int, _long, _real, _float, _text = pa.int32(), pa.int64(), pa.float64(), pa.float32(), pa.string()

TABLES = {
    table.name: table
    for table in (
        _table(
            "documents",
            "Accepted documents in the order of (hash of doc_id, doc_id); `row` counts from 0.",
            ("row",),
            row=_long,
            doc_id=_text,
            text=_text,
            labels=pa.list_(_text),
            split=_text,
        ),
        _table(
            "labels",
            "Every label of an accepted document; `support` counts all documents that carry it.",
            ("label_id",),
            label_id=_int,
            label=_text,
            support=_long,
        ),
        _table(
            "rejects",
            "Records that were not accepted: where they stand, why, and the first characters.",
            ("file", "position"),
            file=_text,
            position=_long,
            reason=_text,
            sample=_text,
        ),
        _table(
            "folds",
            "Fold of each row: -1 test, -2 unused, else 0 to K - 1; with train.folds = 0, 0 is held out, 1 trained on.",
            ("row",),
            row=_long,
            fold=_int,
        ),
        _table(
            "label_support",
            "Documents of each label outside and inside the test fold, and how many training folds lack it.",
            ("label_id",),
            label_id=_int,
            train=_long,
            test=_long,
            folds_without=_int,
        ),
        _table(
            "vocabulary",
            "Terms of the training documents, most frequent first; `hash` is the 64-bit hash that text is matched by.",
            ("feature_id",),
            feature_id=_int,
            term=_text,
            hash=_long,
            df=_long,
            idf=_real,
        ),
        _table(
            "features",
            "TF-IDF rows, unit length; `indices` ascending.",
            ("row",),
            row=_long,
            indices=pa.list_(_int),
            values=pa.list_(_float),
        ),
        _table(
            "label_models",
            "One linear model a label, after pruning; `gap` is the relative duality gap of these weights, `solver_gap` "
            "that before pruning, the largest of the label's lanes; C and positive_weight are those chosen.",
            ("label_id",),
            label_id=_int,
            bias=_float,
            indices=pa.list_(_int),
            weights=pa.list_(_float),
            C=_real,
            positive_weight=_real,
            epochs=_int,
            gap=_real,
            solver_gap=_real,
            objective=_real,
            status=_text,
        ),
        _table(
            "curves",
            "Out-of-fold triples: scores >= cut hold tp positives and fp negatives; fold -1 pools all folds.",
            ("label_id", "fold"),
            label_id=_int,
            fold=_int,
            positives=_long,
            negatives=_long,
            cut=pa.list_(_real),
            tp=pa.list_(_long),
            fp=pa.list_(_long),
        ),
        _table(
            "histograms",
            "Out-of-fold scores in bins of 1/32 from -16 to 16 (the outer bins are open); empty bins are left out.",
            ("label_id", "fold"),
            label_id=_int,
            fold=_int,
            bin=pa.list_(_int),
            positives=pa.list_(_long),
            negatives=pa.list_(_long),
        ),
        _table(
            "thresholds",
            "A label is tagged where score >= threshold (null: never); where the rule goes by document (objective rcut "
            "or samples_f1) the threshold is that of f_beta, for reference, and null still means never.  Probability = "
            "sigmoid(a score + b), or of the straight lines through (knot_score, knot_log_odds) where there are any.  "
            "Brier score, log loss (nats) and ECE are out of fold, before and after calibration.",
            ("label_id",),
            label_id=_int,
            threshold=_real,
            a=_real,
            b=_real,
            knot_score=pa.list_(_real),
            knot_log_odds=pa.list_(_real),
            calibration=_text,
            objective=_text,
            expected_f1=_real,
            spread=_real,
            support=_long,
            brier_before=_real,
            brier_after=_real,
            log_loss_before=_real,
            log_loss_after=_real,
            ece_before=_real,
            ece_after=_real,
        ),
        _table(
            "suspicious",
            "Training documents whose gold the out-of-fold scores doubt, largest doubt first: kind missing (not "
            "labelled, high score) or wrong (labelled, low score); `probability` is that of the label.",
            ("label_id", "row"),
            largest_first="doubt",
            label_id=_int,
            label=_text,
            row=_long,
            doc_id=_text,
            kind=_text,
            score=_real,
            probability=_real,
            doubt=_real,
        ),
        _table(
            "near_duplicates",
            "Test documents whose text is nearly that of a training document, with the most similar one, most similar "
            "first; similarity is Jaccard's, of runs of three words.",
            ("row",),
            largest_first="similarity",
            row=_long,
            doc_id=_text,
            other_row=_long,
            other_doc_id=_text,
            similarity=_real,
        ),
        _table(
            "label_relations",
            "Labels that depend on another one in every document: `label` implies `other`, is on the same documents, "
            "or excludes it while every document carries one of the two; the most documents first.",
            ("label_id", "other_id"),
            largest_first="documents",
            label_id=_int,
            label=_text,
            other_id=_int,
            other=_text,
            kind=_text,
            documents=_long,
        ),
        _table(
            "label_counts",
            "Per label on the test fold: counts and ratios (null: not defined), with the support in training.",
            ("label_id",),
            label_id=_int,
            label=_text,
            tp=_long,
            fp=_long,
            fn=_long,
            support=_long,
            train_support=_long,
            precision=_real,
            recall=_real,
            f1=_real,
            average_precision=_real,
            roc_auc=_real,
            ece=_real,
            threshold=_real,
            status=_text,
        ),
        _table(
            "test_documents",
            "Test documents: gold and tags as label ids, ascending, and what each document adds to the aggregate "
            "metrics (the names are in pipeline.kernels.bootstrap.MEASURES).",
            ("row",),
            row=_long,
            doc_id=_text,
            gold=pa.list_(_int),
            tags=pa.list_(_int),
            measures=pa.list_(_real),
        ),
        _table(
            "confusions",
            "Which label is tagged instead of which: test documents that miss `label` and wrongly carry `instead`, and "
            "how many there would be if the two errors were independent.",
            ("label_id", "instead_id"),
            label_id=_int,
            label=_text,
            instead_id=_int,
            instead=_text,
            documents=_long,
            expected=_real,
        ),
        _table(
            "tags",
            "One row a document, also without a tag; tags by descending probability.",
            ("doc_id",),
            doc_id=_text,
            tags=pa.list_(
                pa.struct([("label", _text), ("score", _real), ("probability", _real), ("threshold", _real)])
            ),
        ),
    )
}


def conform(table: pa.Table, name: str) -> pa.Table:
    """`table` with the columns and types of the contract `name`, in its order.  Raises where a column is missing."""
    return table.select(TABLES[name].schema.names).cast(TABLES[name].schema)

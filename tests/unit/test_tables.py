import pyarrow as pa
import pytest

from pipeline.tables import TABLES, conform

# reviewed: a value may be missing here, with the meaning that the sentence of the table or of the report gives it
NULLABLE = {
    ("documents", "split"),
    ("rejects", "sample"),
    ("thresholds", "threshold"),
    ("thresholds", "expected_f1"),
    ("thresholds", "spread"),
    *(("thresholds", f"{m}_{when}") for m in ("brier", "log_loss", "ece") for when in ("before", "after")),
    ("label_counts", "precision"),
    ("label_counts", "recall"),
    ("label_counts", "f1"),
    ("label_counts", "average_precision"),
    ("label_counts", "roc_auc"),
    ("label_counts", "threshold"),
}


def labels(**columns):
    return pa.table({"label_id": [0, 1], "label": ["a", "b"], "support": [3, 2]} | columns)


def test_every_key_is_among_the_columns_and_never_null():
    for name, table in TABLES.items():
        assert table.name == name
        assert table.key, name
        assert set(table.key) <= set(table.schema.names), name
        assert not any(table.schema.field(key).nullable for key in table.key), name
        assert table.sentence.endswith("."), name


def test_an_export_has_the_largest_first_where_a_table_says_so():
    assert TABLES["labels"].order == [("label_id", "ascending")]
    assert TABLES["suspicious"].order == [("doubt", "descending"), ("label_id", "ascending"), ("row", "ascending")]
    for table in TABLES.values():
        assert {name for name, _ in table.order} <= set(table.schema.names)


def test_no_column_is_null_unless_reviewed():
    found = {(name, f.name) for name, table in TABLES.items() for f in table.schema if f.nullable}
    assert found == NULLABLE


def test_conform_casts_and_orders():
    table = pa.table(
        {"support": pa.array([3, 2], pa.int32()), "label": ["a", "b"], "label_id": [0, 1], "extra": [1, 2]}
    )
    found = conform(table, "labels")
    assert found.schema.equals(TABLES["labels"].schema)
    assert found.to_pydict() == {"label_id": [0, 1], "label": ["a", "b"], "support": [3, 2]}


def test_conform_keeps_an_empty_table():
    assert conform(TABLES["tags"].schema.empty_table(), "tags").num_rows == 0


@pytest.mark.parametrize(
    "table",
    [
        labels().drop_columns(["support"]),
        labels(label_id=[0, 2**31]),  # would overflow
        labels(label_id=[0.0, 0.5]),  # would be cut
        labels(support=[1, None]),
        labels(label=[None, "a"]),
        labels(support=["three", "two"]),
    ],
    ids=["missing column", "too large", "fraction", "null number", "null text", "text for a number"],
)
def test_conform_refuses(table):
    with pytest.raises((KeyError, ValueError)):
        conform(table, "labels")


def test_nullable_columns_take_nulls():
    rows = {"row": [0], "doc_id": ["a"], "text": ["t"], "labels": [["x"]], "split": [None]}
    assert conform(pa.table(rows), "documents")["split"].null_count == 1

"""Documents that a later stage has convicted, when they come again."""

import collections

import pyarrow as pa
import pytest

from pipeline.config import Config
from pipeline.errors import DataError
from pipeline.stages import ingest
from pipeline.tables import TABLES

VERDICTS = {
    "d1": {"doc_id": "d1", "reason": "oom", "stage": "split", "what": "needs more than 4.0 GB of memory"},
    "gone": {"doc_id": "gone", "reason": "timeout", "stage": "split", "what": ""},
}


def keyed(*doc_ids):
    rows = [
        {"file": "f", "position": k, "doc_id": d, "text": "t", "labels": [], "label_repairs": 0, "key": 0, "bucket": 0}
        for k, d in enumerate(doc_ids)
    ]
    return pa.Table.from_pylist(rows, ingest.KEYED)


def test_they_are_rejected_with_reason_and_measure_and_the_others_stay():
    kept, rejects = ingest._without_convicted(keyed("d0", "d1", "d2"), VERDICTS)
    assert kept["doc_id"].to_pylist() == ["d0", "d2"]
    assert rejects.schema.equals(TABLES["rejects"].schema)
    assert rejects.to_pylist() == [
        {"file": "f", "position": 1, "reason": "oom", "sample": "doc_id d1, needs more than 4.0 GB of memory (split)"}
    ]


def test_of_a_repeated_one_each_record_counts_once():
    good, repeated = ingest._without_duplicates(keyed("d0", "d1", "d1", "d1"))
    kept, convicted = ingest._without_convicted(good, VERDICTS)
    assert kept.num_rows + repeated.num_rows + convicted.num_rows == 4
    assert sorted(repeated["reason"].to_pylist() + convicted["reason"].to_pylist()) == ["duplicate"] * 2 + ["oom"]


def test_where_all_that_is_left_contradicts_itself_nothing_is_kept():
    table = keyed("d0", "d0")
    table = table.set_column(table.schema.get_field_index("text"), "text", pa.array(["one", "two"]))
    kept, rejects = ingest._without_duplicates(table)
    assert kept.num_rows == 0
    assert rejects["reason"].to_pylist() == ["id_conflict"] * 2


def test_without_a_list_nothing_is_looked_for():
    table = keyed("d0")
    kept, rejects = ingest._without_convicted(table, {})
    assert kept is table
    assert rejects.equals(TABLES["rejects"].schema.empty_table())


def test_the_limit_counts_them_and_names_them():
    labels = pa.table({"label": ["x"]})
    cfg = Config().ingest
    counted = collections.Counter({"oom": 2})
    ingest._check(20, 18, counted, labels, cfg, True, list(VERDICTS.values()))
    with pytest.raises(DataError, match=r"2 of 19 records .*2 oom; quarantined: d1 oom .*gone timeout.*max_rejected"):
        ingest._check(19, 17, counted, labels, cfg, True, list(VERDICTS.values()))

"""Real corpora with official splits: what the defaults must reach (choices were made on the training folds only)."""

import json

import pandas as pd
import pytest

from jobs import entry
from jobs import tag as tagging
from pipeline import config


@pytest.mark.slow
def test_reuters_with_the_defaults(spark, data, tmp_path):
    path = data / "reuters21578_r90" / "documents.parquet"
    cfg, _ = config.load(sets=["mlflow.enabled=false", "spark.master=local[2]"])
    run = entry.fit(str(tmp_path / "run"), str(path), cfg)
    card = json.loads((run.root / "metrics.json").read_text())
    assert card["counts"]["documents"] == 3019
    assert card["metrics"]["micro_f1"] >= 0.885
    assert card["metrics"]["macro_f1"] >= 0.61
    tagging.tag(str(run.root), None, str(path), str(tmp_path / "tags"), cfg)
    tags = pd.read_parquet(tmp_path / "tags").set_index("doc_id")["tags"]
    documents = pd.read_parquet(path)
    assert set(tags.index) == set(documents["doc_id"])
    # the tags of the test documents are those that evaluate counted
    test = documents[documents["split"] == "test"]
    said = {doc_id: {tag["label"] for tag in tags[doc_id]} for doc_id in test["doc_id"]}
    gold = dict(zip(test["doc_id"], map(set, test["labels"]), strict=True))
    assert sum(len(said[d] & gold[d]) for d in gold) == card["counts"]["tp"]
    assert sum(len(said[d] - gold[d]) for d in gold) == card["counts"]["fp"]

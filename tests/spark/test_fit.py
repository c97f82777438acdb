"""The wiring changes nothing: partitions, order and files of the input leave every byte of the model as it is."""

import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.kernels.lockstep import Rows
from pipeline.learners import placement
from pipeline.learners.ovr import Gold, fit_block
from pipeline.storage import digest
from pipeline.store import Run
from pipeline.tables import TABLES
from tests.conftest import SMALL

MODEL = (
    *("near_duplicates", "label_relations", "vocabulary", "label_models", "curves", "histograms", "suspicious"),
    *("weights", "thresholds", "label_counts", "confusions", "metrics.json"),
)


def prints(run: Run) -> dict:
    """SHA-256 of every file of the model."""
    return {table: [digest(path) for path in run.files(table)] for table in MODEL}


@pytest.fixture(scope="module")
def golden(spark, toy, tmp_path_factory):
    from jobs import entry
    from pipeline import config

    cfg, _ = config.load(sets=[*SMALL, "spark.partitions=2"])
    return entry.fit(str(tmp_path_factory.mktemp("golden") / "run"), str(toy), cfg)


def test_every_stage_is_finished_and_published(golden):
    card = json.loads((golden.root / "metrics.json").read_text())
    assert set(card) == {"metrics", "intervals", "groups", "conventions", "counts"}
    assert card["counts"]["documents"] == 6
    assert card["counts"]["labels"] == 8
    assert card["counts"]["labels_with_positives"] == 7
    assert card["counts"]["labels_only_in_test"] == 1
    assert (golden.root / "report.html").read_text().startswith("<!")


@pytest.mark.parametrize("partitions", [1, 5])
def test_partitions_and_order_change_no_byte(golden, fit, toy, tmp_path, partitions):
    lines = toy.read_text().splitlines()
    random.Random(partitions).shuffle(lines)
    shuffled = tmp_path / "shuffled"
    shuffled.mkdir()
    for part in range(3):
        (shuffled / f"{part}.jsonl").write_text("\n".join(lines[part::3]) + "\n")
    run = fit(shuffled, f"spark.partitions={partitions}")
    assert len(run.files("documents")) == partitions
    assert prints(run) == prints(golden)


def test_more_partitions_than_documents(golden, fit, toy):
    run = fit(toy, "spark.partitions=41")
    assert prints(run)["label_models"] == prints(golden)["label_models"]
    assert run.read("documents").equals(golden.read("documents"))


def test_rows_are_in_the_order_of_the_hash_and_complete(golden, toy):
    documents = golden.read("documents")
    assert documents["row"].to_pylist() == list(range(40))
    assert sorted(documents["doc_id"].to_pylist()) == [json.loads(line)["doc_id"] for line in toy.open()]


def test_every_label_keeps_its_row(golden):
    names = golden.read("labels")["label"].to_pylist()
    status = dict(zip(names, golden.read("label_models").sort_by("label_id")["status"].to_pylist(), strict=True))
    assert status.pop("unseen") == "no_positives"
    assert set(status.values()) == {"ok"}
    counts = golden.read("label_counts").to_pylist()
    assert [row["label"] for row in counts] == names
    unseen = counts[names.index("unseen")]
    assert (unseen["tp"], unseen["fp"], unseen["fn"], unseen["threshold"]) == (0, 0, 1, None)
    rare = counts[names.index("rare")]
    assert rare["support"] == 0
    assert rare["train_support"] == 2


def test_spark_trains_what_the_learner_trains(golden):
    """The models equal those of the learner called once, on arrays built from the tables in plain Python."""
    from pipeline.config import Config

    cfg = Config.model_validate(golden.info["config"])
    fold = golden.read("folds")["fold"].to_numpy()
    kept = np.flatnonzero(fold >= 0)
    features = golden.read("features").take(kept).to_pylist()
    indptr = np.cumsum([0, *(len(row["indices"]) for row in features)])
    values = np.concatenate([row["values"] for row in features]).astype(np.float32)
    indices = np.concatenate([row["indices"] for row in features]).astype(np.int32)
    squares = np.array([np.sum(np.square(row["values"])) + 1 for row in features], np.float32)
    names = golden.read("labels")["label"].to_pylist()
    gold = golden.read("documents").take(kept)["labels"].to_pylist()
    rows = [[i for i, labels in enumerate(gold) if name in labels] for name in names]
    X = Rows(indptr, indices, values, squares, golden.manifest("featurize")["terms"])
    Y = Gold(np.cumsum([0, *map(len, rows)]), np.concatenate([*rows, []]).astype(np.int32), fold[kept].astype(np.int8))
    support = golden.read("label_support")["train"].to_numpy()
    groups = placement.label_groups(support, cfg.train.labels_per_block)
    blocks = placement.blocks(groups, [placement.expected_cost(support, group) for group in groups], 4)
    assert sorted(label for block in blocks for label in block) == list(range(8))
    parts = [fit_block(block, X, Y, cfg.train) for block in blocks]
    for name in ("label_models", "curves", "histograms"):
        expected = pa.concat_tables([part[name] for part in parts])
        assert golden.read(name).equals(expected.cast(TABLES[name].schema)), name


def test_features_equal_scikit_learn(golden):
    from sklearn.feature_extraction.text import TfidfVectorizer

    documents = golden.read("documents").to_pylist()
    fold = golden.read("folds")["fold"].to_pylist()
    reference = TfidfVectorizer(sublinear_tf=True, min_df=2).fit(
        [d["text"] for d, f in zip(documents, fold, strict=True) if f >= 0]
    )
    terms = golden.read("vocabulary").sort_by("feature_id")["term"].to_pylist()
    assert sorted(terms) == sorted(reference.vocabulary_)
    expected = reference.transform([d["text"] for d in documents]).toarray()[
        :, [reference.vocabulary_[t] for t in terms]
    ]
    found = np.zeros_like(expected)
    for row in golden.read("features").to_pylist():
        found[row["row"], row["indices"]] = row["values"]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_metrics_equal_scikit_learn(golden):
    from sklearn import metrics as sk

    from pipeline.learners.tagger import Decisions, Weights

    documents, fold = golden.read("documents").to_pylist(), golden.read("folds")["fold"].to_numpy()
    test = np.flatnonzero(fold == -1)
    names = golden.read("labels")["label"].to_pylist()
    Y = np.array([[name in documents[row]["labels"] for name in names] for row in test]).astype(int)
    features = golden.read("features").take(test).to_pylist()
    S = Weights.load(golden.files("weights")[0].parent).score(
        np.cumsum([0, *(len(row["indices"]) for row in features)]),
        np.concatenate([row["indices"] for row in features]).astype(np.int32),
        np.concatenate([row["values"] for row in features]).astype(np.float32),
    )
    decisions = Decisions.from_table(golden.read("thresholds"))
    said = (decisions.threshold <= S).astype(int)
    Z = decisions.log_odds(S)
    found = json.loads(golden.files("metrics.json")[0].read_text())["metrics"]
    some = Y.any(axis=0)
    expected = {
        "micro_f1": sk.f1_score(Y, said, average="micro"),
        "macro_f1": sk.f1_score(Y[:, some], said[:, some], average="macro", zero_division=0),
        "macro_f1_all": sk.f1_score(Y, said, average="macro", zero_division=0),
        "hamming_loss": sk.hamming_loss(Y, said),
        "ndcg_at_3": sk.ndcg_score(Y, Z, k=3),
        "lrap": sk.label_ranking_average_precision_score(Y, Z),
        "average_precision_macro": sk.average_precision_score(Y[:, some], Z[:, some], average="macro"),
        "average_precision_micro": sk.average_precision_score(Y, Z, average="micro"),
        "log_loss": sk.log_loss(Y.ravel(), 1 / (1 + np.exp(-Z.ravel()))),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-9), name


def test_a_second_run_computes_nothing(golden, toy, monkeypatch):
    from jobs import entry
    from pipeline import config
    from pipeline.stages import train

    monkeypatch.setattr(train, "run_tasks", lambda *_: pytest.fail("trained again"))
    before = {path: path.stat().st_mtime_ns for path in golden.root.rglob("*.parquet")}
    cfg, _ = config.load(sets=[*SMALL, "spark.partitions=2"])
    entry.fit(str(golden.root), str(toy), cfg)
    assert {path: path.stat().st_mtime_ns for path in golden.root.rglob("*.parquet")} == before


def test_a_damaged_part_is_computed_again(fit, toy):
    run = fit(toy)
    before = prints(run)
    path = run.files("features")[0]
    path.write_bytes(path.read_bytes()[:-3])
    again = fit(toy)
    assert again.damage("featurize") is None
    assert prints(again) == before


def test_a_missing_block_is_trained_again_and_no_other(fit, toy):
    run = fit(toy)
    before = prints(run)
    attempt = run.root / "train" / run.manifest("train")["attempt"]
    (attempt / "block-00001.json").unlink()
    (run.root / "train" / "MANIFEST.json").unlink()
    kept = (attempt / "label_models-00000.parquet").stat().st_mtime_ns
    again = fit(toy)
    assert again.manifest("train")["blocks_resumed"] == again.manifest("train")["blocks"] - 1
    assert (attempt / "label_models-00000.parquet").stat().st_mtime_ns == kept
    assert prints(again) == before


def test_other_settings_are_refused_and_redone_on_request(fit, toy):
    from pipeline.errors import ConfigError

    run = fit(toy)
    features = [digest(path) for path in run.files("features")]
    marks = {stage: run.manifest(stage)["fingerprint"] for stage in ("ingest", "featurize", "train", "evaluate")}
    with pytest.raises(ConfigError, match=r"train.C is 3.0, 0.5 in the run"):
        fit(toy, "train.C=3")
    again = fit(toy, "train.C=3", overwrite=True)
    after = {stage: again.manifest(stage)["fingerprint"] for stage in marks}
    assert {stage for stage in marks if marks[stage] != after[stage]} == {"train", "evaluate"}
    assert [digest(path) for path in again.files("features")] == features
    assert again.info["config"]["train"]["C"] == 3.0


def test_another_input_is_refused(fit, toy, tmp_path):
    from pipeline.errors import ConfigError

    fit(toy)
    other = tmp_path / "other.jsonl"
    other.write_text(toy.read_text().replace("baker", "miller"))
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(ConfigError, match="other input"):
        fit(other)
    assert (tmp_path / "run" / "run.json").read_bytes() == before


def test_tags_follow_a_new_threshold_in_the_same_session(fit, toy, tmp_path, monkeypatch):
    """Workers that live on keep no tagger of yesterday; what a killed one left is no part of the tags."""
    import pandas as pd

    from jobs import tag as tagging

    tag = tagging.tagging.tag

    def with_a_killed_worker(spark, documents, attempt, *more):
        (attempt / ".tags-00000.parquet.0123abcd.tmp").write_bytes(b"half")
        return tag(spark, documents, attempt, *more)

    monkeypatch.setattr(tagging.tagging, "tag", with_a_killed_worker)
    run = fit(toy)
    cfg = tagging.tag_config(str(run.root), None, list(SMALL))
    tagging.tag(str(run.root), None, str(toy), str(tmp_path / "before"), cfg)
    assert not list((tmp_path / "before").glob(".*"))
    fit(toy, "calibrate.rule=fixed", "calibrate.calibration=none", overwrite=True)
    tagging.tag(str(run.root), None, str(toy), str(tmp_path / "after"), cfg)
    said = pd.concat(pd.read_parquet(tmp_path / "after")["tags"].map(lambda t: pd.DataFrame(list(t))).tolist())
    assert set(said["threshold"]) == {0.0}
    # what is missing of an output is noticed, and made again
    (tmp_path / "after" / "tags-00000.parquet").unlink()
    tagging.tag(str(run.root), None, str(toy), str(tmp_path / "after"), cfg)
    assert len(pd.read_parquet(tmp_path / "after")) == 40


def test_gold_labels_refuse_no_document_that_is_tagged(fit, toy, tmp_path):
    import pandas as pd

    from jobs import tag as tagging

    run = fit(toy)
    new = tmp_path / "new.jsonl"
    new.write_text(
        '{"doc_id": "1", "text": "fresh bread", "labels": "wrong", "split": "prod"}\n'
        '{"doc_id": "2", "text": "a planet in orbit"}\n{"doc_id": "3", "text": ""}\n'
    )
    tagging.tag(
        str(run.root), None, str(new), str(tmp_path / "t"), tagging.tag_config(str(run.root), None, list(SMALL))
    )
    assert sorted(pd.read_parquet(tmp_path / "t")["doc_id"]) == ["1", "2", "3"]


def test_drawn_split_and_dev_curves(fit, tmp_path):
    """Without a given split a share is drawn; with folds 0 one model a label and curves from held-out documents."""
    rng = np.random.default_rng(0)
    words = {"a": ["alpha", "apple"], "b": ["beta", "bread"], "c": ["gamma", "cheese"]}
    rows = []
    for i in range(300):
        labels = [name for name in words if rng.random() < 0.4]
        text = " ".join(word for name in labels for word in words[name]) + f" filler{i % 7} common"
        rows.append({"doc_id": f"d{i}", "text": text, "labels": labels})
    path = tmp_path / "drawn.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    run = fit(path, "train.folds=0")
    sizes = run.manifest("split")["documents"]
    assert sizes["train"] + sizes["test"] == 300
    assert 30 <= sizes["test"] <= 90
    curves = run.read("curves").to_pylist()
    assert {row["fold"] for row in curves} == {-1, 0}
    held = int((run.read("folds")["fold"].to_numpy() == 0).sum())
    assert all(row["positives"] + row["negatives"] == held for row in curves)
    assert json.loads((run.root / "metrics.json").read_text())["metrics"]["micro_f1"] > 0.95


def test_a_spark_table_gives_what_its_file_gives(golden, fit, spark, toy, tmp_path):
    table = pa.Table.from_pylist([json.loads(line) for line in toy.open()])
    spark.createDataFrame(table.to_pandas()).repartition(3).createOrReplaceTempView("toy_documents")
    run = fit("table:toy_documents")
    assert prints(run) == prints(golden)
    before = run.manifest("ingest")
    assert not list((run.root / "ingest").glob("table-*"))
    # the same rows in another order are the same input
    spark.table("toy_documents").orderBy("text").createOrReplaceTempView("toy_documents")
    assert fit("table:toy_documents").manifest("ingest") == before


def test_a_missing_table(fit):
    from pipeline.errors import InputError

    with pytest.raises(InputError, match="no such Spark table"):
        fit("table:nowhere")


def test_every_job_says_its_stage_and_train_its_blocks(fit, spark, toy, tmp_path):
    """What the user interface of Spark and the history server show."""
    from jobs import tag as tagging

    def descriptions():
        jobs = spark.sparkContext._jsc.sc().statusStore().jobsList(None)
        found = {}
        for number in range(jobs.size()):
            job = jobs.apply(number)
            found[job.jobId()] = job.description().get() if job.description().isDefined() else ""
        return found

    before = set(descriptions())
    run = fit(toy)
    tagging.tag(
        str(run.root), None, str(toy), str(tmp_path / "tags"), tagging.tag_config(str(run.root), None, list(SMALL))
    )
    told = [text for number, text in sorted(descriptions().items()) if number not in before]
    stages = {text.split(":")[0] for text in told}
    assert stages == {"ingest", "split", "featurize", "train", "evaluate", "tag"}
    assert "train: 8 labels, blocks 0-3" in told

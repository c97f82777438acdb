"""Evaluation of a fold large enough to have errors: intervals, documents, kept scores, and two runs compared."""

import json
import random
from collections import Counter

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from jobs.compare import compare
from pipeline.kernels.bootstrap import MEASURES, METRICS
from pipeline.learners.tagger import Decisions, Weights
from pipeline.storage import digest
from tests.conftest import SMALL

TABLES = ("label_counts", "confusions", "metrics.json")


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """240 documents of five labels, a third of the words misleading, two labels hard to tell apart."""
    draw = random.Random(3)
    path = tmp_path_factory.mktemp("noisy") / "documents.jsonl"
    words = {"red": "apple rose blood", "blue": "sky sea ink", "green": "leaf lime moss", "teal": "sea moss sky"}
    lines = []
    for i in range(240):
        labels = [name for name in words if draw.random() < 0.35]
        text = [draw.choice(words[name].split()) for name in labels for _ in range(2)]
        text += [draw.choice(" ".join(words.values()).split()) for _ in range(1 + len(text) // 2)]
        if i % 60 == 0:
            labels.append("rare")
        split = "test" if i % 3 == 0 else "train"
        lines.append(json.dumps({"doc_id": f"d{i}", "text": " ".join(text), "labels": labels, "split": split}))
    path.write_text("\n".join(lines) + "\n")
    return path


def fitted(path, folder, *sets):
    from jobs import entry
    from pipeline import config

    sets = [*SMALL, "evaluate.bootstrap=200", *sets]
    return entry.fit(str(folder), str(path), config.load(sets=sets)[0])


@pytest.fixture(scope="module")
def judged(spark, noisy, tmp_path_factory):
    return fitted(noisy, tmp_path_factory.mktemp("judged") / "run", "spark.partitions=3")


def card_of(run):
    return json.loads(run.files("metrics.json")[0].read_text())


def folds(run):
    """Y, tags and log-odds of the test fold, the obvious way."""
    documents, fold = run.read("documents").to_pylist(), run.read("folds")["fold"].to_numpy()
    test = np.flatnonzero(fold == -1)
    names = run.read("labels")["label"].to_pylist()
    features = run.read("features").take(test).to_pylist()
    S = Weights.load(run.files("weights")[0].parent).score(
        np.cumsum([0, *(len(row["indices"]) for row in features)]),
        np.concatenate([row["indices"] for row in features]).astype(np.int32),
        np.concatenate([row["values"] for row in features]).astype(np.float32),
    )
    decisions = Decisions.from_table(run.read("thresholds"))
    Y = np.array([[name in documents[row]["labels"] for name in names] for row in test])
    return Y, decisions.threshold <= S, decisions.log_odds(S), names, [documents[row]["doc_id"] for row in test]


def test_partitions_change_no_byte(judged, noisy, tmp_path):
    one = fitted(noisy, tmp_path / "one", "spark.partitions=1")
    for table in TABLES:
        assert [digest(p) for p in one.files(table)] == [digest(p) for p in judged.files(table)], table
    assert one.read("test_documents").equals(judged.read("test_documents"))


def test_every_metric_has_an_interval_around_it(judged):
    card = card_of(judged)
    assert set(card["intervals"]) == set(METRICS)
    for name, (low, high) in card["intervals"].items():
        assert low - 1e-9 <= card["metrics"][name] <= high + 1e-9, name
    low, high = card["intervals"]["micro_f1"]
    assert 0.02 < high - low < 0.3


def test_documents_add_up_to_the_metrics(judged):
    Y, T, Z, names, doc_ids = folds(judged)
    table = judged.read("test_documents")
    assert table["doc_id"].to_pylist() == doc_ids
    assert table["gold"].to_pylist() == [np.flatnonzero(row).tolist() for row in Y]
    assert table["tags"].to_pylist() == [np.flatnonzero(row).tolist() for row in T]
    measures = np.array(table["measures"].to_pylist())
    mean = dict(zip(MEASURES, measures.mean(axis=0), strict=True))
    metrics = card_of(judged)["metrics"]
    for name in ("r_at_5", "ndcg_at_3", "lrap", "coverage_error"):
        assert mean[name] == pytest.approx(metrics[name], abs=1e-9)
    assert mean["hits_at_3"] / 3 == pytest.approx(metrics["p_at_3"])
    assert mean["log_loss"] / len(names) == pytest.approx(metrics["log_loss"])
    P = 1 / (1 + np.exp(-Z))
    assert measures[:, MEASURES.index("brier")] == pytest.approx(((P - Y) ** 2).sum(axis=1))
    # influence values: the fold with one document counted a little more, to first order
    some = np.flatnonzero(Y.any(axis=0))
    for name, metric in (("average_precision_macro", average_precision_score), ("roc_auc_macro", roc_auc_score)):
        values = measures[:, MEASURES.index(name)]
        largest = int(np.abs(values).argmax())
        more = np.ones(len(Y))
        more[largest] += 0.001
        moved = np.mean([metric(Y[:, j], Z[:, j], sample_weight=more) for j in some]) - metrics[name]
        assert moved == pytest.approx(values[largest] * 0.001 / len(Y), rel=0.01), name
        assert abs(moved) > 1e-7


def test_calibration_error_of_each_label(judged):
    Y, _, Z, _, _ = folds(judged)
    P = 1 / (1 + np.exp(-Z))
    bins = np.minimum((P * 15).astype(int), 14)
    expected = [
        sum(abs((P[:, j] - Y[:, j])[bins[:, j] == b].sum()) for b in range(15)) / len(Y) for j in range(Y.shape[1])
    ]
    assert judged.read("label_counts")["ece"].to_pylist() == pytest.approx(expected, abs=1e-8)


def test_errors_that_go_together(judged):
    Y, T, _, names, _ = folds(judged)
    pairs = Counter(
        (names[a], names[b])
        for gold, tags in zip(Y, T, strict=True)
        for a in np.flatnonzero(gold & ~tags)
        for b in np.flatnonzero(tags & ~gold)
    )
    found = judged.read("confusions").to_pylist()
    assert found
    for row in found:
        assert row["documents"] == pairs[row["label"], row["instead"]] > row["expected"]


def test_groups_hold_every_label_once(judged):
    groups = card_of(judged)["groups"]
    table = judged.read("label_counts")
    assert list(groups) == ["head", "torso", "tail"]
    assert sum(g["labels"] for g in groups.values()) == table.num_rows
    assert sum(g["support"] for g in groups.values()) == sum(table["support"].to_pylist())
    assert groups["head"]["train_support"][0] >= groups["tail"]["train_support"][1]


def kept(run):
    return sorted((run.root / "scores").glob("*/scores-*.npy"))


def again(run, *sets):
    """Evaluate anew without another fit."""
    from jobs import entry
    from pipeline import config

    run.drop(["evaluate", "register"])
    cfg, _ = config.load(base=run.info["config"], sets=list(sets))
    return entry.fit(str(run.root), run.info["input"], cfg)


def test_scores_are_kept_and_only_a_shortcut(judged):
    before = [digest(p) for p in judged.files("metrics.json")]
    files = kept(judged)
    assert len(files) == 3
    Y, *_ = folds(judged)
    assert np.concatenate([np.load(p) for p in files]).shape == Y.shape
    # another process computes them, so the file tells whether it was written
    stamps = [p.stat().st_mtime_ns for p in files]
    again(judged)
    assert [p.stat().st_mtime_ns for p in files] == stamps

    damaged = bytearray(files[0].read_bytes())
    damaged[-1] ^= 64
    files[0].write_bytes(damaged)
    files[1].unlink()
    again(judged)
    assert [digest(p) for p in judged.files("metrics.json")] == before
    assert files[0].read_bytes() != bytes(damaged)

    again(judged, "evaluate.keep_scores=0")
    assert not kept(judged)
    assert [digest(p) for p in judged.files("metrics.json")] == before


def test_two_runs_compared(judged, noisy, tmp_path, capsys):
    other = fitted(noisy, tmp_path / "other", "calibrate.rule=fixed", "calibrate.at=0.2", "spark.partitions=2")
    capsys.readouterr()
    compare(judged, other, as_json=True, replicates=200)
    found = json.loads(capsys.readouterr().out)
    for run, side in ((judged, "a"), (other, "b")):
        metrics = card_of(run)["metrics"]
        for name, row in found["metrics"].items():
            assert row[side] == pytest.approx(metrics[name], abs=1e-9), (name, side)
    assert found["metrics"]["micro_recall"]["b_is"] == "better"
    assert found["metrics"]["lrap"]["difference"] == 0

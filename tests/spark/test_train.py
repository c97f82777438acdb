"""The stage train: refits, budgets, warm starts, workers that die, hosts that are too small."""

import csv
import json
import os
import shutil
import signal
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark import TaskContext, cloudpickle

from jobs import entry, show
from pipeline import config
from pipeline.errors import ConfigError, DataError, InputError
from pipeline.learners import placement
from pipeline.stages import poison, problems, train
from pipeline.store import Run
from tests.conftest import SMALL
from tests.spark.test_fit import prints

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not import the tests

AFTER = ("train", "calibrate", "evaluate")


@pytest.fixture(scope="module")
def golden(spark, toy, tmp_path_factory):
    cfg, _ = config.load(sets=SMALL)
    return entry.fit(str(tmp_path_factory.mktemp("golden") / "run"), str(toy), cfg)


@pytest.fixture
def copy(golden, tmp_path):
    """copy(finished): the golden run in a folder of this test, up to the stage `finished`."""

    def make(finished="register"):
        root = tmp_path / "copy"
        shutil.copytree(golden.root, root)
        run = Run(root)
        names = [stage.name for stage in entry.FIT]
        run.drop(names[names.index(finished) + 1 :])
        if finished == "featurize":
            shutil.rmtree(root / "train")
        return run

    return make


def again(run, *sets, labels=(), only=AFTER, overwrite=False):
    cfg, _ = config.load(sets=sets, base=run.info["config"])
    return entry.fit(str(run.root), None, cfg, overwrite, only=only, labels=tuple(labels))


def rows(run, table):
    """Rows by label name and fold."""
    names = run.read("labels", ["label"])["label"].to_pylist()
    return {(names[row["label_id"]], row.get("fold")): row for row in run.read(table).to_pylist()}


def statuses(run):
    return {name: row["status"] for (name, _), row in rows(run, "label_models").items()}


def test_a_refit_changes_its_labels_and_no_other(golden, copy):
    run = again(copy(), "train.C=1", labels=["sport", "music"])
    for table in ("label_models", "curves", "histograms"):
        before, after = rows(golden, table), rows(run, table)
        assert before.keys() == after.keys()
        for key, row in before.items():
            if key[0] not in ("sport", "music"):
                assert after[key] == row, (table, key)
            elif key[1] in (None, -1):  # a fold of few rows may look the same
                assert after[key] != row, (table, key)
    assert rows(run, "label_models")["sport", None]["C"] == 1.0
    assert run.manifest("train")["recipe"]["refits"][0]["labels"] == ["music", "sport"]
    # weights by feature are those of the table
    bias = np.load(next(p for p in run.files("weights") if p.stem == "weights-bias"))
    assert bias.tolist() == run.read("label_models").sort_by("label_id")["bias"].to_pylist()
    assert run.damage("train") is None
    # what builds on train follows, and the settings of the run stay
    assert run.finished("evaluate")["recipe"]["inputs"]["train"] == run.finished("train")["fingerprint"]
    assert run.info["config"]["train"]["C"] == 0.5


def test_after_a_refit_the_run_is_up_to_date(copy, monkeypatch):
    run = again(copy(), "train.C=1", labels=["sport"])
    before = prints(run)
    monkeypatch.setattr(train, "run_tasks", lambda *_: pytest.fail("trained again"))
    assert prints(again(run)) == before


def test_a_second_refit_keeps_the_first(copy):
    run = again(copy(), "train.C=1", labels=["sport"])
    run = again(run, "train.C=2", labels=["music"])
    models = rows(run, "label_models")
    assert (models["sport", None]["C"], models["music", None]["C"]) == (1.0, 2.0)
    assert len(run.manifest("train")["recipe"]["refits"]) == 2


def test_labels_alone_and_then_the_rest(golden, copy):
    run = again(copy("featurize"), labels=["sport"])
    assert statuses(run) == {name: "ok" if name == "sport" else "not_selected" for name in statuses(golden)}
    assert run.manifest("train")["unfinished"] == 7
    assert run.read("thresholds")["threshold"].null_count == 7
    run = again(run)
    assert statuses(run) == statuses(golden)
    assert run.manifest("train")["unfinished"] == 0


@pytest.mark.parametrize(
    ("labels", "sets", "says"),
    [
        (["spor"], (), "--labels spor: on no document .*the nearest known one is sport"),
        (["sport"], ("train.folds=2",), "train.folds is 2.*with --labels only settings of train"),
        (["sport"], ("featurize.min_df=1",), "featurize.min_df is 1.*with --labels only settings of train"),
    ],
)
def test_refits_that_are_refused(golden, copy, labels, sets, says):
    run = copy()
    with pytest.raises(ConfigError, match=says):
        again(run, *sets, labels=labels)
    assert prints(run) == prints(golden)


def test_labels_that_are_not_begun_in_time_wait_for_the_next_run(golden, copy):
    run = again(copy("featurize"), "train.budget=1e-6")
    assert set(statuses(run).values()) == {"out_of_time"}
    assert run.manifest("train")["unfinished"] == 8
    assert run.finished("evaluate")
    done = again(run, "train.budget=0")
    assert {t: prints(done)[t] for t in train.BLOCK_TABLES} == {t: prints(golden)[t] for t in train.BLOCK_TABLES}
    assert prints(done)["metrics.json"] == prints(golden)["metrics.json"]


def test_a_refit_that_ran_out_of_time_is_finished_by_the_next_fit(golden, copy):
    run = again(copy("featurize"), "train.budget=1e-6", labels=["sport"])
    assert (statuses(run)["sport"], statuses(run)["music"]) == ("out_of_time", "not_selected")
    assert statuses(again(run)) == statuses(golden)


def test_a_model_is_not_given_up_for_a_budget(copy):
    run = again(copy(), "train.C=1", "train.budget=1e-6", labels=["sport"])
    assert (statuses(run)["sport"], rows(run, "label_models")["sport", None]["C"]) == ("ok", 1.0)


def test_a_damaged_refit_is_trained_whole_and_says_what_is_lost(golden, copy, caplog):
    run = again(copy(), "train.C=1", labels=["sport"])
    path = run.files("label_models")[-1]
    path.write_bytes(path.read_bytes() + b"x")
    run = again(run)
    assert "repeat --labels for sport" in caplog.text
    assert "refits" not in run.manifest("train")["recipe"]
    assert prints(run) == prints(golden)


def test_a_refit_that_is_cut_short_after_train_is_finished_by_a_plain_fit(copy, monkeypatch):
    run = copy()
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.stages.calibrate.calibrate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            again(run, "train.C=1", labels=["sport"])
    assert run.manifest("calibrate") is None
    run = again(run)
    assert rows(run, "label_models")["sport", None]["C"] == 1.0
    assert run.finished("evaluate")["recipe"]["inputs"]["train"] == run.finished("train")["fingerprint"]


def test_calibrate_alone_leaves_what_is_not_selected(copy):
    run = again(copy("featurize"), labels=["sport"])
    run = again(run, "calibrate.rule=fixed", only=("calibrate", "evaluate"), overwrite=True)
    assert statuses(run)["music"] == "not_selected"


def test_labels_do_not_throw_away_a_training_that_was_begun(copy):
    run = copy()
    run.drop(AFTER)
    with pytest.raises(ConfigError, match=r"was begun and not finished; .* without --labels"):
        again(run, labels=["sport"])


def test_a_document_that_is_convicted_meanwhile_takes_no_model_away(golden, copy, toy, monkeypatch):
    """It would have to be left out of all models, and only some are trained."""
    run = copy()
    verdict = {"doc_id": "doc-03", "reason": "oom", "stage": "train", "what": "needs more than 4 GB"}
    monkeypatch.setattr(entry, "_run_stages", lambda *_: [verdict])
    cfg, _ = config.load(sets=["train.C=1"], base=run.info["config"])
    with pytest.raises(ConfigError, match=r"doc-03 oom .* changes the models of all labels: .* without --labels first"):
        entry.fit(str(run.root), str(toy), cfg, labels=("sport",))
    assert not (run.root / poison.LIST).exists()
    assert run.finished("ingest") == golden.finished("ingest")
    monkeypatch.undo()
    assert statuses(again(run, labels=["sport"])) == statuses(golden)


@pytest.mark.parametrize("key", ["train.warm_start", "featurize.vocabulary"])
def test_a_run_does_not_go_on_from_itself(golden, copy, key):
    run = copy()
    with pytest.raises(ConfigError, match=rf"{key} is .*, the folder of this run"):
        again(run, f"{key}={run.root}", overwrite=True)
    assert prints(run) == prints(golden)


def test_labels_of_another_input_are_refused(golden, copy, toy, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(toy.read_text().replace("the", "thy"))
    run = copy("featurize")
    cfg, _ = config.load(base=run.info["config"])
    with pytest.raises(ConfigError, match="other input"):
        entry.fit(str(run.root), str(other), cfg, labels=("sport",))
    assert run.finished("featurize")["fingerprint"] == golden.finished("featurize")["fingerprint"]


def test_a_warm_start_ends_where_a_cold_one_does(golden, fit, toy, tmp_path):
    run = fit(toy, f"featurize.vocabulary={golden.root}", f"train.warm_start={golden.root}", "train.gap=1e-6")
    cold = fit(toy, "train.gap=1e-6", run=tmp_path / "cold")
    assert run.read("vocabulary").equals(golden.read("vocabulary"))
    for (name, _), row in rows(run, "label_models").items():
        assert row["objective"] == pytest.approx(rows(cold, "label_models")[name, None]["objective"], rel=2e-3)
    # the earlier run may go: what was made from it stays current
    moved = golden.root.with_name("moved")
    golden.root.rename(moved)
    try:
        assert prints(again(run)) == prints(run)
    finally:
        moved.rename(golden.root)


def test_a_warm_start_from_another_vocabulary_is_refused(golden, fit, toy, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(toy.read_text().replace("the", "thy"))
    with pytest.raises(ConfigError, match=r"its vocabulary .* is not that of this run .*set featurize.vocabulary"):
        fit(other, f"train.warm_start={golden.root}")


def weights_file(path, *lines):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("label", "positive", "negative"), *lines])
    return path


def test_weights_of_a_label_change_that_label(golden, copy, tmp_path):
    path = weights_file(tmp_path / "weights.csv", ("sport", 4, 1), ("music", 1, 0.5))
    run = again(copy(), f"train.label_weights={path}", overwrite=True)
    before, after = rows(golden, "label_models"), rows(run, "label_models")
    assert {name for name, _ in before if before[name, None]["weights"] != after[name, None]["weights"]} >= {
        "sport",
        "music",
    }
    assert after["sport", None]["bias"] > before["sport", None]["bias"]
    # another content is another recipe
    weights_file(path, ("sport", 5, 1))
    with pytest.raises(ConfigError, match=r"train.label_weights"):
        again(run)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([("no such", 1, 1)], "label 'no such' is on no document"),
        ([("sport", 1, 1), ("sport", 2, 1)], "label 'sport' stands twice"),
        ([("sport", 0, 1)], "positive of 'sport' is 0; expected a number from 0.0001"),
    ],
)
def test_weights_that_are_refused(tmp_path, lines, says):
    with pytest.raises(ConfigError, match=says):
        train.label_weights(str(weights_file(tmp_path / "weights.csv", *lines)), ["sport", "music"])


def test_a_weights_file_that_is_missing_or_has_other_columns(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        train.label_weights(str(tmp_path / "none.csv"), ["sport"])
    (tmp_path / "other.csv").write_text("label,weight\nsport,2\n")
    with pytest.raises(ConfigError, match="columns label, weight; expected label, and positive or negative or both"):
        train.label_weights(str(tmp_path / "other.csv"), ["sport"])


def deadly(real):
    """A solver that kills its process in the middle of the second block, whenever that is tried."""

    def solver(shared, cfg):
        solve = real(shared, cfg)

        def run(task):
            if task[0] == 1:
                solve.__globals__["fit_block"] = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            return solve(task)

        return run

    return solver


def hunted(real):
    """A solver whose worker is killed at the second block as often as Spark tries it, but for the last time."""

    def solver(shared, cfg):
        solve = real(shared, cfg)

        def run(task):
            if task[0] == 1 and TaskContext.get().attemptNumber() < shared.value["give_up"]:
                os.kill(os.getpid(), signal.SIGKILL)
            return solve(task)

        return run

    return solver


def test_a_block_whose_workers_are_killed_for_nobodys_fault_is_solved(golden, copy, monkeypatch):
    monkeypatch.setattr(train, "_solver", hunted(train._solver))
    assert prints(again(copy("featurize"))) == prints(golden)


def test_a_block_whose_worker_dies_again_and_again_costs_its_labels_only(golden, copy, monkeypatch):
    monkeypatch.setattr(train, "_solver", deadly(train._solver))
    run = again(copy("featurize"), "train.max_failed=2")
    killed = "failed: a process of its own was killed; out of memory?"
    failed = {name for name, status in statuses(run).items() if status == killed}
    assert len(failed) == 2
    before, after = rows(golden, "label_models"), rows(run, "label_models")
    assert {name for name, _ in before if before[name, None] != after[name, None]} == failed


class Trial:
    """What the trial of a block sees: how often Spark has tried it, and what its work does to a process."""

    def __init__(self, folder, attempts=4):
        self.crumb, self.broadcast = folder / "trial-00000", {"give_up": max(attempts - 1, 1), "job": "this one"}
        self.runs = folder / "runs"

    def __call__(self, before, work=lambda: None):
        def counted(_):
            with self.runs.open("a") as file:
                file.write("x")
            work()

        found = train._guilt(before, self.crumb, self.broadcast, counted)
        runs = len(self.runs.read_text()) if self.runs.exists() else 0
        self.runs.unlink(missing_ok=True)
        return found, runs


def fail(error):
    raise error


def test_a_block_is_tried_in_a_process_of_its_own_before_it_is_given_up(tmp_path):
    trial = Trial(tmp_path)
    assert [trial(before) for before in range(4)] == [("", 0), ("", 0), ("", 1), ("", 1)]
    assert [Trial(tmp_path, 2)(before) for before in (0, 1)] == [("", 0), ("", 1)]
    assert Trial(tmp_path, 1)(0) == ("", 0)
    assert trial(2, lambda: os.kill(os.getpid(), signal.SIGKILL)) == (
        "a process of its own was killed; out of memory?",
        3,
    )
    assert trial(2, lambda: os.kill(os.getpid(), signal.SIGSEGV)) == ("a process of its own was ended by SIGSEGV", 1)
    assert trial(2, lambda: os._exit(7)) == ("a process of its own was left with exit code 7", 1)
    # no fault of the block, or one that the solver tells by itself
    assert trial(2, lambda: os.kill(os.getpid(), signal.SIGTERM)) == ("", 3)
    assert trial(2, lambda: fail(OSError(28, "No space left on device"))) == ("", 1)
    assert not trial.crumb.exists()


def test_a_trial_that_took_its_worker_along_is_believed_by_the_last_attempt_of_the_same_job(tmp_path):
    trial = Trial(tmp_path)
    trial.crumb.write_text("this one")
    assert trial(1) == ("", 0)
    assert trial(3) == ("it ends its worker, and not alone; out of memory?", 0)
    trial.crumb.write_text("an earlier one")
    assert trial(3) == ("", 1)
    trial.crumb.write_text("this one")
    assert trial(2) == ("", 1)  # a copy of the task that speculation began


def test_more_failures_than_allowed_end_the_run_and_are_tried_again(golden, copy, monkeypatch):
    run = copy("featurize")
    with monkeypatch.context() as patch:
        patch.setattr(train, "_solver", deadly(train._solver))
        with pytest.raises(DataError, match=r"2 of 8 labels failed .*at most train.max_failed = 0 may"):
            again(run)
    assert run.manifest("train") is None
    run = again(run)
    assert run.manifest("train")["blocks_resumed"] == 3
    assert prints(run) == prints(golden)


def test_a_host_that_is_too_small_is_refused_before_any_work(copy, monkeypatch):
    run = copy("featurize")
    monkeypatch.setattr(train, "free_memory", lambda: 300_000_000)
    monkeypatch.setattr(train, "run_tasks", lambda *_: pytest.fail("begun"))
    with pytest.raises(ConfigError, match=r"train needs \d+ MB of memory .*featurize.max_features .*featurize.min_df"):
        again(run)
    monkeypatch.setattr(train, "free_memory", lambda: 10**12)
    monkeypatch.setattr(train, "free_disk", lambda folder: 100)
    with pytest.raises(ConfigError, match=r"train needs .* of disk for the matrix .*set spark.cache_dir"):
        again(run)


def test_one_matrix_a_host_and_none_at_the_end(golden):
    facts = golden.manifest("train")
    assert list(facts["matrix_builds"].values()) == [1]
    assert not any(os.path.exists(folder) for folder in facts["matrix_builds"])
    assert 0 <= facts["compile_seconds"] < 300
    assert 0 < facts["first_block_seconds"] <= facts["seconds"] + 1


def test_the_next_run_knows_the_seconds_of_this_one(golden, copy):
    names = golden.read("labels", ["label"])["label"].to_pylist()
    known = train.learned_seconds(golden, [*names, "new"])
    assert np.isfinite(known[:-1]).all()
    assert np.isnan(known[-1])
    support = np.ones(9, np.int64)
    assert placement.expected_cost(support, [0, 1], known) == pytest.approx(known[0] + known[1])
    assert train.learned_seconds(copy("featurize"), names) is None


def test_native_threads_do_not_multiply_the_cores_of_spark(spark):
    def threads(_):
        import numba
        import numpy  # noqa: F401  (brings its BLAS)
        from threadpoolctl import threadpool_info

        return [numba.get_num_threads(), *(pool["num_threads"] for pool in threadpool_info())]

    assert set(spark.sparkContext.parallelize(range(2), 2).flatMap(threads).collect()) == {1}


def test_several_values_of_C_are_chosen_from_per_label(copy):
    run = again(copy(), "train.C=[0.01,20]", overwrite=True)
    chosen = {name: row["C"] for (name, _), row in rows(run, "label_models").items() if row["status"] == "ok"}
    assert set(chosen.values()) <= {0.01, 20.0}
    assert 20.0 in chosen.values()
    assert isinstance(run.read("label_models"), pa.Table)


def suspected(run):
    return {(r["label"], r["kind"], r["doc_id"]) for r in run.read("suspicious").to_pylist()}


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory):
    """A corpus in which words tell labels, but for four assignments."""
    rng = np.random.default_rng(1)
    documents = []
    for i in range(240):
        labels = [name for name in ("ants", "bees", "cats") if rng.random() < 0.4]
        text = " ".join([f"{name} {name}talk" for name in labels] + [f"filler{k}" for k in rng.integers(0, 9, 5)])
        documents.append(
            {"doc_id": f"d{i}", "text": text, "labels": labels, "split": "test" if i % 5 == 4 else "train"}
        )
    planted = set()
    for name, kind in (("ants", "missing"), ("ants", "wrong"), ("bees", "missing"), ("cats", "wrong")):
        carries = kind == "missing"
        row = next(
            d for d in documents[20:] if d["split"] == "train" and (name in d["labels"]) == carries
            and d["doc_id"] not in {p[2] for p in planted}
        )  # fmt: skip
        row["labels"] = [x for x in row["labels"] if x != name] if carries else sorted([*row["labels"], name])
        planted.add((name, kind, row["doc_id"]))
    path = tmp_path_factory.mktemp("mistaken") / "documents.parquet"
    pq.write_table(pa.Table.from_pylist(documents), path)
    return path, planted


def test_errors_of_gold_are_found_by_document_and_whatever_the_parts(fit, mistaken, tmp_path):
    path, planted = mistaken
    runs = [
        fit(path, *sets, run=tmp_path / f"run{k}")
        for k, sets in enumerate((("spark.partitions=1",), ("spark.partitions=5",)))
    ]
    assert suspected(runs[0]) == planted
    for run in runs:
        ids = run.read("documents", ["doc_id"])["doc_id"].to_pylist()
        fold = run.read("folds")["fold"].to_pylist()
        names = run.read("labels", ["label"])["label"].to_pylist()
        for r in run.read("suspicious").to_pylist():
            assert (names[r["label_id"]], ids[r["row"]]) == (r["label"], r["doc_id"])
            assert fold[r["row"]] >= 0
            assert (r["probability"] > 0.5) == (r["kind"] == "missing")
            assert 0.5 < r["doubt"] < 1
    assert runs[0].read("suspicious").equals(runs[1].read("suspicious"))
    assert f"{len(planted)} suspicious gold labels" in runs[0].manifest("train")["summary"]


def test_problems_are_shown_the_most_doubtful_first(fit, mistaken, tmp_path, capsys):
    run = fit(mistaken[0], "split.near_duplicates=0.3", run=tmp_path / "run")
    capsys.readouterr()
    show.table(run, "suspicious", None, True)
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["doubt"] for r in told] == sorted((r["doubt"] for r in told), reverse=True)
    assert {(r["label"], r["kind"], r["doc_id"]) for r in told} == mistaken[1]
    found = problems.data_problems(run)
    documents = {r["doc_id"]: r for r in run.read("documents").to_pylist()}
    for kind in ("missing", "wrong"):
        mine = [r["doc_id"] for r in told if r["kind"] == kind]
        assert [r["doc_id"] for r in found["suspicious"][kind]["rows"]] == mine
        assert found["suspicious"][kind]["count"] == len(mine)
    near = run.read("near_duplicates").to_pylist()
    assert (found["near_duplicates"], found["among"], found["similarity"]) == (len(near), 48, 0.3)
    assert found["equal"] == sum(r["similarity"] == 1 for r in near)
    best = sorted(near, key=lambda r: (-r["similarity"], r["row"]))[: problems.SHOWN]
    assert [(r["doc_id"], r["other_doc_id"]) for r in found["pairs"]] == [
        (r["doc_id"], r["other_doc_id"]) for r in best
    ]
    assert best
    for r in (*found["pairs"], *found["suspicious"]["wrong"]["rows"]):
        document = documents[r["doc_id"]]
        assert (r["text"], r["labels"]) == (document["text"][: problems.EXCERPT], document["labels"])
    for r in found["pairs"]:
        assert r["other_labels"] == documents[r["other_doc_id"]]["labels"]
    assert all(r["doc_id"] in (run.root / "report.html").read_text() for r in told)


def test_doubts_follow_refits_and_blocks_that_are_solved_again(fit, mistaken, tmp_path):
    path, planted = mistaken
    run = fit(path, run=tmp_path / "run")
    whole = run.read("suspicious")
    refitted = again(run, "train.suspicious=0", labels=["ants"])
    assert suspected(refitted) == {p for p in planted if p[0] != "ants"}
    assert refitted.damage("train") is None
    assert (
        again(fit(path, run=tmp_path / "other"), "train.suspicious=1", overwrite=True).read("suspicious").equals(whole)
    )


def test_no_doubts_where_none_are_asked_for(fit, mistaken):
    run = fit(mistaken[0], "train.suspicious=0")
    assert run.read("suspicious").num_rows == 0

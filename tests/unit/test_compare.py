import json

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from jobs import cli, show
from jobs.compare import compare, judged
from pipeline import config as configuration
from pipeline.errors import ConfigError, InputError
from pipeline.kernels.bootstrap import INFLUENCES, LABEL_METRICS, MEASURES, METRICS
from pipeline.kernels.counts import confusion, label_metrics
from pipeline.store import Run, entry, write_bytes, write_part
from pipeline.tables import TABLES
from tests.reference import gold_of

NAMES = [f"label {j}" for j in range(6)] + ["[red]markup[/red]", "evil\x1b[31m\u202e"]
DOCUMENTS = 200


def fold(seed=0):
    """Gold, and tags of a run with many errors and of one with few."""
    rng = np.random.default_rng(seed)
    Y = rng.random((DOCUMENTS, len(NAMES))) < 0.3
    both = rng.random(Y.shape) < 0.05
    return Y, Y ^ both ^ (rng.random(Y.shape) < 0.2), Y ^ both ^ (rng.random(Y.shape) < 0.05)


def as_table(name, **columns):
    return pa.table(columns, schema=TABLES[name].schema)


def finished_run(folder, Y, T, names=NAMES, order=None, doc_ids=None, sets=(), keep_documents=True, hits=0.5):
    """A run folder as `evaluate` leaves it.  order: positions of the documents in `row`."""
    run = Run(folder)
    run.prepare()
    run.create({"config": configuration.load(None, list(sets))[0].model_dump(mode="json"), "input": "toy"})
    attempt = run.attempt("ingest")
    labels = as_table("labels", label_id=range(len(names)), label=names, support=[1] * len(names))
    run.commit("ingest", attempt, {}, {"labels": [write_part(attempt, "labels", labels, 0)]}, {})
    attempt = run.attempt("evaluate")
    order = np.arange(len(Y)) if order is None else order
    doc_ids = np.array(doc_ids or [f"doc {i}" for i in range(len(Y))])
    measures = np.zeros((len(Y), len(MEASURES)))
    measures[:, MEASURES.index("hits_at_1")] = np.random.default_rng(1).random(len(Y)) < hits
    documents = as_table(
        "test_documents",
        row=np.arange(len(Y)) * 3,
        doc_id=doc_ids[order],
        gold=[np.flatnonzero(row) for row in Y[order]],
        tags=[np.flatnonzero(row) for row in T[order]],
        measures=list(measures[order]),
    )
    half = len(Y) // 2
    parts = [write_part(attempt, "test_documents", documents.slice(k * half, half + k), k) for k in (0, 1)]
    write_bytes(attempt / "metrics.json", json.dumps({"metrics": dict.fromkeys(METRICS, 0.5)}).encode())
    tables = {"metrics.json": [entry(attempt / "metrics.json", attempt, 1)]}
    run.commit("evaluate", attempt, {}, tables | ({"test_documents": parts} if keep_documents else {}), {})
    return run


def as_json(capsys, *arguments, **options):
    capsys.readouterr()
    compare(*arguments, as_json=True, **{"replicates": 200, **options})
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def runs(tmp_path):
    Y, T, better = fold()
    return finished_run(tmp_path / "a", Y, T), finished_run(tmp_path / "b", Y, better, hits=0.9)


def test_every_metric_of_show_is_compared():
    assert {name for _, names in show.GROUPS for name in names} == set(METRICS)


def test_figures_are_those_of_the_runs(runs, capsys):
    found = as_json(capsys, *runs)
    Y, *tagged = fold()
    for side, T in zip("ab", tagged, strict=True):
        for name, value in label_metrics(*confusion(T, *gold_of(Y))).items():
            assert found["metrics"][name][side] == pytest.approx(value, abs=1e-12)
    assert found["metrics"]["micro_f1"]["b_is"] == "better"
    assert found["metrics"]["hamming_loss"]["difference"] < 0 and found["metrics"]["hamming_loss"]["b_is"] == "better"
    assert found["metrics"]["p_at_1"]["b_is"] == "better" and found["metrics"]["lrap"]["b_is"] is None
    assert all(found["metrics"][name]["a"] == 0.5 for name in INFLUENCES)
    labels = found["labels"]
    assert labels["better"] and not labels["worse"] and labels["hold"] >= 1
    assert labels["all"] == labels["with_positives"] == labels["compared"] == len(NAMES)
    assert labels["by_chance_at_most"] == pytest.approx(0.05 * len(NAMES))
    first = labels["better"][0]
    assert first["holds"] and first["interval"][0] > 0
    assert first["support"] == Y[:, NAMES.index(first["label"])].sum()
    assert (found["documents"], found["replicates"], found["confidence"], found["seed"]) == (DOCUMENTS, 200, 0.95, 0)


def test_a_run_against_itself_differs_nowhere(runs, capsys):
    found = as_json(capsys, runs[0], runs[0])
    assert all(
        row["difference"] == 0 and row["interval"] == [0, 0] and row["p"] == 1 for row in found["metrics"].values()
    )
    assert not found["labels"]["better"] and not found["labels"]["worse"] and found["labels"]["compared"] == 0


def test_swapping_the_runs_negates(runs, capsys):
    one, back = as_json(capsys, *runs), as_json(capsys, *runs[::-1])
    for name, row in one["metrics"].items():
        assert row["difference"] == pytest.approx(-back["metrics"][name]["difference"], abs=1e-12)
        assert row["interval"] == pytest.approx([-x for x in back["metrics"][name]["interval"][::-1]], abs=1e-12)
    assert [row["label"] for row in one["labels"]["better"]] == [row["label"] for row in back["labels"]["worse"]]


def test_order_and_numbers_of_labels_do_not_matter(runs, tmp_path, capsys):
    Y, _, better = fold()
    rng = np.random.default_rng(5)
    columns = rng.permutation(len(NAMES))
    names = [NAMES[j] for j in columns]
    other = finished_run(tmp_path / "c", Y[:, columns], better[:, columns], names, rng.permutation(DOCUMENTS), hits=0.9)
    one, two = as_json(capsys, *runs), as_json(capsys, runs[0], other)
    assert one["labels"] == two["labels"]
    for name, row in one["metrics"].items():
        assert row["interval"] == pytest.approx(two["metrics"][name]["interval"], abs=1e-12)


def test_a_label_that_one_run_does_not_know_counts_for_both(runs, tmp_path, capsys):
    Y, _, better = fold()
    empty = np.zeros((DOCUMENTS, 1), bool)
    said = empty.copy()
    said[:10] = True
    other = finished_run(tmp_path / "c", np.hstack([empty, Y]), np.hstack([said, better]), ["new", *NAMES], hits=0.9)
    found, before = as_json(capsys, runs[0], other), as_json(capsys, *runs)
    assert (found["labels"]["all"], found["labels"]["only_in_a"], found["labels"]["only_in_b"]) == (
        len(NAMES) + 1,
        0,
        1,
    )
    share = len(NAMES) / (len(NAMES) + 1)
    for side in "ab":
        assert found["metrics"]["macro_f1_all"][side] == pytest.approx(before["metrics"]["macro_f1_all"][side] * share)
        assert found["metrics"]["macro_f1"][side] == pytest.approx(before["metrics"]["macro_f1"][side])
    assert found["metrics"]["micro_precision"]["b"] < before["metrics"]["micro_precision"]["b"]
    compare(runs[0], other, False, 100)
    assert "0 labels only A knows, 1 only B" in capsys.readouterr().out


def test_options_reach_the_arithmetic(runs, capsys):
    usual, sure, other = (as_json(capsys, *runs, **options) for options in ({}, {"confidence": 0.999}, {"seed": 7}))
    width = [np.ptp(found["metrics"]["micro_f1"]["interval"]) for found in (usual, sure, other)]
    assert width[1] > width[0] != width[2]
    assert as_json(capsys, *runs) == usual


def test_value_of_0_0_is_that_of_the_runs(tmp_path, capsys):
    Y, T, better = fold()
    Y[:, 0] = T[:, 0] = better[:, 0] = False
    found = []
    for value in (0, 1):
        pair = [
            finished_run(tmp_path / f"{name}{value}", Y, tags, sets=[f"evaluate.if_undefined={value}"])
            for name, tags in (("a", T), ("b", better))
        ]
        found.append(as_json(capsys, *pair)["metrics"]["macro_f1_all"]["a"])
    assert found[1] - found[0] == pytest.approx(1 / len(NAMES))
    mixed = Run(tmp_path / "a0"), Run(tmp_path / "b1")
    with pytest.raises(ConfigError, match=r"evaluate\.if_undefined is 0 in .*a0 and 1 in .*b1; expected the same: run"):
        compare(*mixed, as_json=True)


def test_other_test_folds_are_refused(runs, tmp_path):
    Y, T, _ = fold()
    ids = [f"doc {i}" for i in range(DOCUMENTS)]
    ids[3:5] = ["new\n1", "new 2"]
    other = finished_run(tmp_path / "c", Y, T, doc_ids=ids)
    with pytest.raises(ConfigError, match=r"2 of 200 documents only in \S*/a, 2 of 200 only in \S*/c, such as doc 3 "):
        compare(runs[0], other, False)
    fewer = finished_run(tmp_path / "d", Y[:-1], T[:-1])
    with pytest.raises(ConfigError, match=r"0 of 199 documents only in \S*/d, 1 of 200 only in \S*/a, such as doc 199"):
        compare(fewer, runs[0], False)


def test_other_gold_is_refused_and_names_the_document(runs, tmp_path):
    Y, T, _ = fold()
    Y[7, 2] = ~Y[7, 2]
    Y[9, 0] = ~Y[9, 0]
    other = finished_run(tmp_path / "c", Y, T)
    with pytest.raises(ConfigError, match=r"gold labels differ on 2 test documents: doc 7 has label 2 in") as failed:
        compare(runs[0], other, False)
    holder = other if Y[7, 2] else runs[0]
    assert f"in {holder.root} and not in" in str(failed.value)


def test_runs_that_are_not_evaluated_so_are_refused(runs, tmp_path):
    Y, T, _ = fold()
    old = finished_run(tmp_path / "old", Y, T, keep_documents=False)
    with pytest.raises(ConfigError, match=r"no table test_documents.*run `tagmill calibrate --run \S*/old`"):
        compare(runs[0], old, False)
    with pytest.raises(InputError, match="not a run folder"):
        compare(runs[0], Run(tmp_path / "nothing"), False)
    attempt = runs[1].attempt("evaluate", runs[1].manifest("evaluate")["attempt"])
    short = judged(runs[1]).documents.set_column(4, "measures", pa.array([[1.0]] * DOCUMENTS))
    tables = {"test_documents": [write_part(attempt, "test_documents", short, 5)]}
    runs[1].commit("evaluate", attempt, {}, tables, {})
    with pytest.raises(ConfigError, match=rf"\[1\] measures a document; expected {len(MEASURES)}, as this version"):
        compare(*runs, False)


def test_the_command_prints_tables_and_hides_nothing_of_names(runs):
    result = CliRunner().invoke(cli.app, ["compare", *(str(run.root) for run in runs), "--replicates", "100"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("200 test documents, 95 % intervals of 100 replicates")
    assert all(any(name in line for line in lines) for name in METRICS)
    [micro] = [line for line in lines if "micro_f1" in line]
    assert " +0." in micro and " .. " in micro and micro.rstrip().endswith("better")
    assert "Labels that are better in B" in result.stdout and "Labels that are worse" not in result.stdout
    assert "[red]markup[/red]" in result.stdout
    assert "\x1b" not in result.stdout and "\u202e" not in result.stdout and "evil\\x1b[31m" in result.stdout
    assert "chance alone would give up to 0.4" in result.stdout
    assert max(map(len, lines[:40])) <= 110


def test_the_command_says_as_json_what_it_is_asked(runs):
    arguments = ["compare", *(str(run.root) for run in runs), "--json"]
    options = ["--replicates", "150", "--confidence", "0.9", "--seed", "3"]
    found = json.loads(CliRunner().invoke(cli.app, [*arguments, *options]).stdout)
    assert (found["replicates"], found["confidence"], found["seed"]) == (150, 0.9, 3)
    assert set(found["metrics"]) == set(METRICS) and set(LABEL_METRICS) <= set(found["metrics"])


@pytest.mark.parametrize("option", [("--replicates", "10"), ("--confidence", "1"), ("--seed", "-1")])
def test_options_out_of_range_are_refused(runs, option):
    result = CliRunner().invoke(cli.app, ["compare", *(str(run.root) for run in runs), *option])
    assert result.exit_code == 2 and option[0] in result.output


def test_a_refusal_of_the_command_has_its_exit_code(runs, tmp_path):
    Y, T, _ = fold()
    other = finished_run(tmp_path / "c", Y[1:], T[1:])
    result = CliRunner().invoke(cli.app, ["compare", str(runs[0].root), str(other.root)])
    assert result.exit_code == ConfigError.code

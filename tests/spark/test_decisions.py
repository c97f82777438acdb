"""Decisions by document, from the settings to the tags: evaluate, tag and the bundle say the same."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn import metrics as sk

from jobs.tag import tag
from pipeline import config
from pipeline.errors import ConfigError, DataError
from pipeline.learners.document_rules import DocumentRule
from pipeline.learners.tagger import Tagger
from pipeline.stages.parts import decision_of
from tests.conftest import SMALL


@pytest.fixture(scope="module")
def fitted(spark, toy, tmp_path_factory):
    """A run with the default settings."""
    from jobs import entry

    cfg, _ = config.load(sets=SMALL)
    return entry.fit(str(tmp_path_factory.mktemp("fitted") / "run"), str(toy), cfg)


@pytest.fixture
def again(fitted, fit, toy, tmp_path):
    """again(*settings) -> Run: the same models, decided with other settings, in a folder of its own."""

    def call(*settings):
        if not (tmp_path / "run").exists():
            shutil.copytree(fitted.root, tmp_path / "run")
        return fit(toy, *settings, overwrite=True)

    return call


def said(run, toy, folder):
    """Labels of every document as `tagmill tag` writes them."""
    tag(str(run.root), None, str(toy), str(folder), config.load(base=run.info["config"])[0])
    rows = [row for path in sorted(folder.glob("tags-*.parquet")) for row in pq.read_table(path).to_pylist()]
    return {row["doc_id"]: [t["label"] for t in row["tags"]] for row in rows}


def judged(run, tags):
    """(Y, T) of the test documents, dense."""
    documents, fold = run.read("documents").to_pylist(), run.read("folds")["fold"].to_pylist()
    test = [d for d, f in zip(documents, fold, strict=True) if f == -1]
    names = run.read("labels")["label"].to_pylist()
    return (
        np.array([[name in found for name in names] for found in rows]).astype(int)
        for rows in ([d["labels"] for d in test], [tags[d["doc_id"]] for d in test])
    )


@pytest.mark.parametrize(
    "settings",
    [
        ("rule=rcut", "k=2"),
        ("rule=samples_f1",),
        ("rule=fixed", "at=0.9", "at_least_one=true"),
        ("rule=fixed", "at=0.05", "at_most=1"),
    ],
    ids=" ".join,
)
def test_evaluate_tag_and_bundle_agree(again, toy, tmp_path, settings):
    run = again(*(f"calibrate.{s}" for s in settings))
    tags = said(run, toy, tmp_path / "tags")
    Y, T = judged(run, tags)
    card = json.loads((run.root / "metrics.json").read_text())
    for name in ("micro", "macro", "samples"):
        some = Y.any(axis=0) if name == "macro" else slice(None)
        expected = sk.f1_score(Y[:, some], T[:, some], average=name, zero_division=0)
        assert card["metrics"][f"{name}_f1"] == pytest.approx(expected), name
    assert card["conventions"]["decision"] == decision_of(run).conventions()["decision"]

    sizes = {len(labels) for labels in tags.values()}
    if "rule=rcut" in settings:
        assert sizes == {2}
    elif "at_most=1" in settings:
        assert sizes == {0, 1} or sizes == {1}
    else:
        assert min(sizes) >= 1
    # the label without a model would be the fifth of any document
    assert not any("unseen" in labels for labels in tags.values())

    from pipeline.tracking import _bundle

    cfg, _ = config.load(base=run.info["config"])
    documents = run.read("documents")
    found = Tagger.load(_bundle(tmp_path, run, cfg)).tag(documents["doc_id"], documents["text"]).to_pylist()
    assert {row["doc_id"]: [t["label"] for t in row["tags"]] for row in found} == tags


def test_every_label_with_a_model_is_tagged_when_k_is_large(again, toy, tmp_path):
    run = again("calibrate.rule=rcut", "calibrate.k=99")
    names = run.read("labels")["label"].to_pylist()
    assert run.read("thresholds")["threshold"].null_count == 1
    assert set(run.read("thresholds")["objective"].to_pylist()) == {"rcut"}
    assert all(sorted(t) == sorted(set(names) - {"unseen"}) for t in said(run, toy, tmp_path / "tags").values())


def test_without_a_decision_by_document_nothing_is_said_of_it(again, toy, tmp_path):
    run = again()
    assert "decision" not in json.loads((run.root / "metrics.json").read_text())["conventions"]
    assert decision_of(run).plain
    tags = said(run, toy, tmp_path / "with")
    # a run of before has no such file
    manifest = run.finished("calibrate")
    del manifest["tables"]["decision.json"]
    (run.root / "calibrate" / "MANIFEST.json").write_text(json.dumps(manifest))
    assert decision_of(run).plain
    assert said(run, toy, tmp_path / "without") == tags


def test_another_value_of_0_by_0_is_another_decision(again):
    run = again("calibrate.rule=samples_f1")
    trained = run.finished("train")["fingerprint"]
    assert decision_of(run).if_undefined == 0
    run = again("calibrate.rule=samples_f1", "evaluate.if_undefined=1")
    assert decision_of(run) == DocumentRule(rule="samples_f1", if_undefined=1)
    assert run.finished("train")["fingerprint"] == trained


def test_a_changed_decision_is_refused(again, toy, tmp_path):
    run = again("calibrate.rule=rcut")
    path = run.files("decision.json")[0]
    path.write_text(path.read_text().replace("5", "6"))
    with pytest.raises(DataError, match=r"decision\.json"):
        decision_of(run, verify=True)
    path.write_text("{")
    with pytest.raises(DataError, match=r"decision\.json"):
        decision_of(run)


def test_earlier_versions_are_kept_and_come_back(again, rules_file, monkeypatch):
    """A default run, two other decisions, and back to each; killed on the way, the same command goes on."""
    from jobs import entry
    from pipeline import versions

    names = ("thresholds", "rules.json", "decision.json", "metrics.json")

    def content(run):
        return {name: run.files(name)[0].read_bytes() for name in names}

    def back(run, number):
        base = {**run.info["config"], **versions.settings(versions.version(run, number))}
        cfg, _ = config.load(base=base)
        return entry.fit(str(run.root), None, cfg, True, ("calibrate", "evaluate", "register"), version=number)

    run = again()
    assert versions.listed(run)[0]["number"] is None
    first = content(run)
    run = again("calibrate.rule=rcut", f"calibrate.rules={rules_file}")
    second = content(run)
    run = again("calibrate.at_most=1", "evaluate.propensity_a=0.6")
    third = content(run)
    rows = versions.listed(run)
    assert [row["number"] for row in rows] == [1, 2, None]
    assert set(rows[1]["settings"]) == {"calibrate.rule", "calibrate.rules"}
    assert set(rows[2]["settings"]) == {
        *("calibrate.rule", "calibrate.rules", "calibrate.at_most", "evaluate.propensity_a")
    }
    assert rows[2]["micro_f1"] == json.loads(third["metrics.json"])["metrics"]["micro_f1"]

    put_back = versions.put_back
    monkeypatch.setattr(versions, "put_back", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        back(run, 2)
    assert run.manifest("calibrate") is None
    monkeypatch.setattr(versions, "put_back", put_back)
    rules_file.unlink()  # what was made from it is kept
    back(run, 2)
    assert content(run) == second
    assert decision_of(run).rule == "rcut"
    assert run.info["config"]["calibrate"]["rule"] == "rcut"
    back(run, 3)
    assert content(run) == third
    back(run, 1)
    assert content(run) == first
    assert [(row["number"], row["current"]) for row in versions.listed(run)] == [(1, True), (2, False), (3, False)]

    card = versions.version(run, 2)
    card["calibrate"]["recipe"]["inputs"]["train"] = "other"
    monkeypatch.setattr(versions, "version", lambda *_: card)
    with pytest.raises(ConfigError, match="do not fit the models of now"):
        back(run, 2)
    assert content(run) == first


@pytest.fixture
def rules_file(tmp_path):
    path = tmp_path / "rules.yaml"
    path.write_text("exclude: [rare]\n")
    return path

"""Rules between labels, from the file to the tags: whatever is tagged, and whatever is judged, satisfies them."""

import json

import pyarrow.parquet as pq
import pytest
from sklearn import metrics as sk

from jobs.tag import tag
from pipeline import config
from pipeline.errors import ConfigError
from pipeline.learners.tagger import Tagger

RULES = """
hierarchy: hierarchy.csv
excludes: [[sport, music]]
at_least: [{n: 1, of: [outer space, weather, sport, music, food]}]
exclude: [rare]
synonyms: {space: outer space}
"""


@pytest.fixture
def rules(tmp_path):
    (tmp_path / "hierarchy.csv").write_text("child,parent\nfruit,food\nfood,things\n")
    (tmp_path / "rules.yaml").write_text(RULES)
    return tmp_path / "rules.yaml"


def broken(tags):
    """The rules that a document's tags break."""
    found = []
    if "fruit" in tags and "food" not in tags:
        found.append("implies")
    if {"sport", "music"} <= tags:
        found.append("excludes")
    if not tags & {"outer space", "weather", "sport", "music", "food"}:
        found.append("at_least")
    if tags & {"rare", "space"}:
        found.append("never")
    return found


def said(folder):
    rows = [row for path in sorted(folder.glob("tags-*.parquet")) for row in pq.read_table(path).to_pylist()]
    return {row["doc_id"]: [t["label"] for t in row["tags"]] for row in rows}


def test_tags_and_metrics_follow_the_rules(fit, toy, rules, tmp_path):
    low = ["calibrate.rule=fixed", "calibrate.at=0.05"]  # so many tags that the rules have something to do
    run = fit(toy, *low)
    before = json.loads((run.root / "metrics.json").read_text())
    tag(str(run.root), None, str(toy), str(tmp_path / "plain"), config.load(base=run.info["config"])[0])
    assert any(broken(set(tags)) for tags in said(tmp_path / "plain").values())
    assert "rules" not in before
    trained = run.finished("train")["fingerprint"]

    run = fit(toy, *low, f"calibrate.rules={rules}", overwrite=True)
    assert run.finished("train")["fingerprint"] == trained
    cfg, _ = config.load(base=run.info["config"])
    tag(str(run.root), None, str(toy), str(tmp_path / "ruled"), cfg)
    tags = said(tmp_path / "ruled")
    assert not any(broken(set(t)) for t in tags.values())
    assert any("outer space" in t for t in tags.values())

    card = json.loads((run.root / "metrics.json").read_text())
    assert card["rules"]["before"]["micro_f1"] == before["metrics"]["micro_f1"]
    assert card["rules"]["after"]["micro_f1"] == card["metrics"]["micro_f1"]
    assert card["rules"]["changes"]["excludes"]["removed"] > 0
    assert card["metrics"]["log_loss"] == before["metrics"]["log_loss"]  # rules come after the probabilities
    documents = {d["doc_id"]: d for d in run.read("documents").to_pylist()}
    test = [d for d, fold in zip(documents, run.read("folds")["fold"].to_pylist(), strict=True) if fold == -1]
    names = ["outer space" if n == "space" else n for n in run.read("labels")["label"].to_pylist()]
    gold = [{"outer space" if n == "space" else n for n in documents[d]["labels"]} for d in test]
    Y, T = ([[int(n in row) for n in names] for row in rows] for rows in (gold, [set(tags[d]) for d in test]))
    assert card["metrics"]["micro_f1"] == pytest.approx(sk.f1_score(Y, T, average="micro"))

    def up(labels):
        more = {"fruit": {"food", "things"}, "food": {"things"}}
        return set(labels).union(*(more.get(n, set()) for n in labels))

    hits, given, true = (
        sum(len(size(up(g), up(tags[d]))) for g, d in zip(gold, test, strict=True))
        for size in (lambda g, t: g & t, lambda g, t: t, lambda g, t: g)
    )
    assert card["metrics"]["hierarchical_precision"] == pytest.approx(hits / given)
    assert card["metrics"]["hierarchical_recall"] == pytest.approx(hits / true)
    assert "Rules between labels" in (run.root / "report.html").read_text()

    # neither file is needed any more, and nothing is made anew without them
    rules.unlink()
    assert fit(toy, *low, f"calibrate.rules={rules}").finished("calibrate")["seconds"] >= 0
    tag(str(run.root), None, str(toy), str(tmp_path / "again"), cfg)
    assert said(tmp_path / "again") == tags


def test_a_changed_file_of_rules_is_another_setting(fit, toy, rules):
    run = fit(toy, f"calibrate.rules={rules}")
    before = run.finished("calibrate")["fingerprint"]
    (rules.parent / "hierarchy.csv").write_text("child,parent\nfruit,food\n")
    with pytest.raises(ConfigError, match=r"calibrate\.rules"):
        fit(toy, f"calibrate.rules={rules}")
    assert fit(toy, f"calibrate.rules={rules}", overwrite=True).finished("calibrate")["fingerprint"] != before


def test_wrong_rules_stop_before_anything_runs(fit, toy, rules, tmp_path):
    rules.write_text("implies: {fruit: food, food: fruit}\n")
    with pytest.raises(ConfigError, match="food -> fruit -> food is a cycle"):
        fit(toy, f"calibrate.rules={rules}")
    assert not list((tmp_path / "run").glob("*/MANIFEST.json"))


def test_a_saved_tagger_keeps_its_rules(fit, toy, rules, tmp_path):
    from pipeline.tracking import _bundle

    run = fit(toy, "calibrate.rule=fixed", "calibrate.at=0.05", f"calibrate.rules={rules}")
    cfg, _ = config.load(base=run.info["config"])
    folder = _bundle(tmp_path, run, cfg)
    documents = run.read("documents")
    found = Tagger.load(folder).tag(documents["doc_id"], documents["text"]).to_pylist()
    assert not any(broken({t["label"] for t in row["tags"]}) for row in found)

"""The README's promises, through the command as a user types it, from another working directory."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from pipeline.config import CalibrateConfig
from pipeline.store import Run

TAGMILL = str(Path(sys.executable).parent / "tagmill")
SETS = ["--set", "train.labels_per_block=2", "--set", "spark.driver_memory=1g", "--master", "local[2]"]


def command(*args, home, cwd, expect=0):
    done = subprocess.run(
        [TAGMILL, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        env={**os.environ, "TAGMILL_HOME": str(home)},
    )
    assert done.returncode == expect, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def place(tmp_path_factory, toy):
    """A fitted run, made in a relative folder of a working directory of its own."""
    root = tmp_path_factory.mktemp("commands")
    done = command("fit", "--input", toy, "--run", "run", *SETS, home=root / "home", cwd=root)
    return root, done


def test_fit_says_what_it_did_and_writes_what_it_says(place):
    root, done = place
    for stage in ("ingest", "split", "featurize", "train", "calibrate", "evaluate", "register"):
        assert f"{stage}: " in done.stderr
    assert "40 documents, 8 labels, 0 rejected" in done.stderr
    assert "macro_f1_all" in done.stdout
    assert "over all 8 labels" in done.stdout
    assert "over 7 labels with test positives" in done.stdout
    assert "WARN" not in done.stderr
    assert set(json.loads((root / "run" / "metrics.json").read_text())) == {
        "metrics",
        "intervals",
        "groups",
        "conventions",
        "counts",
    }
    assert (root / "run" / "report.html").is_file()
    assert sorted(p.name for p in root.iterdir()) == ["home", "run"]


def test_the_same_fit_again_starts_no_spark(place, toy):
    root, _ = place
    again = command("fit", "--input", toy, "--run", "run", *SETS, home=root / "home", cwd=root)
    assert again.stderr.count("up to date") == 7
    assert "spark" not in again.stderr


def test_tag_with_the_run_and_with_the_registered_model_say_the_same(place, toy):
    root, _ = place
    command("tag", "--run", "run", "--input", toy, "--output", "by_run", *SETS[2:], home=root / "home", cwd=root)
    model = ["--model", "models:/tagmill@champion"]
    command("tag", *model, "--input", toy, "--output", "by_model", *SETS[2:], home=root / "home", cwd=root)
    mine, theirs = (pd.read_parquet(root / name).sort_values("doc_id") for name in ("by_run", "by_model"))
    assert len(mine) == 40
    assert mine["doc_id"].is_unique
    assert [list(t) for t in mine["tags"]] == [list(t) for t in theirs["tags"]]
    for tags in mine["tags"]:
        assert list(tags[0]) == ["label", "score", "probability", "threshold"] if len(tags) else True
        assert all(a["probability"] >= b["probability"] for a, b in itertools.pairwise(tags))
        assert all(tag["score"] >= tag["threshold"] and 0 < tag["probability"] < 1 for tag in tags)
    assert sum(map(len, mine["tags"])) > 20
    # nothing is left of the work, and the same command again does nothing
    assert sorted(p.name for p in root.iterdir()) == ["by_model", "by_run", "home", "run"]
    again = command(
        "tag", "--run", "run", "--input", toy, "--output", "by_run", *SETS[2:], home=root / "home", cwd=root
    )
    assert "up to date" in again.stderr
    # a folder with other content is not touched
    (root / "full").mkdir()
    (root / "full" / "note.txt").write_text("mine")
    refused = command(
        "tag", "--run", "run", "--input", toy, "--output", "full", home=root / "home", cwd=root, expect=78
    )
    assert "note" not in refused.stderr or "full" in refused.stderr
    assert [p.name for p in (root / "full").iterdir()] == ["note.txt"]


def test_show(place, tmp_path):
    root, _ = place
    at = {"home": root / "home", "cwd": tmp_path}
    run = root / "run"
    assert "micro_f1" in command("show", run, **at).stdout
    card = json.loads(command("show", run, "--json", **at).stdout)
    assert card["complete"] is True
    assert [stage["stage"] for stage in card["stages"]][:3] == ["ingest", "split", "featurize"]
    for stage in card["stages"][:6]:
        assert stage["seconds"] >= 0
        assert stage["cpu_seconds"] >= 0
        assert stage["peak_bytes"] > 50_000_000
        assert stage["rows"]
    assert card["metrics"]["micro_f1"] == json.loads((run / "metrics.json").read_text())["metrics"]["micro_f1"]
    one = json.loads(command("show", run, "--label", "food", "--json", **at).stdout)
    assert one["counts"]["train_support"] == 15
    assert "bread" in [term for term, _ in one["terms"]]
    unknown = command("show", run, "--label", "foood", expect=66, **at)
    assert "food" in unknown.stderr
    command("show", run, "--table", "thresholds", "--output", tmp_path / "t.parquet", **at)
    assert pq.read_table(tmp_path / "t.parquet").column_names[:4] == ["label_id", "threshold", "a", "b"]
    command("show", run, "--table", "label_counts", "--output", tmp_path / "c.csv", **at)
    assert list(pd.read_csv(tmp_path / "c.csv")["label"])[:2] == ["food", "fruit"]
    assert "expected one of" in command("show", run, "--table", "nonsense", expect=78, **at).stderr
    settings = json.loads(command("show", "config", "--set", "train.C=3", "--json", **at).stdout)
    assert settings["train.C"]["value"] == 3.0
    assert settings["train.C"]["from"] == "--set train.C=3"
    assert settings["train.folds"]["from"] == "default"


@pytest.mark.slow
def test_status(place, tmp_path, toy):
    root, _ = place
    at = {"home": root / "home", "cwd": tmp_path}
    value = json.loads(command("status", root / "run", "--json", **at).stdout)
    assert (value["state"], value["code"], value["remaining"]) == ("complete", 0, [])
    assert value["train"]["blocks"] == value["train"]["done"] == 4
    assert "run: complete" in command("status", root / "run", **at).stdout
    assert "not a run folder" in command("status", tmp_path, expect=66, **at).stderr
    with Run(root / "run").writing():
        assert "running, process" in command("status", root / "run", expect=75, **at).stdout
    # what ends a command is told until the same command goes on
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"doc_id": 1\n' * 3)
    failed = command("fit", "--input", bad, "--run", "bad", *SETS, expect=65, **at)
    told = json.loads(command("status", "bad", "--json", expect=65, **at).stdout)
    assert told["failure"]["stage"] == "ingest"
    assert told["failure"]["message"] in failed.stderr
    command("fit", "--input", toy, "--run", "bad", *SETS, "--set", "mlflow.enabled=false", **at)
    assert "bad: complete" in command("status", "bad", **at).stdout


def test_calibrate_chooses_again_without_training(place):
    root, _ = place
    before = json.loads((root / "run" / "metrics.json").read_text())["metrics"]
    trained = json.loads((root / "run" / "train" / "MANIFEST.json").read_text())["fingerprint"]
    at = {"home": root / "home", "cwd": root}
    done = command(
        "calibrate", "--run", "run", "--set", "calibrate.rule=fixed", "--set", "calibrate.at=0.01", *SETS[4:], **at
    )
    assert "train" not in done.stderr
    after = json.loads((root / "run" / "metrics.json").read_text())["metrics"]
    assert after["micro_f1"] != before["micro_f1"]
    assert after["p_at_1"] == before["p_at_1"]
    assert json.loads((root / "run" / "train" / "MANIFEST.json").read_text())["fingerprint"] == trained
    assert (
        "calibrate.* and evaluate.* only"
        in command("calibrate", "--run", "run", "--set", "train.C=1", expect=78, **at).stderr
    )
    command("calibrate", "--run", "run", "--set", "calibrate.rule=f_beta", "--set", "calibrate.at=0.5", *SETS[4:], **at)
    assert json.loads((root / "run" / "metrics.json").read_text())["metrics"] == before


@pytest.mark.slow
def test_an_earlier_version_comes_back(place):
    root, _ = place
    at = {"home": root / "home", "cwd": root}
    before = (root / "run" / "metrics.json").read_bytes()
    command("calibrate", "--run", "run", "--set", "calibrate.rule=rcut", "--set", "calibrate.k=3", *SETS[4:], **at)
    assert (root / "run" / "metrics.json").read_bytes() != before
    rows = json.loads(command("show", "run", "--versions", "--json", **at).stdout)["versions"]
    assert rows[-1]["current"]
    assert rows[-1]["rule"] == "rcut"
    assert rows[-1]["settings"]["calibrate.k"] == 3
    [number] = [
        row["number"] for row in rows if row["rule"] == "f_beta" and row["settings"] in ({}, rows[0]["settings"])
    ]
    text = command("show", "run", "--versions", **at).stdout
    assert "calibrate.k=3" in text
    refused = command("calibrate", "--run", "run", "--version", number, "--set", "calibrate.k=2", expect=78, **at)
    assert "leave out --version or --set" in refused.stderr
    assert "no version 99" in command("calibrate", "--run", "run", "--version", 99, expect=66, **at).stderr
    command("calibrate", "--run", "run", "--version", number, *SETS[4:], **at)
    assert (root / "run" / "metrics.json").read_bytes() == before
    assert f"{number} *" in command("show", "run", "--versions", **at).stdout


def test_rules_for_thresholds_side_by_side(place):
    root, _ = place
    at = {"home": root / "home", "cwd": root}
    found = json.loads(command("show", "run", "--thresholds", "--json", **at).stdout)
    assert found["cross_fitted"] is True
    every = set(CalibrateConfig.model_fields["rule"].annotation.__args__)
    assert set(found["rules"]) == every - set(found["by_document"])
    assert found["by_document"] == ["rcut", "samples_f1"]
    assert all(0 <= rule["micro_f1"] <= 1 and rule["tags"] >= 0 for rule in found["rules"].values())
    text = command("show", "run", "--thresholds", **at).stdout
    assert "f_beta *" in text
    assert "tags a document" in text
    assert "rcut and samples_f1 need whole documents: try them with `tagmill calibrate`" in " ".join(text.split())
    other = json.loads(command("show", "run", "--thresholds", "--set", "calibrate.recall=0.2", "--json", **at).stdout)[
        "rules"
    ]
    assert other["recall"] != found["rules"]["recall"]
    assert other["joint"] == found["rules"]["joint"]


def test_usage_errors(tmp_path, toy):
    at = {"home": tmp_path, "cwd": tmp_path}
    assert "--input" in command("fit", "--run", "r", expect=2, **at).stderr
    assert "--run" in command("tag", "--input", toy, "--output", "o", expect=2, **at).stderr
    assert (
        "nearest known one is train.C"
        in command("fit", "--input", toy, "--run", "r", "--set", "train.CC=1", expect=78, **at).stderr
    )
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_one_stage_at_a_time_as_a_scheduler_runs_it(tmp_path, toy):
    """python -m jobs.<stage>, each in a process of its own, gives what `tagmill fit` gives."""
    run = tmp_path / "run"
    root = Path(__file__).parents[2]

    def stage(name, *args, expect=0):
        done = subprocess.run(
            [sys.executable, str(root / "jobs" / f"{name}.py"), "--run", str(run), *args],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=tmp_path,
            env={**os.environ, "TAGMILL_HOME": str(tmp_path / "home")},
        )
        assert done.returncode == expect, done.stderr
        return done

    assert "not a run folder" in stage("split", expect=66).stderr
    sets = [arg for pair in zip(["--set"] * 3, ["mlflow.enabled=false", *SETS[1:4:2]], strict=True) for arg in pair]
    stage("ingest", "--input", str(toy), *sets, "--master", "local[2]")
    assert "split is not finished" in stage("featurize", expect=66).stderr
    for name in ("split", "featurize"):
        stage(name)
    assert json.loads((run / "featurize" / "MANIFEST.json").read_text())["terms"] > 20

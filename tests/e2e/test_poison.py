"""Documents that crash, hang or exhaust a worker are quarantined by name; workers that are killed accuse nobody."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs import entry
from pipeline import config
from pipeline.store import Run
from tests import poison
from tests.site import patched
from tests.spark.test_fit import prints

SETS = ("mlflow.enabled=false", "train.labels_per_block=8", "spark.driver_memory=1g", "evaluate.bootstrap=100")
LIMITS = ("spark.document_seconds=3", "spark.document_gb=1.5")
TAGMILL = str(Path(sys.executable).parent / "tagmill")
REASONS = {
    "poison crash": "worker_crash",
    "poison raise": "error:ZeroDivisionError",
    "poison memory": "oom",
    "poison sleep": "timeout",
}


def tagmill(home, *arguments, sets, patch=None, **environment):
    """One command, with the vectorizer of every process patched, and the lines that it said."""
    patches = patched(**{"pipeline.learners.vectorizer": f"tests.poison:{patch}"}) if patch else {}
    settings = ["--master", "local[2]", *(x for s in sets for x in ("--set", s))]
    done = subprocess.run(
        [TAGMILL, *map(str, arguments), *settings],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=home,
        env={**os.environ, "TAGMILL_HOME": str(home), **patches, **environment},
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fit_and_tag(toy, tmp_path):
    clean, poisoned = tmp_path / "clean.jsonl", tmp_path / "poisoned.jsonl"
    lines = toy.read_text().splitlines(keepends=True)
    for doc_id, word in zip(REASONS, poison.DEEDS, strict=True):
        bad = {"doc_id": doc_id, "text": f"the {word} cat ran over wheat and corn", "labels": []}
        lines.insert(len(doc_id) % 7, json.dumps(bad) + "\n")
    clean.write_text(toy.read_text())
    poisoned.write_text("".join(lines))
    kills = tmp_path / "kills"
    kills.mkdir()

    # workers are killed nine times on a corpus without fault: nobody is blamed
    said = tagmill(
        tmp_path,
        "fit",
        "--input",
        clean,
        "--run",
        tmp_path / "clean",
        sets=SETS,
        patch="workers",
        KILLS_FOLDER=str(kills),
    )
    assert {path.name for path in kills.iterdir()} == {
        f"{name}-{number}" for name in poison.FUNCTIONS for number in range(poison.KILLS)
    }
    run = Run(tmp_path / "clean")
    assert "quarantine" not in said
    assert not (run.root / "quarantine.json").exists()
    assert run.finished("ingest")["rejected"] == {}
    tagmill(tmp_path, "tag", "--run", run.root, "--input", clean, "--output", tmp_path / "clean tags", sets=())

    # four documents of four kinds, found by two stages: they alone are missing, and every byte is the same
    said = tagmill(
        tmp_path, "fit", "--input", poisoned, "--run", tmp_path / "run", sets=(*SETS, *LIMITS), patch="documents"
    )
    bad = Run(tmp_path / "run")
    listed = json.loads((bad.root / "quarantine.json").read_text())["documents"]
    assert {v["doc_id"]: v["reason"] for v in listed} == REASONS
    assert {v["doc_id"]: v["stage"] for v in listed} == dict(
        zip(REASONS, ["split"] * 2 + ["featurize"] * 2, strict=True)
    )
    rejects = bad.read("rejects").to_pylist()
    assert {r["reason"] for r in rejects} == set(REASONS.values())
    assert all(f"doc_id {doc_id}" in "".join(r["sample"] for r in rejects) for doc_id in REASONS)
    manifest = bad.finished("ingest")
    assert (manifest["records"], manifest["accepted"]) == (44, 40)
    assert manifest["rejected"] == dict.fromkeys(sorted(REASONS.values()), 1)
    assert prints(bad) == prints(run)
    assert not (bad.root / "failure.json").exists()
    assert said.count("quarantined, and begun again at ingest") == 2
    assert not list(bad.root.glob("*/*/poison-*"))

    # the same command again finds all of it current
    published = {path: path.stat().st_mtime_ns for path in bad.root.glob("*/MANIFEST.json")}
    entry.fit(str(bad.root), str(poisoned), config.load(base=bad.info["config"])[0])
    assert {path: path.stat().st_mtime_ns for path in bad.root.glob("*/MANIFEST.json")} == published

    # and documents that come to a finished model
    out = tmp_path / "tags"
    tagmill(tmp_path, "tag", "--run", bad.root, "--input", poisoned, "--output", out, sets=LIMITS, patch="documents")
    card = json.loads((out / "_MANIFEST.json").read_text())
    assert {v["doc_id"]: v["reason"] for v in card["quarantine"]} == REASONS
    assert (card["records"], card["accepted"]) == (44, 40)
    assert card["rejected"] == dict.fromkeys(sorted(REASONS.values()), 1)
    assert pq.read_table(out / "_rejects").num_rows == 4
    assert pq.read_table(out).equals(pq.read_table(tmp_path / "clean tags"))

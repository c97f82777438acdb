"""Train on a standalone cluster of one and of two workers with one core each: seconds side by side."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from jobs import entry
from pipeline import config
from tests.e2e.test_cluster import standalone

SETS = ("train.folds=0", "mlflow.enabled=false", "train.labels_per_block=64")


@pytest.mark.bench
@pytest.mark.timeout(1800)
def test_two_workers_against_one(data, tmp_path, capsys):
    cfg, _ = config.load(sets=[*SETS, "spark.master=local[2]"])
    run = entry.fit(
        str(tmp_path / "run"), str(data / "eurlex57k" / "documents.parquet"), cfg, only=("ingest", "split", "featurize")
    )
    seconds = {}
    for workers in (1, 2):
        copy = shutil.copytree(run.root, tmp_path / f"run{workers}")
        folder = tmp_path / f"cluster{workers}"
        folder.mkdir()
        with standalone(folder, workers) as master:
            options = ("spark.driver.host=127.0.0.1", "spark.executor.memory=700m")
            command = [sys.executable, "-m", "jobs.train", "--run", str(copy), "--master", master]
            done = subprocess.run(
                [*command, *(word for o in options for word in ("--set", f"spark.options.{o}"))],
                env={**os.environ, "SPARK_LOCAL_IP": "127.0.0.1", "TAGMILL_HOME": str(tmp_path / "home")},
                capture_output=True,
                text=True,
                check=False,
            )
        assert done.returncode == 0, done.stderr
        facts = json.loads((copy / "train" / "MANIFEST.json").read_text())
        seconds[workers] = facts["seconds"]
        with capsys.disabled():
            blocks = sum(facts["block_seconds"])
            print(f"\n{workers} worker(s): train {facts['seconds']:.1f} s, blocks {blocks:.1f} s added up")
    with capsys.disabled():
        print(f"scale-out of 2 workers against 1: {seconds[1] / seconds[2]:.2f}")
    assert seconds[2] < seconds[1]

"""kill -9 in the middle of training, then the same command: it finishes, redoes little, and every byte is the same."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.store import Run
from tests.spark.test_fit import prints

TAGMILL = str(Path(sys.executable).parent / "tagmill")
BLOCK = 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """3,000 documents, 160 labels with falling support: 40 blocks, enough to be killed among them."""
    rng = np.random.default_rng(7)
    share = 0.3 / np.arange(1, 161) ** 0.7
    rows = []
    for i in range(3000):
        on = np.flatnonzero(rng.random(160) < share)
        words = [f"word{label}x{rng.integers(3)}" for label in on for _ in range(2)]
        words += [f"filler{w}" for w in rng.integers(0, 2000, 30)]
        rows.append({"doc_id": f"d{i}", "text": " ".join(words), "labels": [f"label {label}" for label in on]})
    path = tmp_path_factory.mktemp("corpus") / "documents.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def start(corpus, run, home):
    sets = ("mlflow.enabled=false", f"train.labels_per_block={BLOCK}", "train.gap=1e-5")  # slow enough to be hit
    return subprocess.Popen(
        [
            TAGMILL,
            "fit",
            "--input",
            corpus,
            "--run",
            run,
            "--master",
            "local[2]",
            *(x for s in sets for x in ("--set", s)),
        ],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "TAGMILL_HOME": str(home)},
    )


def markers(run):
    return sorted((run / "train").glob("blocks-*/block-*.json"))


def descendants(process):
    return psutil.Process(process.pid).children(recursive=True)


@pytest.fixture(scope="module")
def golden(corpus, tmp_path_factory):
    root = tmp_path_factory.mktemp("golden")
    process = start(corpus, root / "run", root / "home")
    assert process.wait(600) == 0, process.stderr.read()
    return Run(root / "run")


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["driver", "jvm", "term"])
def test_killed_in_train(corpus, golden, tmp_path, victim):
    run = tmp_path / "run"
    process = start(corpus, run, tmp_path / "home")
    while len(markers(run)) < 3:
        assert process.poll() is None, "finished before it could be killed"
        time.sleep(0.002)
    family = descendants(process)
    if victim == "jvm":
        jvm = next(p for p in family if "java" in p.name())
        jvm.kill()
    else:
        process.send_signal(signal.SIGKILL if victim == "driver" else signal.SIGTERM)
    code = process.wait(60)
    assert code == {"driver": -signal.SIGKILL, "jvm": 69, "term": 143}[victim]
    said = process.stderr.read().strip().splitlines()[-1]
    assert victim == "driver" or "run the same command again" in said
    psutil.wait_procs(family, timeout=20)
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family), "processes are left behind"
    # nothing that looks finished
    assert not (run / "train" / "MANIFEST.json").exists()
    assert not (run / "metrics.json").exists()
    done = {path.name: path.stat().st_mtime_ns for path in markers(run)}
    assert len(done) >= 3
    if victim != "term":  # a JVM that is asked to stop may finish its tasks first
        assert len(done) < 160 // BLOCK

    again = start(corpus, run, tmp_path / "home")
    assert again.wait(600) == 0, again.stderr.read()
    assert {path.name: path.stat().st_mtime_ns for path in markers(run) if path.name in done} == done
    manifest = json.loads((run / "train" / "MANIFEST.json").read_text())
    assert manifest["blocks_resumed"] == len(done)
    assert prints(Run(run)) == prints(golden)


@pytest.mark.slow
def test_two_fits_in_one_folder(corpus, tmp_path):
    """The second says who holds the folder and leaves at once."""
    run = tmp_path / "run"
    first = start(corpus, run, tmp_path / "home")
    while not (run / "run.json").exists():
        assert first.poll() is None
        time.sleep(0.01)
    second = start(corpus, run, tmp_path / "home")
    _, said = second.communicate(timeout=60)
    assert second.returncode == 75
    assert f"process {first.pid} on " in said
    first.send_signal(signal.SIGINT)
    assert first.wait(60) == 130

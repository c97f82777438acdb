"""Whole runs of both DAGs by `airflow dags test` on a cluster of this host: the promises hold under Airflow too."""

import contextlib
import copy
import json
import os
import random
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytest.importorskip("airflow", reason="Airflow has an environment of its own: make airflow-test")

import s3fs

from tests.conftest import TOY
from tests.object_store import CREDENTIALS

ROOT = Path(__file__).parents[2]
BIN = Path(os.environ.get("TAGMILL_BIN") or ROOT / ".venv" / "bin")
AIRFLOW = str(Path(sys.executable).parent / "airflow")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not (BIN / "spark-submit").exists(), reason=f"no spark-submit in {BIN}: make setup"),
]


class Airflow:
    """An Airflow home in a temporary folder, with a corpus and a folder of runs; jobs go to the cluster `master`."""

    def __init__(self, root, master, spark_conf):
        self.root, self.runs = root, root / "runs"
        self.runs.mkdir()
        self.corpus = root / "documents.jsonl"
        draw = random.Random(7)
        with self.corpus.open("w") as file:
            for i in range(2000):
                on = [label for label in range(80) if draw.random() < 0.3 / (label + 1) ** 0.7]
                words = [f"word{label}x{draw.randrange(3)}" for label in on for _ in range(2)]
                words += [f"filler{draw.randrange(2000)}" for _ in range(30)]
                row = {"doc_id": f"d{i}", "text": " ".join(words), "labels": [f"label {label}" for label in on]}
                file.write(json.dumps(row) + "\n")
        self.config = root / "small.yaml"
        self.config.write_text(
            "mlflow: {enabled: false}\n"
            "split: {near_duplicates: 0}\n"
            "train: {labels_per_block: 2, gap: 1.0e-5}\n"  # many blocks, slow enough to be hit
            "evaluate: {bootstrap: 0}\n"
            "spark: {options: {spark.cores.max: '1'}}\n"  # of the two that there are: two dates run side by side
        )
        self.environment = {
            **os.environ,
            "AIRFLOW_HOME": str(root / "home"),
            "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "jobs"),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{root / 'airflow.db'}",
            "TAGMILL_BIN": str(BIN),
            "TAGMILL_RUNS": str(self.runs),
            "TAGMILL_DOCUMENTS": str(self.corpus),
            "TAGMILL_MASTER": master,
            "SPARK_CONF_DIR": spark_conf,
            "TAGMILL_HOME": str(root / "tagmill"),
            "TAGMILL_RETRY_SECONDS": "1",
        }
        subprocess.run([AIRFLOW, "db", "migrate"], env=self.environment, check=True, capture_output=True, timeout=300)

    def start(self, dag, date, **conf):
        """`airflow dags test`; its log goes to a file, which `said` reads."""
        conf = {"driver_memory": "1g", "config": str(self.config), **conf}
        with (self.root / f"{dag}-{date}.log").open("w") as log:
            return subprocess.Popen(
                [AIRFLOW, "dags", "test", dag, date, "--conf", json.dumps(conf)],
                env=self.environment, stdout=log, stderr=log, cwd=self.root,
            )  # fmt: skip

    def said(self, dag, date):
        return (self.root / f"{dag}-{date}.log").read_text()

    def test(self, dag, date, **conf):
        code = self.start(dag, date, **conf).wait(1500)
        return code, self.said(dag, date)

    def query(self, text):
        with contextlib.closing(sqlite3.connect(self.root / "airflow.db")) as base:
            return base.execute(text).fetchall()

    def tasks(self, date):
        rows = self.query(
            "select task_id, t.state, try_number from task_instance t join dag_run r using (dag_id, run_id) "
            f"where r.logical_date like '{date}%' and dag_id = 'tagmill_fit'"
        )
        return {name: (state, tries) for name, state, tries in rows}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """What `make cluster-up` starts: its state, as cluster.json holds it."""
    folder = tmp_path_factory.mktemp("cluster")

    def run(what):
        subprocess.run([BIN / "python", "-m", "jobs.cluster", what, "--folder", folder], cwd=ROOT, check=True)

    run("up")
    try:
        yield json.loads((folder / "cluster.json").read_text())
    finally:
        run("down")


@pytest.fixture(scope="module")
def airflow(tmp_path_factory, cluster):
    return Airflow(tmp_path_factory.mktemp("airflow"), cluster["master"], cluster["conf"])


def manifests(run):
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(run.glob("*/MANIFEST.json"))}


def hashes(run):
    """SHA-256 of every table of the run."""
    return {
        f"{stage}/{table}": [item["sha256"] for item in items]
        for stage, manifest in manifests(run).items()
        for table, items in manifest["tables"].items()
        if table != "report.html"  # it has the seconds
    }


STAGES = ["ingest", "split", "featurize", "train", "calibrate", "evaluate"]


@pytest.fixture(scope="module")
def killed(airflow):
    """A fit whose driver is killed in the middle of training: its run folder, its log, the blocks that were done."""
    run = airflow.runs / "2026-11-01"
    process = airflow.start("tagmill_fit", "2026-11-02")
    while len(blocks := sorted((run / "train").glob("blocks-*/block-*.json"))) < 3:
        assert process.poll() is None, airflow.said("tagmill_fit", "2026-11-02")[-3000:]
        time.sleep(0.002)
    driver = next(
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "python" in child.name() and any(word.endswith("jobs/train.py") for word in child.cmdline())
    )
    driver.kill()
    done = {path.name: path.stat().st_mtime_ns for path in blocks}
    assert process.wait(1500) == 0, airflow.said("tagmill_fit", "2026-11-02")[-3000:]
    return run, airflow.said("tagmill_fit", "2026-11-02"), done


def test_a_driver_killed_in_training_is_retried_and_goes_on(airflow, killed):
    run, said, done = killed
    assert "tagmill: train: exit code 137 (killed, perhaps for its memory)" in said
    assert airflow.tasks("2026-11-02") == {
        **{name: ("success", 1) for name in [*STAGES, "register", "gate", "promote"]},
        "train": ("success", 2),
    }
    assert 3 <= manifests(run)["train"]["blocks_resumed"] < 40
    left = {path.name: path.stat().st_mtime_ns for path in (run / "train").glob("blocks-*/block-*.json")}
    assert done.items() <= left.items()
    assert json.loads((airflow.runs / "champion.json").read_text()) == {"run": str(run), "date": "2026-11-01"}
    events = airflow.query("select e.extra, a.name from asset_event e join asset a on a.id = e.asset_id")
    assert [(json.loads(extra)["run"], name) for extra, name in events] == [(str(run), "tagmill_model")]


def test_cleared_and_run_again_it_finds_everything_up_to_date(airflow, killed):
    run, _, _ = killed
    before = {stage: (run / stage / "MANIFEST.json").stat().st_mtime_ns for stage in STAGES}
    code, said = airflow.test("tagmill_fit", "2026-11-02")
    assert code == 0, said[-3000:]
    assert all(f"{stage}: up to date" in said for stage in STAGES)
    assert {stage: (run / stage / "MANIFEST.json").stat().st_mtime_ns for stage in STAGES} == before
    assert "is the champion" in said


def test_two_dates_at_once_have_a_run_each_and_the_same_bytes(airflow, killed):
    run, _, _ = killed
    dates = {"2026-11-04": airflow.runs / "2026-11-03", "2026-11-05": airflow.runs / "2026-11-04"}
    processes = {date: airflow.start("tagmill_fit", date) for date in dates}
    for date, process in processes.items():
        assert process.wait(1500) == 0, airflow.said("tagmill_fit", date)[-3000:]
    for date, other in dates.items():
        assert hashes(other) == hashes(run)
        # not better than the first, so what comes after the gate is skipped
        assert f"<= {json.loads((run / 'metrics.json').read_text())['metrics']['micro_f1']:.4f} of {run}" in (
            airflow.said("tagmill_fit", date)
        )
        assert airflow.tasks(date)["gate"][0] == "success"
        assert airflow.tasks(date)["promote"][0] == "skipped"
    assert json.loads((airflow.runs / "champion.json").read_text())["run"] == str(run)


def test_the_champion_tags(airflow, killed):
    code, said = airflow.test("tagmill_tag", "2026-11-02")
    assert code == 0, said[-3000:]
    output = airflow.runs / "tags" / "2026-11-02"
    assert json.loads((output / "_MANIFEST.json").read_text())["rows"] == {"tags": 2000}


@pytest.mark.parametrize(
    ("conf", "message", "submitted"),
    [
        ({"input": "/nowhere; touch pwned $(touch pwned) `touch pwned`"}, "ingest: exit code 66", True),
        ({"run": "/tmp/../etc"}, "Invalid input for param run", False),
        ({"master": "local[2] --conf spark.x=y"}, "Invalid input for param master", False),
        ({"inptu": "/x"}, "parameter 'inptu' is unknown", False),
    ],
)
def test_a_hostile_conf_fails_at_once_and_runs_nothing(airflow, conf, message, submitted):
    code, said = airflow.test("tagmill_fit", "2026-10-02", **conf)
    assert code != 0
    assert message in said
    assert said.count("Spark-Submit cmd") == submitted  # without a retry
    assert not list(airflow.root.rglob("pwned*")) and not (airflow.runs / "2026-10-01" / "run.json").exists()


def test_settings_that_differ_from_those_of_the_run_are_refused(airflow, killed):
    """The same date with another configuration: told by name, not retried, nothing changed."""
    run, _, _ = killed
    other = airflow.root / "other.yaml"
    other.write_text(airflow.config.read_text().replace("gap: 1.0e-5", "gap: 1.0e-5, C: 3"))
    before = hashes(run)
    code, said = airflow.test("tagmill_fit", "2026-11-02", config=str(other))
    assert code != 0
    assert "tagmill: ingest: exit code 78" in said and "train.C" in said
    assert said.count("Spark-Submit cmd") == 1
    assert hashes(run) == before


@pytest.fixture
def store(tmp_path):
    """An object store on the loopback: the environment of who uses it, and a bucket."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (tmp_path / "store.log").open("w") as log:
        server = subprocess.Popen([BIN / "moto_server", "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log)
    environment = {**CREDENTIALS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            files = s3fs.S3FileSystem(use_listings_cache=False)
            until = time.monotonic() + 60
            while True:
                try:
                    files.mkdir("runs-of-airflow")
                    break
                except OSError:
                    assert server.poll() is None and time.monotonic() < until, (tmp_path / "store.log").read_text()
                    time.sleep(0.3)
            yield environment, files, "runs-of-airflow"
    finally:
        server.terminate()
        server.wait()


def test_runs_in_an_object_store_are_fitted_promoted_and_tag(airflow, store, tmp_path):
    environment, files, bucket = store
    airflow = copy.copy(airflow)
    airflow.environment = {**airflow.environment, **environment}
    files.pipe(f"{bucket}/in/2026-12-01.jsonl", TOY.read_bytes())
    config = tmp_path / "store.yaml"
    config.write_text(f"mlflow: {{enabled: false}}\nspark: {{cache_dir: {json.dumps(str(tmp_path / 'cache'))}}}\n")
    conf = {
        "run": f"s3://{bucket}/runs", "input": f"s3://{bucket}/in/{{date}}.jsonl", "master": "local[2]",
        "config": str(config),
    }  # fmt: skip
    code, said = airflow.test("tagmill_fit", "2026-12-02", **conf)
    assert code == 0, said[-3000:]
    assert "and no champion yet" in said
    run = f"s3://{bucket}/runs/2026-12-01"
    assert json.loads(files.cat(f"{bucket}/runs/champion.json")) == {"run": run, "date": "2026-12-01"}
    code, said = airflow.test("tagmill_tag", "2026-12-01", **conf)
    assert code == 0, said[-3000:]
    card = json.loads(files.cat(f"{bucket}/runs/tags/2026-12-01/_MANIFEST.json"))
    assert card["rows"] == {"tags": 40}

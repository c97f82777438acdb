import contextlib
import http.server
import itertools
import json
import math
import os
import socket
import sqlite3
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline import config as configuration
from pipeline import tracking
from pipeline.errors import ConfigError, DataError, InputError, ServiceError, StorageError
from pipeline.learners.tagger import Tagger, Weights
from pipeline.learners.vectorizer import count_documents
from pipeline.stages.featurize import choose_terms
from pipeline.storage import digest
from pipeline.store import Run, entry, write_bytes, write_part
from pipeline.tables import TABLES

LABELS = sorted(["<script>alert(1)</script>", "../x", "n" * 300, "🦜 emoji", "a/b", "CON", "plain", "x:y'z\"%"])
TEXTS = ["the red fox jumps", "a blue whale swims far", "red whale and blue fox", "far far away jumps the fox"]
METRICS = {"micro_f1": 0.5, "macro_f1": 0.25, "roc_auc_macro": None, "log_loss": float("inf")}
SECRET = "hunter2"


def settings(*sets):
    return configuration.load(None, ["train.C=0.25", "featurize.min_df=1", "mlflow.timeout=2", *sets])[0]


def finished_run(folder, cfg, seed=0):
    """A fit's folder as the stages leave it, with random weights."""
    run = Run(folder)
    run.prepare()
    source = f"s3://me:{SECRET}@bucket/toy.jsonl"
    run.create({"config": cfg.model_dump(mode="json"), "input": source})
    rng = np.random.default_rng(seed)
    texts, size = pa.array(TEXTS), len(LABELS)
    vocabulary = choose_terms(count_documents(texts, 1), len(TEXTS), cfg.featurize)
    d, ids = vocabulary.num_rows, np.arange(size, dtype=np.int32)
    columns = {
        "labels": {"label_id": ids, "label": LABELS, "support": range(size)},
        "vocabulary": vocabulary,
        "label_models": {
            "label_id": ids,
            "bias": rng.normal(size=size).astype(np.float32),
            "indices": [np.arange(d, dtype=np.int32)] * size,
            "weights": list(rng.normal(size=(size, d)).astype(np.float32)),
            "C": [1.0] * size,
            "positive_weight": [1.0] * size,
            "epochs": [1] * size,
            "gap": [0.0] * size,
            "solver_gap": [0.0] * size,
            "objective": [0.0] * size,
            "status": ["converged"] * size,
        },
        "thresholds": {
            "label_id": ids,
            "ece": [0.01] * size,
            "threshold": [None, *[-0.5] * (size - 1)],
            "a": rng.uniform(0.5, 2, size),
            "b": rng.normal(size=size),
            **{f"knot_{name}": [[]] * size for name in ("score", "log_odds")},
            "calibration": ["platt"] * size,
            **{f"{m}_{when}": [0.1] * size for m in ("brier", "log_loss", "ece") for when in ("before", "after")},
            "objective": ["f1"] * size,
            "expected_f1": [0.5] * size,
            "spread": [None] * size,
            "support": range(size),
        },
        "label_counts": {
            "label_id": ids,
            "label": LABELS,
            **{name: range(size) for name in ("tp", "fp", "fn", "support", "train_support")},
            **{
                name: [None, *[0.5] * (size - 1)]
                for name in ("precision", "recall", "f1", "average_precision", "roc_auc")
            },
            "ece": [0.01] * size,
            "threshold": [None, *[-0.5] * (size - 1)],
            "status": ["converged"] * size,
        },
    }
    facts = {
        "ingest": {"accepted": 4, "input": [{"file": source, "bytes": 1, "sha256": "0" * 64}]},
        "evaluate": {"reliability": [{"probability": 0.2, "positives": 0.25, "pairs": 8}], "summary": "micro F1 0.5"},
    }
    stages = {
        "ingest": ["labels"],
        "split": [],
        "featurize": ["vocabulary"],
        "train": ["label_models"],
        "calibrate": ["thresholds"],
        "evaluate": ["label_counts"],
    }
    for stage, names in stages.items():
        attempt = run.attempt(stage)
        tables = {name: [write_part(attempt, name, as_table(columns[name], name), 0)] for name in names}
        if stage == "train":
            weights = Weights.build(attempt, [attempt / tables["label_models"][0]["file"]], d, size)
            tables["weights"] = [entry(path, attempt, 1) for path in weights]
        if stage == "evaluate":
            write_bytes(attempt / "metrics.json", json.dumps({"metrics": METRICS}).encode())
            write_bytes(attempt / "report.html", b"<p>report</p>")
            tables |= {name: [entry(attempt / name, attempt, 1)] for name in ("metrics.json", "report.html")}
        run.commit(stage, attempt, {"stage": stage, "seed": seed}, tables, {"seconds": 1.5, **facts.get(stage, {})})
    return run


def as_table(columns, name):
    return columns if isinstance(columns, pa.Table) else pa.table(columns, schema=TABLES[name].schema)


def tags_of(folder):
    return Tagger.load(folder).tag(pa.array(list("abcd")), pa.array(TEXTS))


def champion(client):
    return int(client.get_model_version_by_alias("tagmill", "champion").version)


class Sent:
    """A run that has been sent to a store of its own."""

    def __init__(self, folder):
        self.folder = folder
        self.store = folder / "störe with space"
        self.cfg = settings(f"mlflow.tracking_uri=sqlite:///{self.store}/mlflow.db")
        self.run = finished_run(folder / "my run", self.cfg)
        self.elsewhere = folder / "working directory"
        self.elsewhere.mkdir()
        with contextlib.chdir(self.elsewhere):
            self.facts = tracking.send(self.run, self.cfg)

    @property
    def client(self):
        import mlflow

        return mlflow.MlflowClient(self.cfg.mlflow.tracking_uri)

    def runs(self):
        return self.client.search_runs([self.facts["experiment_id"]], run_view_type=3)


@pytest.fixture(scope="module")
def sent(tmp_path_factory):
    return Sent(tmp_path_factory.mktemp("tracking"))


def test_a_run_is_sent_whole(sent):
    [run] = sent.runs()
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "my run"
    assert run.data.tags["tagmill.fingerprint"] == sent.run.manifest("evaluate")["fingerprint"]
    assert run.data.params["train.C"] == "0.25"
    assert not [key for key in run.data.params if key.startswith(("spark.", "mlflow."))]
    seconds = {f"seconds/{name}": 1.5 for name in ("ingest", "split", "featurize", "train", "calibrate", "evaluate")}
    assert run.data.metrics == {"micro_f1": 0.5, "macro_f1": 0.25, **seconds}
    [dataset] = run.inputs.dataset_inputs
    assert dataset.dataset.name == "toy.jsonl"


def test_the_files_are_there(sent):
    import pyarrow.parquet as pq

    client, run_id = sent.client, sent.facts["run_id"]
    folder = Path(client.download_artifacts(run_id, "", str(sent.folder)))
    assert (folder / "report.html").read_bytes() == b"<p>report</p>"
    assert pq.read_table(folder / "label_counts.parquet").equals(sent.run.read("label_counts"))
    assert pq.read_table(folder / "thresholds.parquet").equals(sent.run.read("thresholds"))
    assert {path.read_bytes()[1:4] for path in (folder / "figures").iterdir()} == {b"PNG"}
    table = json.loads((folder / "largest_labels.json").read_text())
    assert [row[0] for row in table["data"]] == LABELS[::-1]  # by falling support
    assert json.loads((folder / "settings.json").read_text())["train.C"] == 0.25


def test_one_version_with_the_alias_and_the_metrics(sent):
    client = sent.client
    [version] = client.search_model_versions()
    assert sent.facts["model_uri"] == "models:/tagmill/1"
    assert (version.name, int(version.version)) == ("tagmill", 1)
    assert champion(client) == 1
    assert version.run_id == sent.facts["run_id"]
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    assert {metric.key: metric.value for metric in model.metrics} == {"micro_f1": 0.5, "macro_f1": 0.25}
    assert model.params["train.C"] == "0.25"
    assert model.status == "READY"


def test_nothing_is_pickled_and_nothing_secret_is_stored(sent):
    files = [path for path in sent.store.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix in (".pkl", ".pickle", ".joblib", ".pyc", ".nbi", ".nbc")]
    assert len(files) > 20
    assert list(sent.elsewhere.iterdir()) == []
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_sending_again_changes_nothing_and_an_alias_that_was_moved_stays(sent):
    client = sent.client
    client.delete_registered_model_alias("tagmill", "champion")
    again = tracking.send(sent.run, sent.cfg)
    assert {**again, "seconds": 0} == {**sent.facts, "seconds": 0}
    assert len(sent.runs()) == len(client.search_model_versions()) == 1
    assert client.get_registered_model("tagmill").aliases == {}
    moving = settings(f"mlflow.tracking_uri={sent.cfg.mlflow.tracking_uri}", "mlflow.move_alias=true")
    tracking.send(sent.run, moving)
    assert list(client.get_registered_model("tagmill").aliases) == ["champion"]
    client.delete_registered_model_alias("tagmill", "champion")
    other = tracking.send(
        sent.run, settings(f"mlflow.tracking_uri={sent.cfg.mlflow.tracking_uri}", "mlflow.alias=next")
    )
    assert other["model_version"] == "1"
    assert list(client.get_registered_model("tagmill").aliases) == ["next"]
    client.set_registered_model_alias("tagmill", "champion", "1")
    client.set_model_version_tag("tagmill", "1", tracking.ALIAS, "champion")


@pytest.mark.parametrize(
    "form", ["models:/tagmill/1", "models:/tagmill@champion", "models:/{model}", "runs:/{run}/tagger"]
)
def test_a_fetched_model_tags_like_the_run(sent, tmp_path, form):
    model_id = sent.client.get_model_version("tagmill", "1").source.removeprefix("models:/")
    uri = form.format(model=model_id, run=sent.facts["run_id"])
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "leftover").touch()
    folder, facts = tracking.fetch_model(uri, sent.cfg.mlflow, tmp_path / "model")
    registered = "tagmill" in uri
    assert facts == {
        "model_uri": "models:/tagmill/1" if registered else f"models:/{model_id}",
        "version": "1" if registered else None,
        "sha256": digest(folder / "tagger.json"),
    }
    assert {path.suffix for path in (tmp_path / "model").rglob("*") if path.is_file()} == {".json", ".parquet", ".npy"}
    expected = Tagger.from_tables(
        *(sent.run.read(name) for name in ("vocabulary", "labels", "thresholds")),
        Weights.load(sent.run.files("weights")[0].parent),
        {"ngrams": 1, "sublinear": True, "max_tags": 0},
    ).tag(pa.array(list("abcd")), pa.array(TEXTS))
    assert tags_of(folder).equals(expected)
    said = {tag["label"] for row in expected["tags"].to_pylist() for tag in row}
    assert said == set(LABELS[1:])  # all names but that of the label without a threshold


def test_the_registered_model_can_be_served(sent, monkeypatch):
    import importlib.metadata

    import mlflow
    import pandas as pd

    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sent.cfg.mlflow.tracking_uri)
    said = mlflow.pyfunc.load_model("models:/tagmill@champion").predict(pd.DataFrame({"text": TEXTS}))
    [card] = sent.store.rglob("tagger.json")
    expected = tags_of(card.parent)["tags"].to_pylist()
    for column, field in {"tags": "label", "probabilities": "probability", "scores": "score"}.items():
        assert said[column].tolist() == [[tag[field] for tag in row] for row in expected]
    pinned = card.parents[2].joinpath("requirements.txt").read_text().split()
    assert f"numba=={importlib.metadata.version('numba')}" in pinned and all("==" in line for line in pinned)


def test_a_changed_byte_is_found(sent, tmp_path):
    folder, _ = tracking.fetch_model("models:/tagmill/1", sent.cfg.mlflow, tmp_path)
    for path in sorted(folder.glob("*.*")):
        if path.name == "tagger.json":
            continue
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(DataError, match=path.name):
            Tagger.load(folder)
        path.write_bytes(content)
    Tagger.load(folder)


def test_a_model_that_was_exchanged_is_refused(sent, tmp_path):
    [card] = sent.store.rglob("tagger.json")
    content = card.read_bytes()
    card.write_bytes(content + b" ")
    try:
        with pytest.raises(DataError, match="SHA-256"):
            tracking.fetch_model("models:/tagmill/1", sent.cfg.mlflow, tmp_path)
    finally:
        card.write_bytes(content)


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("models:/tagmill/9", "versions of tagmill: 1; aliases: champion \\(version 1\\)"),
        ("models:/tagmill@other", "versions of tagmill: 1"),
        ("models:/absent/1", "registered: tagmill"),
        ("models:/m-" + "0" * 32, "registered: tagmill"),
        ("runs:/" + "0" * 32, "registered: tagmill"),
        ("/etc/passwd", "expected models:/name/1"),
        ("s3://bucket/x", "expected models:/name/1"),
    ],
)
def test_a_missing_model_says_what_exists(sent, tmp_path, uri, told):
    with pytest.raises(InputError, match=told):
        tracking.fetch_model(uri, sent.cfg.mlflow, tmp_path)


def test_no_store_is_made_by_fetching(tmp_path):
    cfg = settings(f"mlflow.tracking_uri=sqlite:///{tmp_path}/absent/mlflow.db")
    with pytest.raises(InputError, match="no MLflow store"):
        tracking.fetch_model("models:/tagmill/1", cfg.mlflow, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_attempt_is_closed_and_sent_anew(sent, tmp_path, monkeypatch):
    run = finished_run(tmp_path / "second", sent.cfg, seed=1)
    mark = run.manifest("evaluate")["fingerprint"]
    monkeypatch.setattr(tracking, "_send_model", lambda *_: sys.exit("killed"))
    with pytest.raises(SystemExit):
        tracking.send(run, sent.cfg)
    monkeypatch.undo()
    [left] = [r for r in sent.runs() if r.data.tags["tagmill.fingerprint"] == mark]
    assert left.info.status == "FAILED"
    sent.client.update_run(left.info.run_id, "RUNNING")  # as a SIGKILL would have left it
    facts = tracking.send(run, sent.cfg)
    states = {r.info.run_id: (r.info.status, r.info.lifecycle_stage) for r in sent.runs()}
    assert states[left.info.run_id] == ("FAILED", "deleted")
    assert states[facts["run_id"]] == ("FINISHED", "active")
    assert facts["model_version"] == "2"
    assert champion(sent.client) == 2


WRITES = ("create_", "log_", "set_", "update_", "delete_", "finalize_")


def send_and_die(run, cfg, number):
    """Exit code of a process that sends a run and is gone when it begins its write of that number."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        import mlflow

        made = itertools.count(1)

        def dying(method):
            def call(*arguments, **named):
                if next(made) == number:
                    os._exit(9)
                return method(*arguments, **named)

            return call

        for name in dir(mlflow.MlflowClient):
            if name.startswith(WRITES):
                setattr(mlflow.MlflowClient, name, dying(getattr(mlflow.MlflowClient, name)))
        tracking.send(run, cfg)
        code = 0
    finally:
        os._exit(code)


def test_killed_at_every_write_it_is_there_once_in_the_end(tmp_path):
    """Each attempt gets one write further than the one before, and finds what that has left."""
    # imported once, not by each process, as is what draws
    import mlflow.store.model_registry.sqlalchemy_store
    import mlflow.store.tracking.sqlalchemy_store

    cfg = settings(f"mlflow.tracking_uri=sqlite:///{tmp_path}/mlflow.db")
    run = finished_run(tmp_path / "run", cfg)
    codes = []
    while not codes or codes[-1] == 9:
        codes.append(send_and_die(run, cfg, len(codes) + 1))
    assert codes[-1] == 0
    assert len(codes) > 15

    client = mlflow.MlflowClient(cfg.mlflow.tracking_uri)
    facts = tracking.send(run, cfg)
    [sent] = client.search_runs([facts["experiment_id"]])
    left = client.search_runs([facts["experiment_id"]], run_view_type=2)  # the deleted ones
    assert sent.info.status == "FINISHED"
    assert {found.info.status for found in left} == {"FAILED"}
    finite = {name: value for name, value in METRICS.items() if value is not None and math.isfinite(value)}
    assert finite.items() <= sent.data.metrics.items()
    assert {len(client.get_metric_history(sent.info.run_id, name)) for name in finite} == {1}
    [version] = client.search_model_versions()
    assert (version.run_id, champion(client)) == (sent.info.run_id, int(version.version))


def test_a_run_may_be_sent_without_the_alias_and_take_it_later(sent, tmp_path):
    """As under Airflow, where the gate stands between the two."""
    run = finished_run(tmp_path / "third", sent.cfg, seed=2)
    before = champion(sent.client)
    without = settings(f"mlflow.tracking_uri={sent.cfg.mlflow.tracking_uri}", 'mlflow.alias=""')
    version = tracking.send(run, without)["model_version"]
    assert int(version) > before and champion(sent.client) == before
    assert tracking.send(run, sent.cfg)["model_version"] == version
    assert champion(sent.client) == int(version)


def test_nothing_of_the_process_is_changed_and_nothing_is_said(sent, monkeypatch, capfd):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    import mlflow

    mlflow.set_tracking_uri("http://127.0.0.1:9/other")
    try:
        before = dict(os.environ), list(sys.path)
        run = finished_run(sent.folder / "third", sent.cfg, seed=2)
        tracking.send(run, sent.cfg)
        assert (dict(os.environ), sys.path) == before
        assert mlflow.get_tracking_uri() == "http://127.0.0.1:9/other"
        assert mlflow.active_run() is None
    finally:
        mlflow.set_tracking_uri(None)
    assert capfd.readouterr() == ("", "")


def test_a_deleted_experiment_and_a_refused_name_are_told(sent):
    uri = sent.cfg.mlflow.tracking_uri
    sent.client.delete_experiment(sent.client.create_experiment("gone"))
    with pytest.raises(ConfigError, match=r"mlflow.experiment is gone, which is deleted"):
        tracking.send(sent.run, settings(f"mlflow.tracking_uri={uri}", "mlflow.experiment=gone"))
    with pytest.raises(ServiceError, match=r"refuses the request: .*check mlflow.experiment, mlflow.model"):
        tracking.send(sent.run, settings(f"mlflow.tracking_uri={uri}", "mlflow.model=a/b"))


# -- a store that does not answer --------------------------------------------------------------------------------------


@contextlib.contextmanager
def listening(answer=None):
    """The port of a server; without `answer` (status by path, headers) it accepts and says nothing."""
    if answer is None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            yield server.getsockname()[1]
        return

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers = answer(self.path)
            if status is None:
                time.sleep(60)
            self.send_response(status)
            for name, value in {"Content-Length": "2", **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"OK")

        do_POST = do_GET

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.block_on_close, server.daemon_threads = False, True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def refusal(sent, port, seconds, kind=ServiceError):
    cfg = settings()  # the address comes from a run of before, or from MLFLOW_TRACKING_URI: as a setting it is refused
    address = {"tracking_uri": f"http://me:{SECRET}@127.0.0.1:{port}"}
    cfg = cfg.model_copy(update={"mlflow": cfg.mlflow.model_copy(update=address)})
    start = time.monotonic()
    with pytest.raises(kind) as caught:
        tracking.send(sent.run, cfg)
    assert time.monotonic() - start < seconds
    assert SECRET not in str(caught.value) and "\n" not in str(caught.value)
    assert f"http://127.0.0.1:{port}" in str(caught.value)
    return str(caught.value)


def test_a_closed_port(sent):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert "does not answer" in refusal(sent, port, 5)


def test_a_server_that_never_answers(sent):
    with listening() as port:
        assert "does not answer" in refusal(sent, port, 10)


def test_a_server_that_dies_after_the_first_answer(sent):
    with listening(lambda path: (200 if path == "/health" else None, {})) as port:
        assert "does not answer" in refusal(sent, port, 10)


def test_a_server_that_is_down_and_asks_to_wait(sent):
    with listening(lambda path: (200 if path == "/health" else 503, {"Retry-After": "3600"})) as port:
        assert "does not answer" in refusal(sent, port, 10)
    with listening(lambda path: (502, {})) as port:
        assert "HTTP status 502" in refusal(sent, port, 10)


def test_a_redirect_is_not_followed(sent):
    visited = []

    def elsewhere(path):
        visited.append(path)
        return 200, {}

    with listening(elsewhere) as other:
        target = {"Location": f"http://127.0.0.1:{other}/"}
        with listening(lambda path: (302, target)) as port:
            assert f"redirects to http://127.0.0.1:{other}/" in refusal(sent, port, 10)
        with listening(lambda path: (200, {}) if path == "/health" else (307, target)) as port:
            refusal(sent, port, 10)
    assert visited == []


@pytest.mark.parametrize("status", [401, 403])
def test_wrong_credentials(sent, status):
    with listening(lambda path: (status, {})) as port:
        assert "refuses access" in refusal(sent, port, 10)


def test_a_store_that_cannot_be_used(sent, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot open the MLflow store .*/file"):
        tracking.send(sent.run, settings(f"mlflow.tracking_uri=sqlite:///{tmp_path}/file/mlflow.db"))
    (tmp_path / "other.db").write_text("no database, but long enough to be taken for one" * 100)
    with pytest.raises(ServiceError, match="not a database"):
        tracking.send(sent.run, settings(f"mlflow.tracking_uri=sqlite:///{tmp_path}/other.db"))
    copy = tmp_path / "mlflow.db"
    copy.write_bytes((sent.store / "mlflow.db").read_bytes())
    cfg = settings(f"mlflow.tracking_uri=sqlite:///{copy}")
    with contextlib.closing(sqlite3.connect(copy)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        with pytest.raises(ServiceError, match="another process has locked the database"):
            tracking.send(sent.run, cfg)
    with contextlib.closing(sqlite3.connect(copy)) as database:
        database.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
        database.commit()
    with pytest.raises(ServiceError, match="schema of another MLflow version"):
        tracking.send(sent.run, cfg)


# -- addresses ---------------------------------------------------------------------------------------------------------


def test_where_the_store_is(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("TAGMILL_HOME", str(tmp_path))
    assert tracking.tracking_uri(settings().mlflow) == f"sqlite:///{tmp_path}/mlflow.db"
    command = tracking.ui_command(settings().mlflow)
    assert f"--backend-store-uri sqlite:///{tmp_path}/mlflow.db" in command and "--host 127.0.0.1" in command
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"https://me:{SECRET}@host:5000/path")
    assert tracking.tracking_uri(settings().mlflow) == "https://host:5000/path"
    assert tracking.ui_command(settings().mlflow) == "https://host:5000/path"
    monkeypatch.chdir(tmp_path)
    assert tracking.tracking_uri(settings("mlflow.tracking_uri=sqlite:///x.db").mlflow) == f"sqlite:///{tmp_path}/x.db"


def test_importing_is_cheap():
    import subprocess

    heavy = ("mlflow", "numba", "matplotlib", "pyspark")
    code = f"import sys, pipeline.tracking; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"

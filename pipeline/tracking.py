"""A finished run -> MLflow; a registered model -> a folder that `Tagger.load` reads.

Nothing else talks to an MLflow store.  A run is complete and readable without it.  Sending is idempotent: one MLflow
run a fingerprint, one version a run, the alias last; what an interrupted attempt left behind is closed and sent anew.
"""

import contextlib
import getpass
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import re
import shlex
import shutil
import socket
import sqlite3
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow.parquet as pq

from pipeline.config import Config, MlflowConfig, flat
from pipeline.errors import ConfigError, DataError, InputError, ServiceError, TagmillError, shown
from pipeline.flow import FIT
from pipeline.storage import digest, explained, fetch
from pipeline.store import Run

FINGERPRINT, SHA256, ALIAS = "tagmill.fingerprint", "tagmill.sha256", "tagmill.alias_given"
MODEL = "tagger"  # name of the model inside an MLflow run, and of the bundle folder inside the model
TABLE_LABELS = 1_000  # labels of the table that the UI shows
PARAMS_AT_ONCE = 100  # the store's limit for one batch
PARAM_CHARACTERS = 500  # what older servers store of a value
REQUIREMENTS = ("mlflow", "numpy", "numba", "pandas", "pyarrow")  # what serving imports
EXAMPLES = (
    "How to sharpen a kitchen knife with a whetstone.",
    "The committee adopted the budget for the coming year.",
    "A proof that there are infinitely many prime numbers.",
)
PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


# -- which store -------------------------------------------------------------------------------------------------------


def tracking_uri(cfg: MlflowConfig) -> str:
    """The store that runs are sent to, without user name and password."""
    return redacted(_address(cfg))


def ui_command(cfg: MlflowConfig) -> str:
    """The command that opens the MLflow page of the store on this machine; the address itself where a server runs."""
    uri = tracking_uri(cfg)
    if urlsplit(uri).scheme in ("http", "https"):
        return uri
    settings = ["MLFLOW_DISABLE_TELEMETRY=true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false"]
    artifacts = str(_artifact_folder(uri))
    options = [
        "--backend-store-uri",
        uri,
        "--artifacts-destination",
        artifacts,
        "--host",
        "127.0.0.1",
        "--port",
        "5000",
    ]
    return shlex.join(["env", *settings, _mlflow_command(), "ui", *options])


def redacted(text: str) -> str:
    """`text` without what may be secret in its URIs: user names, passwords, tokens in the query.

    >>> redacted("cannot reach https://me:secret@host:5000/?token=abc&page=2")
    'cannot reach https://host:5000/?token=***&page=2'
    """
    text = re.sub(r"(?i)\b([a-z][a-z0-9+.-]*://)[^/\s]*@", r"\1", text)
    return re.sub(
        r"(?i)([?&][^=&\s]*(?:token|secret|passw|pwd|key|signature|credential)[^=&\s]*=)[^&\s]*", r"\1***", text
    )


def _address(cfg):
    uri = cfg.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{_home() / 'mlflow.db'}"
    if uri.startswith("sqlite:///"):  # a relative path would mean another store in every working directory
        return f"sqlite:///{os.path.abspath(uri.removeprefix('sqlite:///'))}"
    return uri


def _home():
    import platformdirs

    return Path(os.path.abspath(os.environ.get("TAGMILL_HOME") or platformdirs.user_data_dir("tagmill")))


def _artifact_folder(uri):
    """Where the files of a store without a server lie; MLflow's own choice would be the working directory."""
    return (Path(uri.removeprefix("sqlite:///")).parent if uri.startswith("sqlite:///") else _home()) / "artifacts"


def _mlflow_command():
    return str(Path(sys.executable).with_name("mlflow"))


# -- connecting --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _connected(cfg: MlflowConfig, make: bool) -> Iterator:
    """A client of the store.  A store that does not answer is a ServiceError within about twice cfg.timeout seconds."""
    address = _address(cfg)
    settings = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "CRITICAL",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_RECORD_ENV_VARS_IN_MODEL_LOGGING": "false",
        "MLFLOW_UV_AUTO_DETECT": "false",  # a uv.lock in the working directory is none of ours
        "MLFLOW_ALLOW_HTTP_REDIRECTS": "false",  # credentials go to the configured host only
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(max(1, cfg.timeout // 2)),
    }
    parts = urlsplit(address)
    if parts.scheme in ("http", "https") and "@" in parts.netloc:
        # in a header, where MLflow keeps them; in an address they would get into its messages
        settings["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username or "")
        settings["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password or "")
        address = redacted(address)
    settings["MLFLOW_TRACKING_URI"] = address
    with _explained(address), _environment(settings), _quiet():
        _probe(address, cfg.timeout, make)
        import mlflow

        previous = mlflow.get_tracking_uri()  # differs where the process has set one, which goes before the environment
        if previous != address:
            mlflow.set_tracking_uri(address)
        try:
            yield mlflow.MlflowClient()
        finally:
            if previous != address:
                mlflow.set_tracking_uri(previous)


@contextlib.contextmanager
def _environment(settings):
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _quiet():
    """No chatter of MLflow and Alembic; sys.path as it was, to which MLflow adds the code of a model it tries out."""
    path, loggers = list(sys.path), [logging.getLogger(name) for name in ("mlflow", "alembic", "sqlalchemy", "urllib3")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.path[:] = path
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _probe(uri, timeout, make):
    """Raise where nothing answers: MLflow itself would try for minutes."""
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https"):
        import requests

        try:
            url = f"{uri.rstrip('/')}/health"
            with requests.get(url, timeout=timeout, allow_redirects=False, stream=True) as response:
                status, target = response.status_code, response.headers.get("Location", "")
        except requests.exceptions.SSLError:
            return  # something answers; MLflow, which knows the certificates, says what is wrong
        if 300 <= status < 400:
            raise ServiceError(
                f"MLflow at {uri} redirects to {shown(redacted(target))}; give that address as mlflow.tracking_uri"
            )
        if status >= 500:
            raise ServiceError(f"MLflow at {uri} does not answer: HTTP status {status}; check the server")
    elif uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///"))
        if not make and not path.is_file():
            raise InputError(
                f"{path}: no MLflow store; expected one that a fit has registered a model in: check mlflow.tracking_uri"
            )
        with explained(path, "open the MLflow store"):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with contextlib.closing(sqlite3.connect(path, timeout=timeout)) as database:
            database.execute("BEGIN IMMEDIATE")
    elif parts.hostname:
        port = parts.port or PORTS.get(parts.scheme.split("+")[0])
        if port:
            try:
                socket.create_connection((parts.hostname, port), timeout).close()
            except OSError as error:
                raise ServiceError(f"MLflow at {redacted(uri)} {_reason(error)}") from error


@contextlib.contextmanager
def _explained(uri):
    """Turn the errors of MLflow and of what it stands on into one line; our own errors and bugs pass."""
    with explained("the MLflow store", "use"):
        try:
            yield
        except Exception as error:
            families = {kind.__module__.split(".")[0] for kind in type(error).__mro__}
            if isinstance(error, TagmillError) or not families & {
                "mlflow",
                "requests",
                "urllib3",
                "sqlalchemy",
                "sqlite3",
            }:
                raise
            raise ServiceError(f"MLflow at {redacted(uri)} {_reason(error)}") from error


def _reason(error):
    text = redacted(str(error))
    brief = shown(" ".join(text.split()), 300)
    if re.search(r"error code 40[13]\b|PERMISSION_DENIED|UNAUTHENTICATED", text):
        how = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        return f"refuses access: {brief}; {how}"
    if "out-of-date database schema" in text:
        how = f"back the database up, then run: {_mlflow_command()} db upgrade URI"
        return f"has the schema of another MLflow version; {how}"
    if "database is locked" in text:
        return "does not answer: another process has locked the database; try again when it is done"
    if getattr(error, "error_code", "INTERNAL_ERROR") in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE"):
        return f"refuses the request: {brief}; check mlflow.experiment, mlflow.model and mlflow.alias"
    return f"does not answer: {brief}; check mlflow.tracking_uri and that the server runs"


# -- sending -----------------------------------------------------------------------------------------------------------


def send(run: Run, cfg: Config) -> dict:
    """Send a finished run: parameters, metrics, files, the model, a version, the alias.  What is there stays as it is.

    Returns run_id, experiment_id, model_uri, model_version, alias, tracking_uri, seconds.  Raises ServiceError where
    MLflow does not answer or refuses, ConfigError where the experiment has been deleted.
    """
    started = time.monotonic()
    fingerprint = run.finished("evaluate")["fingerprint"]
    with _connected(cfg.mlflow, make=True) as client:
        experiment_id = _experiment(client, cfg.mlflow)
        run_id = _sent(client, experiment_id, fingerprint) or _send_run(client, experiment_id, run, cfg)
        version = _version(client, run_id, run, cfg.mlflow)
        given = version.tags.get(ALIAS) == cfg.mlflow.alias
        if cfg.mlflow.alias and (cfg.mlflow.move_alias or not given):
            # given once, it is left where somebody moved it since, unless asked for
            client.set_registered_model_alias(version.name, cfg.mlflow.alias, version.version)
            client.set_model_version_tag(version.name, version.version, ALIAS, cfg.mlflow.alias)
    return {
        "run_id": run_id,
        "experiment_id": experiment_id,
        "model_uri": f"models:/{version.name}/{version.version}",
        "model_version": str(version.version),
        "alias": cfg.mlflow.alias,
        "tracking_uri": tracking_uri(cfg.mlflow),
        "seconds": round(time.monotonic() - started, 3),
    }


def _experiment(client, cfg):
    found = client.get_experiment_by_name(cfg.experiment)
    if found is None:
        local = urlsplit(_address(cfg)).scheme not in ("http", "https", "databricks")
        return client.create_experiment(cfg.experiment, _artifact_folder(_address(cfg)).as_uri() if local else None)
    if found.lifecycle_stage != "active":
        raise ConfigError(
            f"mlflow.experiment is {shown(cfg.experiment)}, which is deleted in {tracking_uri(cfg)}; "
            "restore it or choose another"
        )
    return found.experiment_id


def _sent(client, experiment_id, fingerprint):
    """The finished MLflow run of this fit, or None.  Runs of it that were interrupted are closed and deleted."""
    finished = None
    for found in client.search_runs([experiment_id], f"tags.`{FINGERPRINT}` = '{fingerprint}'"):
        if found.info.status == "FINISHED":
            finished = found.info.run_id
        else:
            for model_id in _model_ids(found):
                client.delete_logged_model(model_id)
            client.set_terminated(found.info.run_id, "FAILED")
            client.delete_run(found.info.run_id)
    return finished


def _model_ids(mlflow_run):
    return [output.model_id for output in mlflow_run.outputs.model_outputs] if mlflow_run.outputs else []


def _send_run(client, experiment_id, run, cfg):
    """A new MLflow run with everything in it; it is FINISHED only when all of it is there."""
    manifests = {stage.name: run.finished(stage.name) for stage in FIT if stage.name != "register"}
    card = json.loads(run.files("metrics.json", verify=True)[0].read_text(encoding="utf-8"))
    counts = run.read("label_counts", verify=True)
    tags = {
        FINGERPRINT: manifests["evaluate"]["fingerprint"],
        "tagmill.run": shown(run.root, 1000),
        "mlflow.source.name": "tagmill",
        "mlflow.source.type": "JOB",
        "mlflow.note.content": _note(manifests, counts.num_rows),
    }
    with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    run_id = client.create_run(experiment_id, tags=tags, run_name=shown(run.root.name, 250)).info.run_id
    try:
        _send_settings(client, run_id, cfg)
        client.log_inputs(run_id, [_documents(run, manifests["ingest"])])
        # the metrics that are there when the model is logged become the model's, too
        _send_metrics(client, run_id, card["metrics"])
        with tempfile.TemporaryDirectory(prefix="tagmill-") as folder:
            _send_files(client, run_id, Path(folder), run, cfg, counts, manifests["evaluate"])
        client.log_table(run_id, _largest(counts), "largest_labels.json")
        _send_model(client, run_id, run, cfg)
        _send_metrics(
            client, run_id, {f"seconds/{name}": m["seconds"] for name, m in manifests.items() if "seconds" in m}
        )
    except BaseException:
        with contextlib.suppress(Exception):
            client.set_terminated(run_id, "FAILED")
        raise
    client.set_terminated(run_id, "FINISHED")
    return run_id


def _note(manifests, labels):
    lines = [f"- {name}: {m['summary']}" for name, m in manifests.items() if m.get("summary")]
    listed = (
        f"the {TABLE_LABELS:,} labels with the largest support, of {labels:,}"
        if labels > TABLE_LABELS
        else "every label"
    )
    files = (
        f"Under Artifacts: `report.html`; `largest_labels.json` lists {listed}; `label_counts.parquet` and "
        "`thresholds.parquet` hold every label; `settings.json` holds every setting."
    )
    return "\n".join([*lines, "", files])


def _settings(cfg):
    """Settings that say what was computed: where Spark and MLflow run is left out."""
    return {key: value for key, value in flat(cfg).items() if not key.startswith(("spark.", "mlflow."))}


def _send_settings(client, run_id, cfg):
    from mlflow.entities import Param

    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in _settings(cfg).items()}
    params = [Param(key, text if len(text) <= PARAM_CHARACTERS else "see settings.json") for key, text in texts.items()]
    for start in range(0, len(params), PARAMS_AT_ONCE):
        client.log_batch(run_id, params=params[start : start + PARAMS_AT_ONCE])


def _send_metrics(client, run_id, metrics):
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    finite = {name: value for name, value in metrics.items() if value is not None and math.isfinite(value)}
    client.log_batch(run_id, metrics=[Metric(name, value, now, 0) for name, value in finite.items()])


def _documents(run, ingest):
    """The input as MLflow's data set: where it is and what identifies it, none of its text."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    location = redacted(run.info["input"])
    identity = hashlib.sha256("".join(sorted(item["sha256"] for item in ingest["input"])).encode()).hexdigest()[:16]
    dataset = Dataset(
        name=shown(location.rstrip("/").rsplit("/", 1)[-1], 200),
        digest=identity,
        source_type="table" if location.startswith("table:") else "local",
        source=json.dumps({"uri": location}),
        profile=json.dumps({"documents": ingest["accepted"], "files": len(ingest["input"])}),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])


def _send_files(client, run_id, folder, run, cfg, counts, evaluated):
    from pipeline import figures

    for name in ("metrics.json", "report.html"):
        fetch(run.files(name, verify=True)[0], folder / name)
    pq.write_table(counts, folder / "label_counts.parquet", compression="zstd")
    pq.write_table(run.read("thresholds", verify=True), folder / "thresholds.parquet", compression="zstd")
    (folder / "settings.json").write_text(json.dumps(_settings(cfg), indent=1, sort_keys=True), encoding="utf-8")
    drawn = folder / "figures"
    drawn.mkdir()
    (drawn / "f1_by_support.png").write_bytes(figures.label_scatter(counts))
    (drawn / "reliability.png").write_bytes(figures.reliability(evaluated["reliability"]))
    (drawn / "labels_by_support.png").write_bytes(figures.support_curve(counts))
    client.log_artifacts(run_id, str(folder))


def _largest(counts):
    """The labels with the largest support, as the frame that the page shows as a table."""
    columns = [
        "label",
        "support",
        "f1",
        "precision",
        "recall",
        "tp",
        "fp",
        "fn",
        "threshold",
        "train_support",
        "status",
    ]
    order = [("support", "descending"), ("train_support", "descending"), ("label_id", "ascending")]
    return counts.sort_by(order).select(columns).slice(0, TABLE_LABELS).to_pandas().round(4)


def _send_model(client, run_id, run, cfg):
    import mlflow
    import pandas as pd
    from mlflow.models import Model

    from pipeline import serving

    sender = client.get_run(run_id)
    with tempfile.TemporaryDirectory(prefix="tagmill-") as folder:
        bundle = _bundle(Path(folder), run, cfg)
        # made here: without an active run, `Model.log` would put it into the default experiment
        model = client.create_logged_model(
            sender.info.experiment_id,
            name=MODEL,
            source_run_id=run_id,
            params=sender.data.params,
            tags={FINGERPRINT: sender.data.tags[FINGERPRINT], SHA256: digest(bundle / "tagger.json")},
        )
        Model.log(
            artifact_path=None,
            model_id=model.model_id,
            flavor=mlflow.pyfunc,
            run_id=run_id,
            python_model=serving.__file__,
            artifacts={MODEL: str(bundle)},
            code_paths=[str(Path(serving.__file__).parent)],
            signature=serving.signature(cfg.tag.max_tags),
            input_example=pd.DataFrame({"text": EXAMPLES}),
            pip_requirements=[f"{name}=={importlib.metadata.version(name)}" for name in REQUIREMENTS],
        )


def _bundle(folder, run, cfg):
    """The run's tagger as the folder that `Tagger.load` reads."""
    from pipeline.learners.tagger import save
    from pipeline.stages.parts import decision_of, rules_of

    bundle = folder / MODEL
    bundle.mkdir()
    tables = (run.read(name, verify=True) for name in ("vocabulary", "labels", "thresholds"))
    settings = {"ngrams": cfg.featurize.ngrams, "sublinear": cfg.featurize.sublinear, "max_tags": cfg.tag.max_tags}
    identity = {"run": run.root.name, "fingerprint": run.finished("evaluate")["fingerprint"]}
    rules, document = rules_of(run, verify=True), decision_of(run, verify=True)
    save(bundle, *tables, run.files("weights", verify=True), settings | identity, rules, document)
    return bundle


def _version(client, run_id, run, cfg):
    """The version of the registered model that holds this run's model; made where there is none."""
    from mlflow.exceptions import MlflowException

    for version in client.search_model_versions(f"run_id='{run_id}'"):
        if version.name == cfg.model:
            return version
    try:
        client.create_registered_model(cfg.model, description="Tags documents with many labels; fitted by Tagmill.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    [model_id] = _model_ids(client.get_run(run_id))
    model = client.get_logged_model(model_id)
    version = client.create_model_version(
        cfg.model,
        f"models:/{model_id}",
        run_id,
        tags={name: model.tags[name] for name in (FINGERPRINT, SHA256)} | {"tagmill.run": shown(run.root, 1000)},
        description=run.finished("evaluate").get("summary", ""),
        await_creation_for=cfg.timeout,
        model_id=model_id,
    )
    # what links the version to the run's page
    link = json.dumps([{"name": version.name, "version": version.version}])
    client.set_logged_model_tags(model_id, {"mlflow.modelVersions": link})
    return version


# -- fetching ----------------------------------------------------------------------------------------------------------


def fetch_model(uri: str, cfg: MlflowConfig, into: Path) -> tuple[Path, dict]:
    """Download the data of a model into the folder `into`, which is emptied; the model's code is not even fetched.

    Args:
        uri: models:/name/1, models:/name@alias, models:/m-<id>, runs:/<run id> or runs:/<run id>/tagger.

    Returns the folder for `Tagger.load` and {"model_uri": without alias, "version": None where it is not registered,
    "sha256": of tagger.json}.  Raises InputError where there is no such model, DataError where it is not what was sent.
    """
    form = re.fullmatch(
        r"models:/(?P<id>m-[0-9a-f]+)|models:/(?P<name>[^/@]+)(?:/(?P<version>\d+)|@(?P<alias>[^/@]+))|runs:/(?P<run>\w+)(?:/tagger)?",
        uri,
    )
    if form is None:
        raise InputError(
            f"{shown(redacted(uri))} names no model; "
            "expected models:/name/1, models:/name@alias, models:/m-<id> or runs:/<run id>"
        )
    with _connected(cfg, make=False) as client:
        import mlflow

        canonical, version, location, mark = _resolve(client, form, shown(uri), cfg)
        shutil.rmtree(into, ignore_errors=True)
        into.mkdir(parents=True)
        folder = Path(
            mlflow.artifacts.download_artifacts(f"{location.rstrip('/')}/artifacts/{MODEL}", dst_path=str(into))
        )
    card = folder / "tagger.json"
    if not card.is_file():
        raise InputError(
            f"{shown(uri)}: not a model of Tagmill, it holds no artifacts/{MODEL}/tagger.json; choose another"
        )
    found = digest(card)
    if mark not in (None, found):
        raise DataError(
            f"{shown(uri)}: tagger.json has SHA-256 {found[:12]}…, {mark[:12]}… when it was sent; do not use it"
        )
    return folder, {"model_uri": canonical, "version": version, "sha256": found}


def _resolve(client, form, uri, cfg):
    """Canonical URI, version, where the files lie, and the SHA-256 of tagger.json as registered."""
    from mlflow.exceptions import MlflowException

    try:
        if form["name"]:
            name = form["name"]
            if form["alias"]:
                version = client.get_model_version_by_alias(name, form["alias"])
            else:
                version = client.get_model_version(name, form["version"])
            location = client.get_model_version_download_uri(name, version.version)
            return f"models:/{name}/{version.version}", str(version.version), location, version.tags.get(SHA256)
        model_id = form["id"] or next(iter(_model_ids(client.get_run(form["run"]))), None)
        if model_id is not None:
            model = client.get_logged_model(model_id)
            return f"models:/{model_id}", None, model.artifact_location, model.tags.get(SHA256)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND"):
            raise
    raise InputError(f"{uri}: no such model in {tracking_uri(cfg)}; {_what_exists(client, form['name'])}")


def _what_exists(client, name):
    versions = [version for version in client.search_model_versions() if version.name == name] if name else []
    if versions:
        listed = ", ".join(str(version.version) for version in versions[:5])
        aliases = client.get_registered_model(name).aliases.items()
        named = ", ".join(f"{alias} (version {version})" for alias, version in aliases) or "none"
        return f"versions of {shown(name)}: {listed}; aliases: {named}"
    names = ", ".join(shown(model.name) for model in client.search_registered_models(max_results=5))
    return f"registered: {names}" if names else "none is registered there: `tagmill register RUN` does it"

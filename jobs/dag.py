"""The flow under Airflow: `tagmill_fit` fits a tagger a date and promotes a better one, `tagmill_tag` tags with it.

Imports Airflow, what that is made of, and `pipeline.flow` alone, so a scheduler needs neither Spark nor MLflow nor
Tagmill's environment.  What runs is `spark-submit jobs/<stage>.py` with a list of arguments; no shell ever sees a
parameter.  Where things are is read from the environment of Airflow:

    TAGMILL_BIN             folder of python and spark-submit of Tagmill's environment (.venv/bin of the clone)
    TAGMILL_DOCUMENTS       default of the parameter input
    TAGMILL_RUNS            default of the parameter run
    TAGMILL_MASTER          default of the parameter master
    TAGMILL_FIT_SCHEDULE    cron expression or preset, or `documents`: whenever the asset of that name is updated
    TAGMILL_RETRY_SECONDS   wait before the first retry; it doubles from one to the next, up to an hour
"""

import contextlib
import difflib
import fcntl
import json
import logging
import os
import re
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path, PosixPath

from airflow.providers.apache.spark.operators.spark_submit import SparkSubmitOperator
from airflow.sdk import DAG, Asset, CronDataIntervalTimetable, Param, chain, task
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException
from upath import UPath  # Airflow's own object storage is made of it

ROOT = Path(os.path.abspath(__file__)).parents[1]
if str(ROOT) not in sys.path:  # Airflow puts the folder of this file there, not the one above it
    sys.path.append(str(ROOT))

from pipeline.flow import FIT, TAG, Stage  # noqa: E402

log = logging.getLogger("airflow.task.tagmill")  # below airflow.task, so that it is in the log of the task

BIN = Path(os.environ.get("TAGMILL_BIN") or ROOT / ".venv" / "bin")
CONNECTION = "tagmill_spark"
CHAMPION = "champion.json"  # in the folder of runs: which run is in use

# Exit codes of pipeline/errors.py, and of a driver that a signal has ended (negative: spark-submit itself).
AGAIN = {
    69: "a service is down",
    74: "I/O failed, or a disk is full",
    75: "locked by another run",
    130: "interrupted",
    143: "terminated",
    137: "killed, perhaps for its memory",
    -2: "interrupted",
    -15: "terminated",
    -9: "killed, perhaps for its memory",
}
FAILED = {
    1: "spark-submit or Python did not start",
    2: "wrong command line",
    65: "the data cannot be used",
    66: "the input is missing, empty or unreadable",
    70: "a bug of Tagmill",
    77: "no permission",
    78: "wrong setting, or a folder of another configuration",
}

RETRIES = 5
RETRY_DELAY = timedelta(seconds=float(os.environ.get("TAGMILL_RETRY_SECONDS") or 60))
TIMEOUT = {"train": timedelta(hours=24)}  # of one attempt; the next goes on where it stopped
OTHER_TIMEOUT = timedelta(hours=6)

DOCUMENTS = Asset(name="tagmill_documents", uri="tagmill://documents", group="tagmill")
MODEL = Asset(name="tagmill_model", uri="tagmill://model", group="tagmill")

# -- parameters --------------------------------------------------------------------------------------------------------

# Absolute, no control character, no step upwards.  ($ also matches before a last newline, hence what follows it.)
REST = r"/(?!(.*/)?\.\.(/|$))[^\x00-\x1f\x7f]*"
ABSOLUTE = rf"(file://)?{REST}"
# in abfs://container@account... the container comes first
BUCKET = r"((s3a?|gc?s|az)://|abfss?://([A-Za-z0-9-]+@)?)[A-Za-z0-9][A-Za-z0-9_.-]*"
ANYWHERE = rf"({ABSOLUTE}|{BUCKET}{REST})"
END = r"$(?![\s\S])"
LONGEST = 4096

BETTER_IF_LARGER = [
    "micro_f1", "macro_f1", "macro_f1_all", "weighted_f1", "samples_f1", "subset_accuracy", "jaccard_samples",
    "p_at_1", "p_at_3", "p_at_5", "ndcg_at_5", "psp_at_5", "lrap", "average_precision_macro", "average_precision_micro",
]  # fmt: skip


def _shared_params():
    return {
        "input": Param(
            os.environ.get("TAGMILL_DOCUMENTS") or "/data/tagmill/documents/{date}",
            type="string",
            pattern=rf"^({ANYWHERE}|table:[A-Za-z_][A-Za-z0-9_.]*){END}",
            maxLength=LONGEST,
            description="Documents: absolute path or URI (s3://, gs://, abfs://) of a file, folder or glob, or "
            "table:NAME. {date} is the run's date.",
        ),
        "run": Param(
            os.environ.get("TAGMILL_RUNS") or "/data/tagmill/runs",
            type="string",
            pattern=f"^{ANYWHERE}{END}",
            maxLength=LONGEST,
            description="Folder, by path or URI, that holds one run folder a date, and champion.json.",
        ),
        "config": Param(
            None,
            type=["null", "string"],
            pattern=f"^{ABSOLUTE}{END}",
            maxLength=LONGEST,
            description="YAML file with the settings that differ from the defaults.",
        ),
        "master": Param(
            os.environ.get("TAGMILL_MASTER") or "local[*]",
            type="string",
            pattern=rf"^(local(\[(\*|[1-9][0-9]{{0,2}})\])?|yarn|(spark|k8s)://[A-Za-z0-9_.,:/\[\]-]+){END}",
            maxLength=1000,
            description="Spark master; the driver runs on Airflow's worker.",
        ),
        "driver_memory": Param(
            "2g",
            type="string",
            pattern=rf"^[1-9][0-9]{{0,5}}[mg]{END}",
            description="Heap of the driver's JVM, which is there before the configuration is read.",
        ),
    }


FIT_PARAMS = {
    **_shared_params(),
    "metric": Param(
        "micro_f1", type="string", enum=BETTER_IF_LARGER, description="What the new run has to be better in."
    ),
    "margin": Param(0, type="number", minimum=0, maximum=1, description="By more than how much it has to be better."),
}
TAG_PARAMS = {
    **_shared_params(),
    "output": Param(
        None,
        type=["null", "string"],
        pattern=f"^{ANYWHERE}{END}",
        maxLength=LONGEST,
        description="Folder or URI that holds one folder of tags a date; empty: `tags` in the folder of runs.",
    ),
    "model": Param(
        None,
        type=["null", "string"],
        pattern=rf"^({ANYWHERE}|models:/[A-Za-z0-9][A-Za-z0-9_. -]*[/@][A-Za-z0-9][A-Za-z0-9_.-]*){END}",
        maxLength=LONGEST,
        description="Run folder, by path or URI, or registered model; empty: the champion in the folder of runs.",
    ),
}


def known(params: dict, expected: dict) -> dict:
    """`params`, if all are among `expected`.  Airflow checks values by their schema and lets unknown names pass."""
    for name in params:
        if name not in expected:
            near = difflib.get_close_matches(name, expected, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise AirflowFailException(f"parameter {name[:80]!r} is unknown, expected {', '.join(expected)}{hint}")
    return params


def date_of(moment: datetime) -> str:
    """The name of a run: the date in UTC, and where the day has not just begun, the time.

    >>> date_of(datetime(2026, 11, 23, tzinfo=UTC)), date_of(datetime(2026, 11, 23, 6, 30, tzinfo=UTC))
    ('2026-11-23', '2026-11-23T063000')
    """
    utc = moment.astimezone(UTC)
    form = "%Y-%m-%dT%H%M%S" + ("%f" if utc.microsecond else "")
    text = utc.strftime(form)
    return text.removesuffix("T000000")


DATE = re.compile(r"\d{4}-\d{2}-\d{2}(T\d{6}(\d{6})?)?")


def date_in(context: dict) -> str:
    """The date of a DAG run: of the latest model that triggered it, else of its data interval, else when it was to run.

    The clock is never asked: a retry, or the same run cleared, has the same date.
    """
    events = [event for some in dict(context.get("triggering_asset_events") or {}).values() for event in some]
    for event in sorted(events, key=lambda event: event.timestamp, reverse=True):  # they come in any order
        date = (event.extra or {}).get("date")
        if isinstance(date, str) and DATE.fullmatch(date):  # anybody who may update the asset may write here
            return date
    return date_of(context.get("data_interval_start") or context["dag_run"].run_after)


def run_folder(params: dict, date: str) -> str:
    return f"{params['run'].rstrip('/')}/{date}"


def arguments(task_id: str, params: dict, date: str) -> list[str]:
    """Command line of jobs/<stage>.py for a task; every value is a word of its own."""
    run = run_folder(params, date)
    config = ["--config", params["config"]] if params["config"] else []
    documents = ["--input", params["input"].replace("{date}", date)]
    if task_id == "tag":
        model = params["model"] or champion(params["run"])["run"]
        output = params["output"] or f"{params['run'].rstrip('/')}/tags"
        which = "--model" if model.startswith("models:") else "--run"
        return [which, model, *documents, "--output", f"{output.rstrip('/')}/{date}", *config]
    if task_id == "ingest":  # the later stages take the settings from the run, so that all of them have the same
        return ["--run", run, *documents, *config]
    if task_id == "register":  # the alias is for the better model; `promote` moves it
        return ["--run", run, "--set", 'mlflow.alias=""']
    if task_id == "promote":  # also a run that was the champion before
        return ["--run", run, "--set", "mlflow.move_alias=true"]
    return ["--run", run]


# -- the champion ------------------------------------------------------------------------------------------------------


def champion(runs: str) -> dict:
    """champion.json of the folder of runs: {"run": folder, "date": of it}.  Fails where no run was promoted yet."""
    path = _place(runs) / CHAMPION
    value = _read_json(path, f"no champion yet: run tagmill_fit first, or give the parameter model ({path})")
    if not isinstance(value, dict) or not isinstance(value.get("run"), str):
        raise AirflowFailException(f"{path}: expected an object with run; write it anew or remove it")
    return value


def verdict(runs: str, run: str, metric: str, margin: float) -> tuple[bool, str]:
    """Whether `run` is better than the champion of the folder `runs`, and the reason in one sentence.

    Better is: `metric` of its metrics.json is larger by more than `margin`; there is no champion; or it is the champion
    already, so that promoting again changes nothing.
    """
    new = _metric(run, metric)
    if not (_place(runs) / CHAMPION).exists():
        return True, f"{metric} {new:.4f}, and no champion yet"
    old_run = champion(runs)["run"]
    if _place(old_run) == _place(run):
        return True, f"{run} is the champion"
    old = _metric(old_run, metric)
    better = new > old + margin
    sign = ">" if better else "<="
    return better, f"{metric} {new:.4f} {sign} {old:.4f} of {old_run}" + (f" + {margin}" if margin else "")


@contextlib.contextmanager
def deciding(runs: str):
    """Hold the lock of the champion: of two runs that end at once, the second is compared with the first.

    In an object store there is no such lock; that Airflow runs one `promote` at a time has to do.
    """
    folder = _place(runs)
    if not isinstance(folder, PosixPath):
        yield
        return
    descriptor = os.open(folder / ".champion.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o640)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def crown(runs: str, run: str, date: str) -> None:
    """Write champion.json: old or new, never between."""
    folder, content = _place(runs), json.dumps({"run": run, "date": date})
    if not isinstance(folder, PosixPath):
        (folder / CHAMPION).write_text(content)  # an object is put as a whole
        return
    with tempfile.NamedTemporaryFile("w", dir=folder, prefix=f".{CHAMPION}.", delete=False) as part:
        try:
            part.write(content)
            part.flush()
            os.fchmod(part.fileno(), 0o640)
            os.fsync(part.fileno())
            os.replace(part.name, folder / CHAMPION)
        except BaseException:
            Path(part.name).unlink(missing_ok=True)
            raise


def _place(path: str):
    """A folder of runs: a Path, or for a URI a UPath, whose file system is to be installed beside Airflow."""
    if path.startswith(("/", "file://")):
        return Path(os.path.abspath(path.removeprefix("file://")))
    place = UPath(path, use_listings_cache=False)  # another process may just have written there
    try:
        place.fs  # noqa: B018  (s3fs and its kin are imported when they are first needed)
    except ImportError as error:
        raise AirflowFailException(f"{path}: {error}, in the environment of Airflow") from error
    return place


def _read_json(path, missing):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AirflowFailException(missing) from None
    except ValueError as error:
        raise AirflowFailException(f"{path}: not JSON ({error})") from error


def _metric(run, metric):
    path = _place(run) / "metrics.json"
    found = _read_json(path, f"{path} is missing: the run is not finished or gone; fit it again, or remove {CHAMPION}")
    value = found["metrics"].get(metric) if isinstance(found, dict) and isinstance(found.get("metrics"), dict) else None
    if not isinstance(value, int | float):
        raise AirflowFailException(f"{path}: {metric} is {value!r}; expected a number")
    return value


# -- tasks -------------------------------------------------------------------------------------------------------------


def error_line(text: str) -> str:
    """The one line in which a stage said what was wrong, out of all that spark-submit wrote.

    >>> error_line("noise\\ntagmill: /x: not a run folder\\nmore noise")
    '/x: not a run folder'
    """
    lines = [line.split("tagmill: ", 1)[1] for line in text.splitlines() if line.startswith("tagmill: ")]
    return lines[-1] if lines else ""


def failure(stage: str, error: BaseException) -> AirflowException:
    """What to raise for a failed spark-submit: a plain exception is retried by Airflow, AirflowFailException is not."""
    # first the command, where a parameter could pretend a code, then the code, then what was written last
    head, _, tail = str(error).partition("\nLast spark-submit output:\n")
    found = re.findall(r"Error code is: (-?\d+)", head)
    code = int(found[-1]) if found else None
    said = error_line(tail) or (
        "the log of the task has the rest" if found else f"{type(error).__name__}: {str(error)[:500]}"
    )
    if code in AGAIN:
        return AirflowException(f"{stage}: exit code {code} ({AGAIN[code]}): {said}")
    meaning = "spark-submit was not run" if code is None else f"exit code {code} ({FAILED.get(code, 'unknown')})"
    return AirflowFailException(f"{stage}: {meaning}, a retry would not help: {said}")


def tell(context: dict) -> None:
    """Callback of a task that failed or waits for its retry: the one line that says why."""
    log.error("tagmill: %s", str(context.get("exception")).split("\n")[0])


class StageOperator(SparkSubmitOperator):
    """`spark-submit jobs/<job>.py` on the worker, with the arguments of the task and a retry where the exit code asks.

    expected: the parameters of the DAG; others in a run's conf are refused.
    """

    template_fields = ()  # values of parameters are taken as they are, so they are no templates either

    def __init__(self, *, job: str, expected: dict, **kwargs):
        super().__init__(
            application=str(ROOT / "jobs" / f"{job}.py"),
            name=f"tagmill-{job}",
            conn_id=CONNECTION,
            spark_binary=str(BIN / "spark-submit"),
            deploy_mode="client",  # the exit code of the driver is that of spark-submit
            env_vars={
                "PYSPARK_PYTHON": str(BIN / "python"),
                "PYSPARK_DRIVER_PYTHON": str(BIN / "python"),
                "PYTHONPATH": str(ROOT),  # of this tree, whatever Airflow itself has there
            },
            **kwargs,
        )
        self.expected = sorted(expected)

    def execute(self, context):
        params = known(context["params"], self.expected)
        self.application_args = arguments(self.task_id, params, date_in(context))
        quiet = (ROOT / "pipeline" / "log4j2.properties").as_uri()
        # both have to be known before the JVM starts
        self.conf = {
            "spark.driver.memory": params["driver_memory"],
            "spark.driver.extraJavaOptions": f"-Dlog4j2.configurationFile={quiet} -XX:+UseSerialGC",
        }
        # the hook takes the master from a connection; this one is seen by the process of this task alone
        os.environ[f"AIRFLOW_CONN_{CONNECTION.upper()}"] = json.dumps({"conn_type": "spark", "host": params["master"]})
        try:
            super().execute(context)
        except (AirflowException, OSError) as error:
            raise failure(self.task_id, error) from None


class PromoteOperator(StageOperator):
    """Makes the run of this date the champion: the alias in MLflow, champion.json, and the event of the asset."""

    def execute(self, context):
        params, date = context["params"], date_in(context)
        run = run_folder(params, date)
        with deciding(params["run"]):
            better, reason = verdict(params["run"], run, params["metric"], params["margin"])
            if not better:
                raise AirflowSkipException(f"promote: another run was faster: {reason}")
            super().execute(context)
            crown(params["run"], run, date)
            log.info("promote: %s (%s)", run, reason)
        context["outlet_events"][MODEL].extra = {
            "run": run,
            "date": date,
            params["metric"]: _metric(run, params["metric"]),
        }


@task.short_circuit(
    task_id="gate", doc_md="Goes on if the new run is better than the champion; else the rest is skipped."
)
def gate(**context) -> bool:
    """Whether the run is to be promoted; the log has the figures."""
    params = context["params"]
    better, reason = verdict(params["run"], run_folder(params, date_in(context)), params["metric"], params["margin"])
    log.info("gate: %s: %s", "promoted" if better else "not promoted", reason)
    return better


TRIAGE = "\n".join(
    [
        "| exit code | meaning | what happens, what to do |",
        "|---|---|---|",
        *(
            f"| {code} | {meaning} | tried again, and goes on where it stopped |"
            for code, meaning in AGAIN.items()
            if code > 0
        ),
        "| 1 | spark-submit or Python did not start | fails: Java 17, `TAGMILL_BIN`, the log of the task |",
        "| 2 | wrong command line | fails: DAG and environment are of different versions |",
        "| 65 | the data cannot be used | fails: see `tagmill show RUN --table rejects` |",
        "| 66 | the input is missing, empty or unreadable | fails: clear the task when the documents are there |",
        "| 70 | a bug of Tagmill | fails: the line names the file with the traceback |",
        "| 77 | no permission | fails: owner of the folder of runs, user of the Airflow worker |",
        "| 78 | wrong setting, or a folder of another configuration | fails: the line names the setting; "
        "another configuration needs another parameter `run` |",
    ]
)

NOTES = """
Each task is one `spark-submit jobs/<stage>.py`; the last line of its log that begins with `tagmill:` says what is
wrong. A task can be cleared at any time: what is finished and current is skipped, a killed `train` solves only the
blocks that are missing, and two writers of one run folder exclude each other (exit code 75).
Look at a run with `tagmill show RUN`, at two with `tagmill compare CHAMPION RUN`.

"""


def notes(stage: Stage) -> str:
    """Markdown for the page of a task."""
    reads = ", ".join(f"`{name}`" for name in stage.reads) or "the input"
    writes = ", ".join(f"`{name}`" for name in stage.writes) or "nothing in the run folder"
    return f"{stage.sentence[0].upper()}{stage.sentence[1:]}. Reads {reads}; writes {writes}.\n\n{TRIAGE}"


def stage_task(stage: Stage, expected: dict, **kwargs) -> StageOperator:
    return StageOperator(
        task_id=stage.name,
        job=stage.name,
        expected=expected,
        doc_md=notes(stage),
        execution_timeout=TIMEOUT.get(stage.name, OTHER_TIMEOUT),
        **kwargs,
    )


def fit_schedule() -> object:
    text = os.environ.get("TAGMILL_FIT_SCHEDULE") or "@daily"
    # with a data interval: the run at midnight is of the day that ends then, and a backfill knows its dates
    return [DOCUMENTS] if text == "documents" else CronDataIntervalTimetable(text, timezone="UTC")


COMMON = {
    "start_date": datetime(2026, 1, 1, tzinfo=UTC),
    "catchup": False,
    "max_active_runs": 1,  # each takes the cores and memory of the master; a backfill has its own limit
    "tags": ["tagmill"],
    "default_args": {
        "owner": "tagmill",
        "retries": RETRIES,
        "retry_delay": RETRY_DELAY,
        "retry_exponential_backoff": 2.0,
        "max_retry_delay": timedelta(hours=1),
        "on_failure_callback": tell,
        "on_retry_callback": tell,
    },
}

with DAG(
    "tagmill_fit",
    schedule=fit_schedule(),
    description="Fit a tagger and promote it if it is better",
    doc_md=f"# Fit\n{NOTES}{TRIAGE}",
    params=FIT_PARAMS,
    **COMMON,
) as fit_dag:
    tasks = {
        stage.name: stage_task(stage, FIT_PARAMS, inlets=[DOCUMENTS] if stage.name == "ingest" else None)
        for stage in FIT
    }
    # one after the other also where the tables would allow more: a run folder has one writer
    chain(*tasks.values())
    promote = PromoteOperator(
        task_id="promote",
        job="register",
        expected=FIT_PARAMS,
        outlets=[MODEL],
        max_active_tis_per_dag=1,
        execution_timeout=OTHER_TIMEOUT,
        doc_md="Moves the alias in MLflow, writes `champion.json`, updates the asset `tagmill_model`.\n\n" + TRIAGE,
    )
    chain(tasks[FIT[-1].name], gate(), promote)

with DAG(
    "tagmill_tag",
    schedule=[MODEL],
    description="Tag documents with the champion",
    doc_md=f"# Tag\n{NOTES}{TRIAGE}",
    params=TAG_PARAMS,
    **COMMON,
) as tag_dag:
    for stage in TAG:
        if stage not in FIT:  # jobs/tag.py reads the documents itself: its output appears whole or not at all
            stage_task(stage, TAG_PARAMS)

"""The DAGs without Spark: their tasks, what they hand to spark-submit, what they make of its exit codes."""

import json
import os
import re
import stat
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("airflow", reason="Airflow has an environment of its own: make airflow-test")

from airflow.sdk import Param
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException, ParamValidationError
from upath import UPath

from jobs import dag
from pipeline import errors
from pipeline.flow import FIT, TAG

ROOT = Path(dag.__file__).parents[1]
HOSTILE = "/x; touch pwned && $(touch pwned) `touch pwned` | {{ 7*7 }} 'a' \"b\" *"


# -- structure ---------------------------------------------------------------------------------------------------------


def test_one_task_a_stage_in_the_order_of_the_flow():
    expected = [*(stage.name for stage in FIT), "gate", "promote"]
    assert [task.task_id for task in dag.fit_dag.topological_sort()] == expected
    for task_id, after in zip(expected, [*expected[1:], None], strict=True):
        assert dag.fit_dag.get_task(task_id).downstream_task_ids == ({after} if after else set())
    assert [task.task_id for task in dag.tag_dag.tasks] == [stage.name for stage in TAG if stage not in FIT] == ["tag"]


def stage_tasks():
    tasks = [*dag.fit_dag.tasks, *dag.tag_dag.tasks]
    return [task for task in tasks if isinstance(task, dag.StageOperator)]


def test_every_stage_runs_its_own_file_with_limits_and_notes():
    assert len(stage_tasks()) == len(FIT) + 2
    for task in stage_tasks():
        name = "register" if task.task_id == "promote" else task.task_id
        assert task.application == str(ROOT / "jobs" / f"{name}.py")
        assert Path(task.application).is_file()
        assert task.execution_timeout >= timedelta(hours=6)
        assert task.retries == 5
        assert task.retry_exponential_backoff == 2.0
        assert task.max_retry_delay == timedelta(hours=1)
        assert task.on_failure_callback and task.on_retry_callback
        assert all(f"| {code} |" in task.doc_md for code in {**dag.AGAIN, **dag.FAILED} if code > 0)
    for stage in FIT:
        notes = dag.fit_dag.get_task(stage.name).doc_md
        assert stage.sentence[1:] in notes and all(f"`{name}`" in notes for name in (*stage.reads, *stage.writes))


def test_assets_documents_in_model_out_and_the_model_triggers_tagging():
    assert dag.fit_dag.get_task("ingest").inlets == [dag.DOCUMENTS]
    assert {t.task_id: t.outlets for t in dag.fit_dag.tasks if t.outlets} == {"promote": [dag.MODEL]}
    assert list(dag.tag_dag.timetable.asset_condition.objects) == [dag.MODEL]


@pytest.mark.parametrize(("text", "kind"), [("", "CronData"), ("0 6 * * 1", "CronData"), ("documents", "Asset")])
def test_schedule_of_the_fit(monkeypatch, text, kind):
    monkeypatch.setenv("TAGMILL_FIT_SCHEDULE", text)
    schedule = dag.fit_schedule()
    assert schedule == [dag.DOCUMENTS] if kind == "Asset" else type(schedule).__name__.startswith(kind)


def test_airflow_finds_these_dags_and_nothing_else_in_the_folder():
    program = """
import json, sys
from airflow.dag_processing.dagbag import DagBag
bag = DagBag(sys.argv[1], safe_mode=False)
print(json.dumps([sorted(bag.dags), bag.import_errors, sorted(m for m in sys.modules if m.startswith("pipeline"))]))
"""
    dags, wrong, modules = json.loads(python(program, str(ROOT / "jobs")).splitlines()[-1])
    assert (dags, wrong, modules) == (["tagmill_fit", "tagmill_tag"], {}, ["pipeline", "pipeline.flow"])


def python(program, *arguments):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True, text=True, timeout=120, check=False, cwd="/", env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_scheduler_needs_neither_spark_nor_mlflow_nor_the_pipeline():
    program = f"""
import importlib.util, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top in ("pyspark", "numpy", "scipy", "numba", "pandas", "pyarrow", "mlflow", "jobs", "pydantic_yaml"):
            raise ImportError(name + " is refused")
        if top == "pipeline" and name not in ("pipeline", "pipeline.flow"):
            raise ImportError(name + " is refused")

sys.meta_path.insert(0, Refuse())
spec = importlib.util.spec_from_file_location("a_dag", {str(ROOT / "jobs" / "dag.py")!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(len(module.fit_dag.tasks), len(module.tag_dag.tasks))
"""
    assert python(program).split()[-2:] == [str(len(FIT) + 2), "1"]


# -- parameters --------------------------------------------------------------------------------------------------------

STORES = [f"{scheme}://b/a" for scheme in ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az")]
STORES.append("abfss://container@account.dfs.core.windows.net/a b/*.parquet")
GOOD = {
    "input": [
        "/data/a.jsonl",
        "/data/{date}/*.parquet",
        "file:///a",
        "table:db.documents",
        "/a..b/c..",
        "s3://b/{date}/*.jsonl",
        "gs://b/a",
        "abfs://b/a",
        HOSTILE,
    ],
    "run": ["/runs", "/", "file:///runs", "/a b/ü", "s3://b/runs"],
    "config": [None, "/conf/cluster.yaml"],
    "master": ["local", "local[*]", "local[2]", "spark://h1:7077,h2:7077", "yarn", "k8s://https://host:6443"],
    "driver_memory": ["900m", "2g"],
    "metric": ["micro_f1", "ndcg_at_5"],
    "margin": [0, 0.01],
    "output": [None, "/tags", "s3://b/tags"],
    "model": [None, "/runs/2026-11-23", "s3://b/runs/one", "models:/tagmill@champion", "models:/tagmill/3"],
}
PATHS = ["a", "../a", "/a/../b", "/..", "/a/..", "file:///a/../b", "/a\nb", "/a\n", "/a\0b", "-rf", "", 7]
URIS = ["s3://a", "s3:///a", "s3://a/../b", "s3://me:secret@a/b", "s3://a/b\n", "http://a/b", "s3://-a/b"]
BAD = {
    "input": [*PATHS, *URIS, "table:a;b", "table:", None, "/" + "a" * 5000, ["/a"]],
    "run": [*PATHS, *URIS, None],
    "config": [*PATHS, "s3://a/b"],
    "master": ["", "local[0]", "local[2]; x", "spark://", "http://h", "spark://h --conf x", "local[2]\n", None],
    "driver_memory": ["2", "0g", "2g -x", "2g\n", None],
    "metric": ["log_loss", "", None],
    "margin": [-0.1, 2, "0", None],
    "output": [*PATHS, *URIS],
    "model": [*PATHS, *URIS, "models:/../x", "models:/a", "models:/a@b;c", "runs:/x"],
}


@pytest.mark.parametrize("name", sorted(GOOD))
def test_parameters_are_checked_by_their_schema(name):
    param = {**dag.FIT_PARAMS, **dag.TAG_PARAMS}[name]
    for value in GOOD[name]:
        assert param.resolve(value) == value
    for value in BAD[name]:
        with pytest.raises(ParamValidationError):
            print(repr(param.resolve(value)), "was accepted")


def test_every_parameter_has_a_case_a_meaning_and_a_default_that_passes():
    assert set(GOOD) == set(BAD) == {*dag.FIT_PARAMS, *dag.TAG_PARAMS}
    for params in (dag.FIT_PARAMS, dag.TAG_PARAMS):
        for param in params.values():
            assert isinstance(param, Param) and param.description
            param.resolve()


def test_unknown_parameters_are_refused_with_the_nearest_name():
    assert dag.known({"run": "/r"}, dag.FIT_PARAMS) == {"run": "/r"}
    with pytest.raises(AirflowFailException, match=r"'inptu' is unknown.*did you mean input\?"):
        dag.known({"run": "/r", "inptu": "/x"}, dag.FIT_PARAMS)
    with pytest.raises(AirflowFailException, match="'__proto__' is unknown, expected input"):
        dag.known({"__proto__": 1}, dag.FIT_PARAMS)


# -- dates -------------------------------------------------------------------------------------------------------------


def event(day, **extra):
    return SimpleNamespace(extra=extra, timestamp=datetime(2026, 11, day, tzinfo=UTC))


def test_a_run_is_named_by_its_data_interval():
    assert dag.date_of(datetime(2026, 11, 23, tzinfo=UTC)) == "2026-11-23"
    assert dag.date_of(datetime(2026, 11, 23, 1, tzinfo=timezone(timedelta(hours=1)))) == "2026-11-23"
    moments = [datetime(2026, 11, 23, 6, 0, 0, micro, tzinfo=UTC) for micro in (0, 1, 100)]
    names = [dag.date_of(moment) for moment in moments]
    assert names == ["2026-11-23T060000", "2026-11-23T060000000001", "2026-11-23T060000000100"]
    assert all(dag.DATE.fullmatch(name) for name in names)

    start, later = datetime(2026, 11, 23, tzinfo=UTC), datetime(2026, 11, 25, 7, tzinfo=UTC)
    run = SimpleNamespace(run_after=later)
    assert dag.date_in({"data_interval_start": start, "dag_run": run}) == "2026-11-23"
    assert dag.date_in({"data_interval_start": None, "dag_run": run}) == "2026-11-25T070000"
    for days in ([20, 21], [21, 20]):
        events = {"asset": [event(day, date=f"2026-11-{day - 10}") for day in days]}
        assert dag.date_in({"triggering_asset_events": events, "data_interval_start": start}) == "2026-11-11"
    for hostile in ("../../etc", "2026-11-02/..", "2026-11-02\n", 7, None):
        context = {"triggering_asset_events": {"asset": [event(20, date=hostile)]}, "data_interval_start": start}
        assert dag.date_in(context) == "2026-11-23"


# -- what spark-submit is given, and what it answers -------------------------------------------------------------------

PARAMS = {name: param.resolve() for name, param in {**dag.TAG_PARAMS, **dag.FIT_PARAMS}.items()}


def test_arguments():
    params = {**PARAMS, "input": "/in/{date}.jsonl", "run": "/runs/", "config": "/c.yaml"}

    def of(task_id, **other):
        return dag.arguments(task_id, {**params, **other}, "2026-11-23")

    run = ["--run", "/runs/2026-11-23"]
    assert of("ingest") == [*run, "--input", "/in/2026-11-23.jsonl", "--config", "/c.yaml"]
    assert of("ingest", config=None) == [*run, "--input", "/in/2026-11-23.jsonl"]
    assert of("train") == run
    assert of("promote") == [*run, "--set", "mlflow.move_alias=true"]
    assert of("register") == [*run, "--set", 'mlflow.alias=""']
    documents = ["--input", "/in/2026-11-23.jsonl", "--output", "/runs/tags/2026-11-23", "--config", "/c.yaml"]
    assert of("tag", model="/runs/old") == ["--run", "/runs/old", *documents]
    assert of("tag", model="models:/tagmill@champion") == ["--model", "models:/tagmill@champion", *documents]
    assert "/elsewhere/2026-11-23" in of("tag", model="/r", output="/elsewhere")
    assert "s3://b/tags/2026-11-23" in of("tag", model="s3://b/one", output="s3://b/tags/")


@pytest.fixture
def submit(tmp_path, monkeypatch):
    """A spark-submit that notes its words and environment, says what it is told to say and exits as it is told."""
    binary = tmp_path / "spark-submit"
    binary.write_text(
        f"#!{sys.executable}\n"
        "import json, os, sys\n"
        f"json.dump([sys.argv[1:], dict(os.environ)], open({str(tmp_path / 'said.json')!r}, 'w'))\n"
        "print(os.environ.get('FAKE_SAYS', ''), file=sys.stderr)\n"
        "code = int(os.environ.get('FAKE_CODE', '0'))\n"
        "os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)\n"
    )
    binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    runs.mkdir()

    def call(task_id, code=0, says="", binary=binary, date=datetime(2026, 11, 23, tzinfo=UTC), **params):
        monkeypatch.setenv("FAKE_CODE", str(code))
        monkeypatch.setenv("FAKE_SAYS", says)
        original = (dag.tag_dag if task_id == "tag" else dag.fit_dag).get_task(task_id)
        expected = dag.TAG_PARAMS if task_id == "tag" else dag.FIT_PARAMS
        kind = dag.PromoteOperator if task_id == "promote" else dag.StageOperator
        job = Path(original.application).stem
        operator = kind(task_id=task_id, job=job, expected=expected)
        operator._spark_binary = str(binary)
        values = {**{name: PARAMS[name] for name in expected}, "run": str(runs), **params}
        accessor = SimpleNamespace(extra=None)
        operator.execute({"params": values, "data_interval_start": date, "outlet_events": {dag.MODEL: accessor}})
        words, environment = json.loads((tmp_path / "said.json").read_text())
        return SimpleNamespace(words=words, environment=environment, extra=accessor.extra)

    call.runs = runs
    return call


def test_values_are_words_and_neither_shell_nor_template_sees_them(submit, tmp_path):
    done = submit("ingest", input=HOSTILE, config="/c $(touch pwned).yaml", master="local[2]")
    at = done.words.index(str(ROOT / "jobs" / "ingest.py"))
    run = str(submit.runs / "2026-11-23")
    assert done.words[at + 1 :] == ["--run", run, "--input", HOSTILE, "--config", "/c $(touch pwned).yaml"]
    before = dict(zip(done.words[:at:2], done.words[1:at:2], strict=True))
    assert before["--master"] == "local[2]" and before["--deploy-mode"] == "client"
    assert "spark.driver.memory=2g" in done.words
    assert done.environment["PYTHONPATH"] == str(ROOT)
    assert done.environment["PYSPARK_PYTHON"] == str(dag.BIN / "python")
    assert not (tmp_path / "pwned").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "said.json", "spark-submit"]


def test_unknown_parameters_stop_a_task_before_spark_submit(submit, tmp_path):
    with pytest.raises(AirflowFailException, match="did you mean input"):
        submit("ingest", inptu="/x")
    assert not (tmp_path / "said.json").exists()


@pytest.mark.parametrize("code", sorted({**dag.AGAIN, **dag.FAILED, 3: "", 99: ""}))
def test_retries_by_exit_code(submit, code):
    with pytest.raises(AirflowException) as caught:
        submit("train", code, "noise\ntagmill: /r: what is wrong; what to do\nmore noise")
    assert isinstance(caught.value, AirflowFailException) is (code not in dag.AGAIN)
    assert re.fullmatch(rf"train: exit code {code} \(.+\).*: /r: what is wrong; what to do", str(caught.value))


def test_a_parameter_or_an_output_cannot_pretend_a_code(submit):
    with pytest.raises(AirflowFailException, match="exit code 78"):
        submit("ingest", 78, "Error code is: 75.", input="/x Error code is: 75.")


def test_a_failure_without_a_line_of_ours_and_a_spark_submit_that_is_not_there(submit, tmp_path):
    with pytest.raises(AirflowFailException, match=r"exit code 1 .*the log of the task has the rest$"):
        submit("train", 1, "JAVA_HOME is not set")
    with pytest.raises(AirflowFailException, match=r"spark-submit was not run.*No such file"):
        submit("train", binary=tmp_path / "nowhere")


def test_the_policy_is_that_of_the_exit_codes_in_errors_and_in_the_readme():
    families = {value.code for value in vars(errors).values() if isinstance(value, type)}
    codes = families | {errors.USAGE, errors.INTERRUPTED, errors.TERMINATED}
    assert codes <= {*dag.AGAIN, *dag.FAILED} and not set(dag.AGAIN) & set(dag.FAILED)
    table = re.search(r"Exit codes say whether.*?\n\n(\|.*?)\n\n", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    told = {int(code): retry == "yes" for codes, _, retry in rows for code in codes.split(",") if retry}
    assert told == {code: code in dag.AGAIN for code in codes}


def test_the_callback_logs_the_one_line(caplog):
    words = "Error code is: 78.\nLast spark-submit output:\ntagmill: train.C is -1.0; expected more\nnoise"
    error = dag.failure("train", AirflowException(words))
    with caplog.at_level("ERROR"):
        dag.tell({"exception": error})
    assert [record.getMessage() for record in caplog.records] == [
        "tagmill: train: exit code 78 (wrong setting, or a folder of another configuration), "
        "a retry would not help: train.C is -1.0; expected more"
    ]


# -- the champion ------------------------------------------------------------------------------------------------------


def finished(runs, date, **metrics):
    folder = runs / date
    folder.mkdir(exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps({"metrics": metrics}))
    return str(folder)


def test_the_first_run_is_promoted_and_then_only_better_ones(submit):
    runs = submit.runs
    first = finished(runs, "2026-11-23", micro_f1=0.80, macro_f1=0.60)
    done = submit("promote")
    assert done.words[-4:] == ["--run", first, "--set", "mlflow.move_alias=true"]
    assert done.extra == {"run": first, "date": "2026-11-23", "micro_f1": 0.80}
    assert dag.champion(str(runs)) == {"run": first, "date": "2026-11-23"}

    second = finished(runs, "2026-11-24", micro_f1=0.81, macro_f1=0.59)
    worse = finished(runs, "2026-11-22", micro_f1=0.80, macro_f1=0.60)
    for run, metric, margin, better in [
        (second, "micro_f1", 0, True), (second, "micro_f1", 0.02, False), (second, "macro_f1", 0, False),
        (worse, "micro_f1", 0, False), (first, "micro_f1", 0.5, True),
    ]:  # fmt: skip
        found, reason = dag.verdict(str(runs), run, metric, margin)
        assert found is better, reason
    assert dag.verdict(str(runs), worse, "micro_f1", 0)[1] == f"micro_f1 0.8000 <= 0.8000 of {first}"

    with pytest.raises(AirflowSkipException):
        submit("promote", date=datetime(2026, 11, 22, tzinfo=UTC))
    assert dag.champion(str(runs))["run"] == first
    submit("promote", date=datetime(2026, 11, 24, tzinfo=UTC))
    assert dag.champion(str(runs))["run"] == second
    assert submit("tag").words[-6:-4] == ["--run", second]
    assert stat.S_IMODE((runs / dag.CHAMPION).stat().st_mode) == 0o640


def test_nothing_is_promoted_where_register_fails(submit):
    finished(submit.runs, "2026-11-23", micro_f1=0.8)
    with pytest.raises(AirflowException, match="exit code 69") as caught:
        submit("promote", 69, "tagmill: MLflow does not answer")
    assert not isinstance(caught.value, AirflowFailException)
    assert sorted(path.name for path in submit.runs.iterdir()) == [".champion.lock", "2026-11-23"]


def test_of_two_that_are_promoted_at_once_the_better_one_stays(tmp_path):
    """Both gates said yes; whichever comes second is compared with the first."""
    runs = str(tmp_path)
    values = {f"2026-11-{day:02d}": day / 100 for day in range(1, 21)}
    for date, value in values.items():
        finished(tmp_path, date, micro_f1=value)

    def promote(date):
        with dag.deciding(runs):
            if dag.verdict(runs, f"{runs}/{date}", "micro_f1", 0)[0]:
                dag.crown(runs, f"{runs}/{date}", date)

    threads = [threading.Thread(target=promote, args=(date,)) for date in sorted(values, key=hash)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert dag.champion(runs)["date"] == "2026-11-20"


def test_a_folder_of_runs_in_an_object_store():
    root = UPath("memory://of-this-test/runs")
    root.mkdir(parents=True)
    runs = str(root)
    for day, value in ((23, 0.8), (24, 0.81), (25, 0.7)):
        folder = root / f"2026-11-{day}"
        folder.mkdir()
        (folder / "metrics.json").write_text(json.dumps({"metrics": {"micro_f1": value}}))
    outcomes = []
    for day in (23, 24, 25, 24):
        run = f"{runs}/2026-11-{day}"
        with dag.deciding(runs):
            outcomes.append(dag.verdict(runs, run, "micro_f1", 0))
            if outcomes[-1][0]:
                dag.crown(runs, run, f"2026-11-{day}")
    assert [better for better, _ in outcomes] == [True, True, False, True]
    assert outcomes[0][1].endswith("no champion yet") and outcomes[3][1].endswith("is the champion")
    assert dag.champion(runs) == {"run": f"{runs}/2026-11-24", "date": "2026-11-24"}


def test_a_store_whose_file_system_is_not_installed_fails_without_a_retry():
    with pytest.raises(AirflowFailException, match=r"abfs://b/runs: .*adlfs.* in the environment of Airflow"):
        dag.champion("abfs://b/runs")


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not JSON"), ("[]", "expected an object"), ('{"run": 7}', "expected an object")],
)
def test_a_champion_that_cannot_be_read(tmp_path, text, message):
    finished(tmp_path, "2026-11-23", micro_f1=0.5)
    (tmp_path / dag.CHAMPION).write_text(text)
    with pytest.raises(AirflowFailException, match=message):
        dag.verdict(str(tmp_path), str(tmp_path / "2026-11-23"), "micro_f1", 0)


def test_metrics_that_are_missing_or_undefined(tmp_path):
    with pytest.raises(AirflowFailException, match="no champion yet: run tagmill_fit first"):
        dag.champion(str(tmp_path))
    with pytest.raises(AirflowFailException, match=r"metrics\.json is missing"):
        dag.verdict(str(tmp_path), str(tmp_path / "2026-11-23"), "micro_f1", 0)
    finished(tmp_path, "2026-11-23", micro_f1=None)
    with pytest.raises(AirflowFailException, match="micro_f1 is None; expected a number"):
        dag.verdict(str(tmp_path), str(tmp_path / "2026-11-23"), "micro_f1", 0)

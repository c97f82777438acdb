import contextlib
import dataclasses
import importlib.metadata
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from py4j.java_gateway import GatewayClient
from py4j.protocol import ERROR, STRING_TYPE, Py4JError, Py4JNetworkError, get_return_value

from jobs import entry, inputs, status
from jobs.entry import Job, Terminated, code_version, guarded, stage_settings, translated
from pipeline import code, errors
from pipeline.config import Config, load
from pipeline.errors import (
    ConfigError,
    DataError,
    InputError,
    LockedError,
    PermissionError_,
    ServiceError,
    StorageError,
    TagmillError,
)
from pipeline.flow import FIT
from pipeline.stages import poison
from pipeline.store import FAILURE, Run, fingerprint

ROOT = Path(entry.__file__).parents[1]
STAGES = {stage.name: stage for stage in FIT}


@pytest.fixture(autouse=True)
def own_signals(tmp_path, monkeypatch):
    """Handlers and the folder of tracebacks as they were."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def raising(error):
    def command():
        raise error

    return command


def program(body, prelude="", **kwargs):
    """A command in a process of its own."""
    text = f"import os, signal, sys, time\nfrom jobs.entry import guarded\n{prelude}\ndef command():\n"
    text += "".join(f"    {line}\n" for line in body.splitlines()) + "raise SystemExit(guarded(command))\n"
    return subprocess.Popen(
        [sys.executable, "-c", text],
        # unbuffered output would hide what is written at the very end
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


# -- exit codes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "code"),
    [
        (DataError, 65),
        (InputError, 66),
        (ServiceError, 69),
        (TagmillError, 70),
        (StorageError, 74),
        (LockedError, 75),
        (PermissionError_, 77),
        (ConfigError, 78),
    ],
)
def test_every_family_ends_with_its_code_and_one_line(capsys, tmp_path, family, code):
    assert guarded(raising(family("here: this; expected that"))) == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", "tagmill: here: this; expected that\n")
    assert list(tmp_path.iterdir()) == []


def test_success_is_0_and_silent(capsys):
    assert guarded(lambda: "a value") == 0
    assert capsys.readouterr() == ("", "")


def test_the_systems_refusals_are_no_bugs(capsys, tmp_path):
    assert guarded(lambda: (tmp_path / "nothing").read_text()) == 66
    assert guarded(lambda: (tmp_path / "nothing" / "x").mkdir()) == 66
    assert guarded(raising(OSError(28, "No space left on device", "/x"))) == 74
    assert guarded(raising(PermissionError(13, "Permission denied", "/x"))) == 77
    assert "traceback" not in capsys.readouterr().err


def test_our_bug_is_70_with_one_line_and_the_traceback_in_a_file(capsys, tmp_path):
    assert guarded(raising(ZeroDivisionError("first\nsecond\x1b[31m"))) == 70
    err = capsys.readouterr().err
    (file,) = tmp_path.glob("*.traceback")
    assert err == (
        r"tagmill: unexpected ZeroDivisionError: first second\x1b[31m; "
        f"the traceback is in {file}, please report it\n"
    )
    assert "Traceback (most recent call last)" in file.read_text()
    assert "in command" in file.read_text()


def test_a_bug_without_a_message_names_its_kind(capsys):
    assert guarded(raising(AssertionError())) == 70
    assert "unexpected AssertionError: AssertionError; the traceback" in capsys.readouterr().err


def test_debug_adds_the_traceback(capsys):
    assert guarded(raising(DataError("what")), debug=True) == 65
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert err.endswith("\ntagmill: what\n")


@pytest.mark.parametrize(
    "data",
    ["a\nforged: line", "\x1b[31mred", "\x00\x07\x08", "\u202egnp.exe", "\r\n\t", "\u2028", "\x9b31m", "\ud800"],
)
def test_data_in_a_message_cannot_forge_a_line_or_steer_a_terminal(capsys, data):
    for error in (DataError(f"label {data} is odd"), RuntimeError(data), OSError(5, "x", data)):
        guarded(raising(error))
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert err.endswith("\n")
        assert err[:-1].isprintable()


def test_a_message_of_any_length_is_one_line_of_bounded_length(capsys):
    assert guarded(raising(DataError("x" * 10**6))) == 65
    assert len(capsys.readouterr().err) < 5000


def test_keyboard_interrupt_is_130(capsys):
    assert guarded(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "tagmill: interrupted; run the same command again to go on\n"


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 143), (signal.SIGINT, 130)], ids=lambda x: str(int(x))
)
def test_a_signal_runs_the_cleanup_and_ends_with_its_code(number, code):
    body = """
try:
    print("ready", flush=True)
    time.sleep(60)
finally:
    print("cleaned up")
"""
    process = program(body)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert out == "cleaned up\n"
    assert len(err.splitlines()) == 1
    assert "run the same command again to go on" in err


def test_what_a_command_began_ends_with_it():
    body = """
child = subprocess.Popen(["sleep", "60"])
print(child.pid, flush=True)
time.sleep(60)
"""
    process = program(body, "import subprocess")
    child = psutil.Process(int(process.stdout.readline()))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 143), (signal.SIGINT, 130)])
def test_a_signal_in_a_destructor_is_not_lost(number, code):
    prelude = f"""
class Slow:
    def __del__(self):
        os.kill(os.getpid(), {int(number)})
        for _ in range(1000): pass
"""
    process = program("Slow()\ntime.sleep(60)", prelude)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert err.count("\n") == 1
    assert "run the same command again to go on" in err


def test_nohup_is_respected():
    process = program(
        'os.kill(os.getpid(), signal.SIGHUP)\nprint("still here")', "signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    )
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "still here\n", "")


@pytest.mark.parametrize("body", ["for _ in range(100_000): print('a line')", "print('a line')", "pass"])
def test_a_reader_that_leaves_is_no_failure(body):
    process = program(f"sys.stdin.read()\n{body}", stdin=subprocess.PIPE)
    process.stdout.close()
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    with process.stderr:
        assert process.stderr.read() == ""


def test_a_broken_pipe_elsewhere_is_a_failure(capsys):
    """A worker or a JVM that died is no success, though Python calls it by the same name."""
    assert guarded(raising(BrokenPipeError(32, "Broken pipe"))) == 74
    process = program("raise BrokenPipeError(32, 'Broken pipe')")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 74
    assert "Broken pipe" in err


def test_a_stage_without_its_run_is_missing_input(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(entry, "logging_to_stderr", lambda debug: None)
    assert entry.stage_main("train", ["--run", str(tmp_path / "no\nrun")]) == 66
    assert capsys.readouterr().err == (
        f"tagmill: {tmp_path}/no run: not a run folder (it has no run.json); make one with `tagmill fit`\n"
    )
    with pytest.raises(SystemExit) as caught:
        entry.stage_main("train", ["--nonsense"])
    assert caught.value.code == errors.USAGE


# -- errors that come back from Spark as text --------------------------------------------------------------------------

SPARK = """An exception was thrown from the Python worker. Please see the stack trace below.
Traceback (most recent call last):
  File "/x/worker.py", line 2044, in main
    process()
{}

\tat org.apache.spark.api.python.BasePythonRunner$ReaderIterator.handlePythonException(PythonRunner.scala:581)
\tat java.base/java.lang.Thread.run(Thread.java:1583)
"""


@pytest.mark.parametrize(
    ("last", "family", "message"),
    [
        ("pipeline.errors.InputError: /x.csv: is gone; expected it", InputError, "/x.csv: is gone; expected it"),
        ("pipeline.errors.DataError: 3: 'a: b'", DataError, "3: 'a: b'"),
        ("pipeline.errors.PermissionError_: cannot read /x", PermissionError_, "cannot read /x"),
        (
            "OSError: [Errno 28] No space left on device: '/x/part'",
            StorageError,
            "cannot use /x/part: No space left on device; free some space and run the same command again",
        ),
        ("OSError: [Errno 28] No space left on device", StorageError, "cannot use a file: No space left on device; f"),
        (
            "OSError: [Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device: '/x/part'\n",
            StorageError,
            "cannot use /x/part: No space left on device; free some space",
        ),
        ("FileExistsError: [Errno 17] File exists: '/x' -> '/y'", StorageError, "cannot use /x: File exists"),
        ("OSError: [Errno 5] Input/output error: '/x'", StorageError, "cannot use /x: Input/output error"),
        ("PermissionError: [Errno 13] Permission denied: '/x y'", PermissionError_, "cannot use /x y: Permission"),
        ("FileNotFoundError: [Errno 2] No such file or directory: '/x'", InputError, "cannot use /x: No such file"),
        (
            "Caused by: java.io.IOException: No space left on device",
            StorageError,
            "No space left on device in Spark's folder for temporary files; free some space or set spark.local.dir",
        ),
    ],
)
def test_an_error_in_a_worker_keeps_its_family(last, family, message):
    known = translated(RuntimeError(SPARK.format(last)))
    assert type(known) is family
    assert str(known).startswith(message)
    assert "\n" not in str(known)


def test_a_jvm_that_dies_while_it_answers_is_a_service_that_is_gone():
    """Py4J has then no answer but the mark of an error, whatever else was raised before."""
    with pytest.raises(Py4JError) as lost:
        get_return_value(ERROR, None, "o227", "getResult")
    assert isinstance(translated(lost.value), ServiceError)
    with pytest.raises(Py4JError) as told:
        get_return_value(f"{ERROR}{STRING_TYPE}java.lang.NoSuchMethodError: x", None, "o1", "method")
    assert translated(told.value) is None


@pytest.mark.parametrize(
    "last",
    [
        "ValueError: x",
        "pipeline.errors.NoSuchError: x",
        "pipeline.errors.shown: x",  # a function
        "pipeline.errors.USAGE: x",
        "",
    ],
)
def test_what_is_not_known_is_not_translated(last):
    assert translated(RuntimeError(SPARK.format(last))) is None


def test_our_own_errors_stay_as_they_are():
    error = LockedError("x")
    assert translated(error) is error


@pytest.mark.parametrize(("kind", "code"), [(Terminated, 143), (KeyboardInterrupt, 130)])
def test_a_signal_is_told_where_a_library_raises_another_error_as_it_cleans_up(tmp_path, capsys, kind, code):
    run = Run(tmp_path / "run")
    run.prepare()

    def collect():
        try:
            raise kind
        finally:  # PySpark asks for the result of a job whose socket it has just left
            raise RuntimeError("Exception thrown in awaitResult")

    def command():
        with run.writing(), entry._failure_kept(run, "train"):
            try:
                collect()
            except RuntimeError as error:
                raise ValueError("in words of ours") from error

    assert guarded(command) == code
    assert capsys.readouterr().err.count("run the same command again to go on") == 1
    failure = json.loads((run.root / FAILURE).read_text())
    assert (failure["code"], failure["message"]) == (code, "stopped by a signal")


def test_a_signal_that_was_dealt_with_is_no_reason(capsys):
    def command():
        with contextlib.suppress(Terminated):
            raise Terminated
        raise DataError("of another kind")

    assert guarded(command) == 65


# -- log lines ---------------------------------------------------------------------------------------------------------


def test_data_cannot_forge_a_line_of_the_log():
    record = logging.LogRecord("tagmill", logging.INFO, "", 0, "train: %s", ("label\nforged \x1b[31m",), None)
    assert entry._OneLine("%(message)s").format(record) == r"train: label\nforged \x1b[31m"


@pytest.mark.parametrize("debug", [False, True])
def test_what_py4j_raises_it_does_not_log_too_but_for_debugging(monkeypatch, capsys, debug):
    monkeypatch.setattr(logging.root, "handlers", [])
    entry.logging_to_stderr(debug)
    with socket.create_server(("127.0.0.1", 0)) as jvm:
        threading.Thread(target=lambda: jvm.accept()[0].close(), daemon=True).start()  # it dies
        with contextlib.suppress(Py4JNetworkError):
            GatewayClient(port=jvm.getsockname()[1]).send_command("c\n", retry=False)
    assert ("Exception while sending command" in capsys.readouterr().err) is debug


# -- what decides a stage ----------------------------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path):
    run = Run(tmp_path / "run")
    run.prepare()
    return Job(run, Config())


FILES = [("/a", 3, "sha-a"), ("/b", 4, "sha-b"), ("/c", 4, "sha-b")]


def test_recipes_follow_the_content_of_the_files_and_not_their_order_or_names(job):
    recipes = job.recipes(FILES)
    assert recipes == job.recipes(FILES[::-1])
    assert recipes == job.recipes(iter([(f"/moved{name}", n, mark) for name, n, mark in FILES]))
    for other in (FILES[:2], [*FILES, FILES[0]], [("/a", 3, "sha-x"), *FILES[1:]], []):
        assert recipes != job.recipes(other)


def marks(job, files=FILES):
    return {name: fingerprint(recipe) for name, recipe in job.recipes(files).items()}


def test_another_document_changes_every_stage(job):
    before, after = marks(job), marks(job, [*FILES, ("/d", 1, "sha-d")])
    assert set(before) == set(STAGES)
    assert all(before[name] != after[name] for name in STAGES)


@pytest.mark.parametrize(
    ("item", "same"),
    [
        ("input.doc_id=id", []),
        ("split.seed=3", ["ingest"]),
        ("featurize.min_df=7", ["ingest", "split"]),
        ("train.C=3", ["ingest", "split", "featurize"]),
        ("calibrate.rule=fixed", ["ingest", "split", "featurize", "train"]),
        ("mlflow.alias=other", ["ingest", "split", "featurize", "train", "calibrate", "evaluate"]),
        ("spark.partitions=3", list(STAGES)),
        ("tag.max_tags=3", list(STAGES)),
    ],
)
def test_a_setting_changes_its_stage_and_all_that_build_on_it(job, item, same):
    before = marks(job)
    after = marks(Job(job.run, load(sets=[item])[0]))
    assert [name for name in STAGES if before[name] == after[name]] == same


def test_a_recipe_names_stage_settings_inputs_and_code(job):
    recipes = job.recipes(FILES)
    assert recipes["ingest"]["inputs"] == {"files": ["sha-a", "sha-b", "sha-b"]}
    assert recipes["calibrate"] == {
        "stage": "calibrate",
        "settings": stage_settings("calibrate", job.cfg),
        "inputs": {name: fingerprint(recipes[name]) for name in ("ingest", "train")},
        "code": code_version(),
    }


def test_convicted_documents_are_part_of_the_recipe_of_ingest(job):
    before = marks(job)
    mark = poison.mark_of((digest for _, _, digest in FILES), code_version())
    verdict = {"doc_id": "d7", "reason": "oom", "stage": "split", "what": "", "seconds": 1.0}
    poison.grown(job.run, mark, [verdict])
    after = job.recipes(FILES)
    assert after["ingest"]["quarantine"] == [["d7", "oom"]]
    assert all(before[name] != mark for name, mark in marks(job).items())
    poison.grown(job.run, mark, [{**verdict, "seconds": 2.0}])  # measured anew, the same result
    assert job.recipes(FILES) == after
    assert "quarantine" not in job.recipes(FILES[:1])["ingest"]  # a mended input begins without


def test_another_list_is_told_from_another_input(job):
    before, after = job.recipes(FILES)["ingest"], job.recipes(FILES[:1])["ingest"]
    assert entry._what_differs(before, after) == "other input"
    listed = {**before, "quarantine": [["d7", "oom"]]}
    assert entry._what_differs(listed, before) == "another quarantine.json"


class Stages:
    """Stands in for the stages of a fit: convicts what it is told to, and notes what ran on which list."""

    def __init__(self, job, convicts):
        self.job, self.convicts, self.ran = job, convicts, []

    def __call__(self, job, stage, recipe, plan, grow):
        self.ran.append((stage.name, [v[0] for v in recipe.get("quarantine", [])]))
        return [
            {"doc_id": d, "reason": "oom", "stage": stage.name, "what": ""} for d in self.convicts.pop(stage.name, ())
        ]


@pytest.fixture
def staged(tmp_path, toy, monkeypatch):
    """staged(convicts, only=...): names of the stages that ran, ingest with the list that it had."""

    def call(convicts, **arguments):
        stages = Stages(None, convicts)
        monkeypatch.setattr(entry, "run_stage", stages)
        entry.fit(str(tmp_path / "fitted"), str(toy), Config(), **arguments)
        return [name if name != "ingest" else ("ingest", *listed) for name, listed in stages.ran]

    return call


def test_a_conviction_begins_again_at_ingest_with_the_longer_list(staged):
    rest = ["train", "calibrate", "evaluate", "register"]
    assert staged({"split": ["a"], "featurize": ["c", "b"]}) == [
        ("ingest",), "split",
        ("ingest", "a"), "split", "featurize",
        ("ingest", "a", "b", "c"), "split", "featurize", *rest,
    ]  # fmt: skip


def test_a_stage_by_itself_begins_again_at_ingest_and_ends_with_itself(staged, tmp_path, toy):
    staged({}, only=("ingest",))
    run = Run(tmp_path / "fitted")
    recipe = Job(run, Config()).recipes(inputs.planned(str(toy), Config()).files)["ingest"]
    run.commit("ingest", run.attempt("ingest"), recipe, {}, {})
    assert staged({"featurize": ["a"]}, only=("featurize",)) == ["featurize", ("ingest", "a"), "split", "featurize"]
    assert run.manifest("ingest") is None


@pytest.fixture
def stopped(staged, tmp_path, toy, monkeypatch):
    """A run whose stage featurize began again at ingest, and was stopped before ingest was done."""
    staged({}, only=("ingest",))
    run = Run(tmp_path / "fitted")
    recipe = Job(run, Config()).recipes(inputs.planned(str(toy), Config()).files)["ingest"]
    run.commit("ingest", run.attempt("ingest"), recipe, {}, {})
    monkeypatch.setattr(poison, "grown", stop := Stopping(poison.grown))
    with pytest.raises(Terminated):
        staged({"featurize": ["a"]}, only=("featurize",))
    monkeypatch.setattr(poison, "grown", stop.function)
    return run


class Stopping:
    def __init__(self, function):
        self.function = function

    def __call__(self, *arguments):
        self.function(*arguments)
        raise Terminated


def test_a_stage_that_began_again_at_ingest_goes_on_there_when_it_was_stopped(staged, stopped):
    assert stopped.manifest("ingest") is None
    assert staged({}, only=("featurize",)) == [("ingest", "a"), "split", "featurize"]


def test_a_stage_that_began_again_does_not_take_in_another_input(staged, stopped, monkeypatch):
    other = inputs.planned(stopped.info["input"], Config())
    other = dataclasses.replace(other, files=(*other.files, ("more.jsonl", 1, "0" * 64)))
    monkeypatch.setattr(inputs, "planned", lambda *_: other)
    with pytest.raises(ConfigError, match="input or code are others now"):
        staged({}, only=("featurize",))


def test_documents_are_not_left_out_of_another_input_than_was_ingested(staged, tmp_path, toy, monkeypatch):
    staged({}, only=("ingest",))
    run = Run(tmp_path / "fitted")
    recipe = Job(run, Config()).recipes([("earlier.jsonl", 1, "0" * 64)])["ingest"]
    run.commit("ingest", run.attempt("ingest"), recipe, {}, {})
    with pytest.raises(ConfigError, match="not any more what was ingested"):
        staged({"featurize": ["a"]}, only=("featurize",))
    assert run.manifest("ingest") is not None
    assert not (run.root / poison.LIST).exists()


def test_convictions_without_end_end_the_run(staged, tmp_path, monkeypatch):
    monkeypatch.setattr(poison, "ROUNDS", 3)

    rounds = []

    class Endless(dict):
        def pop(self, stage, default):
            rounds.extend(["d7\n"] if stage == "split" else [])
            return rounds[-1:] if stage == "split" else default

    with pytest.raises(errors.DataError, match=r"3 times in a row, last d7\\n oom .*remove them from the input"):
        staged(Endless())
    assert len(rounds) == 3
    assert status.found(Run(tmp_path / "fitted"))["code"] == 65


def test_a_single_stage_builds_on_what_was_ingested(job):
    with pytest.raises(InputError, match="stage ingest is not finished"):
        job.recipes(None)
    recipes = job.recipes(FILES)
    job.run.commit("ingest", job.run.attempt("ingest"), recipes["ingest"], {}, {})
    assert job.recipes(None) == recipes


def test_settings_of_a_stage_are_its_own_without_limits():
    cfg = Config()
    mine = {"test", "dev", "seed", "near_duplicates"}
    assert set(stage_settings("split", cfg)) == {*(f"split.{name}" for name in mine), "train.folds", "train.dev"}
    assert not set(stage_settings("ingest", cfg)) & set(entry.LIMITS)
    assert set(stage_settings("register", cfg)) == {"mlflow.experiment", "mlflow.model", "mlflow.alias"}
    assert stage_settings("train", load(sets=["train.C=3"])[0])["train.C"] == 3.0


# -- version of the code -----------------------------------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of the library, and the version that it gives."""
    folder = tmp_path / "pipeline"
    source = Path(code.__file__).parent
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("__pycache__", "*.nb?"))
    monkeypatch.setattr(code, "__file__", str(folder / "code.py"))
    return folder, code_version.__wrapped__


def test_the_version_of_the_code_does_not_depend_on_its_place(copied, monkeypatch):
    _, version = copied
    there = version()
    monkeypatch.undo()
    assert there == version() == code_version()
    assert len(there) == 16


@pytest.mark.parametrize(
    "name", ["kernels/lockstep.py", "learners/ovr.py", "stages/train.py", "sources.py", "tables.py"]
)
def test_the_version_changes_with_a_module_that_computes(copied, name):
    folder, version = copied
    before = version()
    (folder / name).write_text((folder / name).read_text() + "\n")
    assert version() != before


def test_the_version_changes_with_new_lost_and_renamed_modules(copied):
    folder, version = copied
    seen = [version()]
    (folder / "kernels" / "zz.py").write_text("")
    seen.append(version())
    (folder / "kernels" / "zz.py").rename(folder / "kernels" / "zy.py")
    seen.append(version())
    (folder / "kernels" / "zy.py").rename(folder / "learners" / "zy.py")
    seen.append(version())
    assert len(set(seen)) == 4
    (folder / "learners" / "zy.py").unlink()
    assert version() == seen[0]


def test_the_version_ignores_what_computes_nothing(copied):
    folder, version = copied
    before = version()
    for name in ("report.py", "errors.py", "kernels/notes.txt"):
        (folder / name).write_text("# another text\n")
    assert version() == before


@pytest.mark.parametrize("package", ["numpy", "scipy", "numba", "llvmlite", "pyarrow"])
def test_the_version_changes_with_a_package_that_touches_numbers(monkeypatch, package):
    before = code_version()
    known = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.1" if name == package else known(name))
    assert code_version.__wrapped__() != before


# -- the Spark master --------------------------------------------------------------------------------------------------


def test_the_master_of_the_command_line_wins_over_the_environment(monkeypatch):
    monkeypatch.delenv("SPARK_MASTER_URL", raising=False)
    assert entry.master_setting(None) == []
    monkeypatch.setenv("SPARK_MASTER_URL", "spark://env:7077")
    for given, expected in ((None, "spark://env:7077"), ("local[2]", "local[2]"), ("local[*]", "local[*]")):
        assert load(sets=entry.master_setting(given))[0].spark.master == expected

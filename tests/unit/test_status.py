import fcntl
import json
import os
import threading
import time

import pytest

from jobs import entry
from jobs.cli import app
from jobs.status import found, status
from pipeline import errors
from pipeline.errors import InputError
from pipeline.flow import FIT
from pipeline.store import FAILURE, MANIFEST, Run, write_json

NAMES = [stage.name for stage in FIT]
BEFORE_TRAIN = NAMES[: NAMES.index("train")]


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "run")
    run.prepare()
    run.create({"config": {"mlflow": {"enabled": True}}, "input": "documents.parquet"})
    return run


def finish(run, *stages):
    for stage in stages:
        (run.root / stage).mkdir()
        facts = {"attempt": "a", "fingerprint": "f", "recipe": {}, "tables": {}, "seconds": 1.5, "summary": "well"}
        write_json(run.root / stage / MANIFEST, {"stage": stage, **facts})


def begin_training(run, blocks, done, failed=0):
    folder = run.root / "train" / "blocks-0123"
    folder.mkdir(parents=True)
    write_json(folder / "blocks.json", [[number] for number in range(blocks)])
    for number in range(done):
        statuses = {"trained": 3, **({"failed: memory": failed} if number == 0 and failed else {})}
        write_json(folder / f"block-{number:05d}.json", {"statuses": statuses})
    return folder


def fail(run, stage, code=65):
    write_json(run.root / FAILURE, {"stage": stage, "code": code, "message": "too few", "when": "now"})


def states(value):
    return [item["state"] for item in value["stages"]]


def test_a_complete_run(run):
    finish(run, *NAMES)
    value = found(run)
    assert (value["state"], value["code"], value["remaining"]) == ("complete", 0, [])
    assert states(value) == ["done"] * len(NAMES)
    assert value["stages"][0] == {"stage": "ingest", "state": "done", "seconds": 1.5, "summary": "well"}
    assert value["holder"] is value["failure"] is value["train"] is None


def test_a_run_is_complete_without_mlflow(run):
    finish(run, *NAMES[:-1])
    value = found(run)
    assert (value["state"], value["code"], value["remaining"]) == ("complete", 0, ["register"])
    run.create({"config": {"mlflow": {"enabled": False}}, "input": "documents.parquet"})
    assert states(found(run))[-1] == "off"
    assert found(run)["remaining"] == []


def test_a_run_that_nobody_works_on(run):
    value = found(run)
    assert (value["state"], value["code"], value["remaining"]) == ("unfinished", 1, NAMES)
    assert states(value) == ["waiting"] * len(NAMES)
    finish(run, *BEFORE_TRAIN)
    begin_training(run, 5, 2)
    value = found(run)
    assert (value["state"], value["code"]) == ("unfinished", 1)
    assert states(value)[3:5] == ["interrupted", "waiting"]
    assert value["train"] == {"blocks": 5, "done": 2, "failed_labels": 0, "seconds_left": None}


def test_a_run_at_work_names_the_holder_and_the_time_left(run):
    finish(run, *BEFORE_TRAIN)
    with run.writing():
        folder = begin_training(run, 10, 4, failed=2)
        begun = time.time() - 100
        for path in (run.root / ".lock", *(run.root / name / MANIFEST for name in BEFORE_TRAIN)):
            os.utime(path, (begun, begun))
        for number, age in enumerate((500, 400, 50, 10)):  # two of an earlier attempt
            os.utime(folder / f"block-{number:05d}.json", (time.time() - age,) * 2)
        value = found(run)
    assert (value["state"], value["code"]) == ("running", 75)
    assert f"process {os.getpid()} on " in value["holder"]
    assert states(value)[2:5] == ["done", "running", "waiting"]
    assert value["remaining"] == NAMES[3:]
    train = value["train"]
    assert (train["blocks"], train["done"], train["failed_labels"]) == (10, 4, 2)
    assert 295 < train["seconds_left"] < 320  # six left at two in a hundred seconds


def test_no_time_is_told_before_a_block_of_this_attempt(run):
    finish(run, *BEFORE_TRAIN)
    with run.writing():
        folder = begin_training(run, 10, 1)
        os.utime(folder / "block-00000.json", (1, 1))
        assert found(run)["train"]["seconds_left"] is None


def test_a_failure_gives_its_code(run):
    finish(run, *BEFORE_TRAIN)
    begin_training(run, 5, 1)
    fail(run, "train", 74)
    value = found(run)
    assert (value["state"], value["code"]) == ("failed", 74)
    assert value["failure"]["message"] == "too few"
    assert states(value)[3] == "failed"
    # one of a stage that is done since, or of a command that is at work again, is none
    with run.writing():
        assert (found(run)["state"], found(run)["failure"]) == ("running", None)
    finish(run, "calibrate", "evaluate", "register")
    write_json(run.root / "train" / MANIFEST, json.loads((run.root / "ingest" / MANIFEST).read_text()))
    assert found(run)["state"] == "complete"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"stage": 3}', "[" * 100_000])
def test_files_that_are_being_written_or_are_damaged_stop_nothing(run, text):
    finish(run, *BEFORE_TRAIN)
    folder = begin_training(run, 5, 1)
    (run.root / FAILURE).write_text(text)
    (folder / "block-00001.json").write_text(text)
    assert found(run)["state"] == "unfinished"
    (folder / "blocks.json").write_text(text)
    assert found(run)["train"]["blocks"] == 0 or text == '{"stage": 3}'


def test_a_fit_that_has_just_begun_and_a_folder_that_is_none(tmp_path):
    run = Run(tmp_path / "new")
    with pytest.raises(InputError):
        found(run)
    run.prepare()
    with run.writing():
        assert found(run)["code"] == 75


def test_looking_does_not_disturb_a_writer(run):
    """Whoever asks for the holder has the lock for a moment; a command that starts then waits for it."""
    with run.writing():
        pass
    asking = os.open(run.root / ".lock", os.O_RDONLY)
    fcntl.flock(asking, fcntl.LOCK_SH)
    threading.Timer(0.08, os.close, [asking]).start()
    with run.writing():
        assert str(os.getpid()) in run.holder()
    assert run.holder() is None


def test_what_ends_a_stage_is_kept_with_its_code(run):
    for error, code in (
        (errors.DataError("too few\ndocuments"), 65),
        (KeyboardInterrupt(), 130),
        (entry.Terminated(), 143),
        (ZeroDivisionError("oh"), 70),
        (OSError(28, "No space left on device"), 74),
    ):
        with pytest.raises(type(error)), entry._failure_kept(run, "ingest"):
            raise error
        value = json.loads((run.root / FAILURE).read_text())
        assert (value["stage"], value["code"]) == ("ingest", code)
        assert value["message"]
        assert "\n" not in value["message"]
    (run.root / FAILURE).unlink()
    with entry._failure_kept(run, "ingest"):
        pass
    assert not (run.root / FAILURE).exists()


def test_the_command_prints_and_ends_with_the_code(run, capsys):
    finish(run, *BEFORE_TRAIN)
    begin_training(run, 1200, 1)
    fail(run, "train")
    assert status(run, True) == 65
    assert json.loads(capsys.readouterr().out)["state"] == "failed"
    assert status(run, False) == 65
    out = capsys.readouterr().out
    assert f"{run.root}: failed" in out
    assert "1 of 1,200 blocks; too few" in out
    assert "again" in out
    assert "status" in {command.name or command.callback.__name__ for command in app.registered_commands}

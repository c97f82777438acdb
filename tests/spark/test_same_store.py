"""Driver and executors and the storage of a run; an executor that sees another folder is played in this process."""

import logging
import shutil
import socket
from types import SimpleNamespace

import pytest

from jobs import entry
from pipeline import config
from pipeline.errors import ConfigError, ServiceError
from pipeline.stages import same_store
from pipeline.stages.same_store import answer, check_same_store
from pipeline.store import PROBE, Run

HERE = socket.gethostname()


@pytest.fixture
def executors(monkeypatch):
    """A session whose tasks run here, one after the other, as `hosts` say: {name: function of the probe's folder}."""

    def session(hosts, before=lambda host: None):
        def run_tasks(spark, what, function, tasks):
            found = []
            for (folder, token, number), host in zip(tasks, [h for h in hosts for _ in range(2)], strict=True):
                before(host)
                done = function((hosts[host](folder), token, number))
                found.append((done[0], host, *done[2:]))
            return found

        monkeypatch.setattr(same_store, "run_tasks", run_tasks)
        monkeypatch.setattr(same_store, "LATE", 0.2)
        context = SimpleNamespace(defaultParallelism=len(hosts), master="spark://x:1")
        return SimpleNamespace(sparkContext=context)

    return session


def same(folder):
    return folder


def test_hosts_that_see_the_folder_are_told_and_nothing_stays(executors, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert check_same_store(executors({"b": same, "a": same}), tmp_path, 5) == ["a", "b"]
    assert caplog.messages == ["spark: the run folder is the same on 2 hosts"]
    assert list(tmp_path.iterdir()) == []


def test_a_host_that_has_no_such_folder(executors, tmp_path):
    spark = executors({"a": same, "c": lambda f: f"/nowhere{f}", "b": lambda f: f"/nowhere{f}"})
    with pytest.raises(ConfigError) as refused:
        check_same_store(spark, tmp_path, 5)
    text = str(refused.value)
    assert f"{tmp_path}: driver {HERE} and executors do not see the same storage: b, c cannot read" in text
    assert "No such file or directory" in text
    assert "\n" not in text
    assert refused.value.code == 78
    assert list(tmp_path.iterdir()) == []


def test_a_host_that_sees_another_content(executors, tmp_path):
    def other(folder):
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / "driver").write_text("of another run")
        return str(tmp_path / "other")

    with pytest.raises(ConfigError, match="storage: b sees another content; expected"):
        check_same_store(executors({"a": same, "b": other}), tmp_path, 5)


def test_an_answer_that_does_not_arrive(executors, tmp_path):
    """The executor has a copy of the folder, say one that is synchronised one way."""

    def copy(folder):
        target = tmp_path / "copy"
        shutil.copytree(folder, target, dirs_exist_ok=True)
        return str(target)

    with pytest.raises(ConfigError, match="storage: b wrote an answer that the driver does not see; expected"):
        check_same_store(executors({"a": same, "b": copy}), tmp_path, 5)


def test_an_executor_that_may_only_read(executors, tmp_path, monkeypatch):
    def refuse(path, content):
        if path.name.startswith("answer"):
            raise PermissionError(13, "Permission denied")
        path.write_bytes(content)

    monkeypatch.setattr(same_store, "write_bytes", refuse)
    with pytest.raises(ConfigError, match=r"storage: a cannot write there \(Permission denied\); expected"):
        check_same_store(executors({"a": same}), tmp_path, 5)


def test_an_executor_with_other_code(executors, tmp_path, monkeypatch):
    marks = iter(["old", "old", *["ours"] * 99])
    monkeypatch.setattr(same_store, "code_version", lambda: next(marks))
    with pytest.raises(ConfigError, match=f"driver {HERE} and executors run different .*: driver ours, b has old; "):
        check_same_store(executors({"b": same, "a": same}), tmp_path, 5)


def test_what_a_killed_driver_left_is_removed_and_is_no_reason_to_refuse_the_folder(executors, tmp_path):
    run = Run(tmp_path / "run")
    (run.root / f"{PROBE}0123abcd").mkdir(parents=True)
    run.prepare()
    check_same_store(executors({"a": same}), run.root, 5)
    assert list(run.root.iterdir()) == []


def test_spark_runs_it(spark, tmp_path):
    assert check_same_store(spark, tmp_path, 60) == [HERE]
    assert list(tmp_path.iterdir()) == []
    assert answer(("/nowhere", "token", 3))[:2] == (3, HERE)


def test_a_job_looks_before_its_first_stage_on_a_cluster_alone(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("pipeline.session.active", lambda: False)
    monkeypatch.setattr("pipeline.session.session", lambda cfg, app: SimpleNamespace(stop=lambda: None))
    monkeypatch.setattr(same_store, "check_same_store", lambda spark, root, wait: seen.append((root, wait)))
    for master in ("local[2]", "local-cluster[1,1,512]", "spark://h:1", "yarn", "k8s://https://h:1"):
        cfg, _ = config.load(sets=[f"spark.master={master}", "spark.wait=7"])
        job = entry.Job(Run(tmp_path), cfg)
        assert job.spark is job.spark
    assert seen == [(tmp_path, 7)] * 3


def test_no_executor_in_time(tmp_path):
    """A session that has the driver alone: the job is cancelled after spark.wait."""
    cancelled = []

    class Context:
        master, defaultParallelism = "spark://h:1", 1
        statusTracker = staticmethod(lambda: SimpleNamespace(getActiveJobsIds=lambda: [0]))
        _jsc = SimpleNamespace(
            sc=lambda: SimpleNamespace(getExecutorMemoryStatus=lambda: SimpleNamespace(size=lambda: 1))
        )

        def setJobDescription(self, what):
            pass

        def parallelize(self, items, parts):
            import time

            for _ in range(100):
                time.sleep(0.05)
                if cancelled:
                    raise RuntimeError("job was cancelled")
            raise AssertionError("never cancelled")

        def cancelAllJobs(self):
            cancelled.append(True)

    with pytest.raises(ServiceError, match=r"no executor of spark://h:1 within spark.wait = 0.2 s"):
        check_same_store(SimpleNamespace(sparkContext=Context()), tmp_path, 0.2)
    assert list(tmp_path.iterdir()) == []

"""A standalone cluster on loopback, its two workers apart like two hosts: the same bytes, the matrix once a worker."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pyspark
import pytest

from jobs import dist
from pipeline.session import java_home
from pipeline.store import Run
from tests.e2e.test_kill import BLOCK, corpus  # noqa: F401  (a fixture)
from tests.spark.test_fit import prints

TAGMILL = str(Path(sys.executable).parent / "tagmill")
SPARK_CLASS = str(Path(pyspark.__file__).parent / "bin" / "spark-class")
ROOT = Path(dist.__file__).parents[1]
DEPLOY = "org.apache.spark.deploy"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def standalone(root: Path, workers: int):
    """Address of a master with workers of one core each, which have temporary folders of their own, like hosts."""
    port, ui = free_port(), free_port()
    base = {
        **os.environ,
        "JAVA_HOME": java_home(),
        "SPARK_LOCAL_IP": "127.0.0.1",
        "PYSPARK_PYTHON": sys.executable,
        "SPARK_MASTER_OPTS": "-Dspark.master.rest.enabled=false",
    }
    processes = []

    def start(*words, **env):
        log = (root / f"{len(processes)}.log").open("wb")
        command = [SPARK_CLASS, *map(str, words)]
        processes.append(subprocess.Popen(command, env={**base, **env}, stdout=log, stderr=log, start_new_session=True))

    try:
        start(f"{DEPLOY}.master.Master", "--host", "127.0.0.1", "--port", port, "--webui-port", ui)
        for number in range(workers):
            folder = root / f"worker{number}"
            (folder / "tmp").mkdir(parents=True)
            # fmt: off
            start(
                f"{DEPLOY}.worker.Worker", "--host", "127.0.0.1", "--cores", 1, "--memory", "1g",
                "--webui-port", 0, "--work-dir", folder, f"spark://127.0.0.1:{port}",
                TMPDIR=str(folder / "tmp"), SPARK_LOCAL_DIRS=str(folder),
            )
            # fmt: on
        until = time.monotonic() + 120
        while alive(ui) < workers:
            assert time.monotonic() < until, (root / "0.log").read_text()[-2000:]
            assert all(process.poll() is None for process in processes)
            time.sleep(0.5)
        yield f"spark://127.0.0.1:{port}"
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with standalone(tmp_path_factory.mktemp("cluster"), 2) as master:
        yield master


def alive(ui) -> int:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{ui}/json/", timeout=5) as answer:
            return json.load(answer)["aliveworkers"]
    except OSError:
        return 0


def start(corpus, run, master, home, *more):  # noqa: F811
    sets = (
        "mlflow.enabled=false",
        f"train.labels_per_block={BLOCK}",
        "spark.options.spark.driver.host=127.0.0.1",
        "spark.options.spark.executor.memory=700m",
        *more,
    )
    command = [TAGMILL, "fit", "--input", corpus, "--run", run, "--master", master]
    return subprocess.Popen(
        [*command, *(word for item in sets for word in ("--set", item))],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TAGMILL_HOME": str(home), "SPARK_LOCAL_IP": "127.0.0.1"},
    )


def fit(*arguments):
    process = start(*arguments)
    _, said = process.communicate(timeout=500)
    assert process.returncode == 0, said
    return Run(arguments[1])


@pytest.fixture(scope="module")
def one_process(corpus, tmp_path_factory):  # noqa: F811
    root = tmp_path_factory.mktemp("one")
    return fit(corpus, root / "run", "local[2]", root / "home")


@pytest.mark.slow
def test_two_hosts_give_the_bytes_of_one_and_build_the_matrix_once_each(
    cluster,
    one_process,
    corpus,  # noqa: F811
    tmp_path,
):
    spread = fit(corpus, tmp_path / "spread", cluster, tmp_path / "home")
    facts = spread.manifest("train")
    assert len(facts["matrix_builds"]) == 2
    assert set(facts["matrix_builds"].values()) == {1}
    assert len({Path(folder).parents[1] for folder in facts["matrix_builds"]}) == 2
    assert not any(os.path.exists(folder) for folder in facts["matrix_builds"]), "left behind on a host"
    assert list(one_process.manifest("train")["matrix_builds"].values()) == [1]
    assert prints(spread) == prints(one_process)


@pytest.mark.slow
def test_a_killed_executor_changes_no_byte_and_is_told(cluster, one_process, corpus, tmp_path):  # noqa: F811
    process = start(corpus, tmp_path / "run", cluster, tmp_path / "home")
    while len(list((tmp_path / "run" / "train").glob("blocks-*/block-*.json"))) < 3:
        assert process.poll() is None, "finished before an executor could be killed"
        time.sleep(0.002)
    mine = tmp_path.parent  # the workers have their folders below it
    victim = next(p for p in psutil.process_iter() if "CoarseGrainedExecutorBackend" in _words(p) and below(p, mine))
    victim.kill()
    _, said = process.communicate(timeout=500)
    assert process.returncode == 0, said
    run = Run(tmp_path / "run")
    assert run.manifest("train")["tasks_repeated"] >= 1
    assert "begun again after a loss" in run.manifest("train")["summary"]
    assert prints(run) == prints(one_process)


def _words(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def below(process, folder):
    try:
        return Path(process.cwd()).is_relative_to(folder)
    except psutil.Error:
        return False


def make(what, folder, env=os.environ):
    """What `make cluster-up` and `make cluster-down` run, with the environment of the tests; its lines of output."""
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cluster", what, "--folder", folder],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=env,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def own_cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own") / "cluster"
    yield folder, make("up", folder)[0]
    make("down", folder)


@pytest.fixture(scope="module")
def local(toy, tmp_path_factory):
    """What one process makes of the toy corpus."""
    root = tmp_path_factory.mktemp("local")
    return fit(toy, root / "run", "local[2]", root / "home")


@pytest.mark.slow
def test_a_cluster_of_ones_own_gives_the_bytes_of_one_process(own_cluster, local, toy, tmp_path, monkeypatch):
    folder, master = own_cluster
    monkeypatch.setenv("SPARK_CONF_DIR", str(folder / "conf"))
    assert make("up", folder)[0] == master, "a second one was started"
    spread = fit(toy, tmp_path / "spread", master, tmp_path / "home")
    assert prints(spread) == prints(local)
    assert not list(spread.root.glob(".probe-*"))
    secret = (folder / "conf" / "spark-defaults.conf").read_text().split("secret ")[1].split()[0]
    written = [p for root in (folder, spread.root) for p in root.rglob("*") if p.is_file() and p.parent.name != "conf"]
    assert not any(secret.encode() in p.read_bytes() for p in written), "the secret was written somewhere else"


@pytest.mark.slow
def test_speculation_changes_no_byte(own_cluster, local, toy, tmp_path, monkeypatch):
    """Nearly every task runs twice at once, and either may win."""
    folder, master = own_cluster
    monkeypatch.setenv("SPARK_CONF_DIR", str(folder / "conf"))
    twice = {
        "spark.speculation": "true",
        "spark.speculation.interval": "10ms",
        "spark.speculation.minTaskRuntime": "1ms",
        "spark.speculation.multiplier": "1.01",
        "spark.speculation.quantile": "0.01",
    }
    settings = [f"spark.options.{key}={json.dumps(value)}" for key, value in twice.items()]
    run = fit(toy, tmp_path / "run", master, tmp_path / "home", *settings)
    assert prints(run) == prints(local)


@pytest.mark.slow
def test_a_driver_without_the_secret_is_refused(own_cluster, toy, tmp_path):
    _, master = own_cluster
    command = [TAGMILL, "fit", "--input", str(toy), "--run", str(tmp_path / "run"), "--master", master]
    done = subprocess.run(
        [*command, "--set", "mlflow.enabled=false"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 69, done.stderr
    assert "SPARK_CONF_DIR" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_nothing_is_left_of_a_cluster_that_was_stopped(tmp_path):
    folder = tmp_path / "cluster"
    make("up", folder)
    pids = [item["pid"] for item in json.loads((folder / "cluster.json").read_text())["processes"]]
    assert make("down", folder) == ["stopped: master, worker1, worker2"]
    assert not [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
    assert make("down", folder) == [f"nothing runs in {folder}"]


@pytest.mark.slow
def test_executors_that_have_nothing_but_the_archive_give_the_same_bytes(local, toy, tmp_path, monkeypatch):
    _, archive = dist.build(tmp_path / "dist", dist.base_python())
    folder = tmp_path / "cluster"
    bare = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    try:
        master = make("up", folder, {**bare, "PATH": "/usr/bin:/bin"})[0]
        monkeypatch.setenv("SPARK_CONF_DIR", str(folder / "conf"))
        packed = (
            f"spark.options.spark.archives={archive}#environment",
            "spark.options.spark.pyspark.python=./environment/bin/python",
        )
        spread = fit(toy, tmp_path / "spread", master, tmp_path / "home", *packed)
        assert len(list(folder.glob("work*/app-*/*/environment/bin/python"))) == 2
    finally:
        make("down", folder)
    assert prints(spread) == prints(local)

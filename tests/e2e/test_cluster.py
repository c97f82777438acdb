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

import pyspark
import pytest

from pipeline.session import java_home
from pipeline.store import Run
from tests.e2e.test_kill import BLOCK, corpus  # noqa: F401  (a fixture)
from tests.spark.test_fit import prints

TAGMILL = str(Path(sys.executable).parent / "tagmill")
SPARK_CLASS = str(Path(pyspark.__file__).parent / "bin" / "spark-class")
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


def fit(corpus, run, master, home):  # noqa: F811
    sets = (
        "mlflow.enabled=false",
        f"train.labels_per_block={BLOCK}",
        "spark.options.spark.driver.host=127.0.0.1",
        "spark.options.spark.executor.memory=700m",
    )
    command = [TAGMILL, "fit", "--input", corpus, "--run", run, "--master", master]
    done = subprocess.run(
        [*command, *(word for item in sets for word in ("--set", item))],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env={**os.environ, "TAGMILL_HOME": str(home), "SPARK_LOCAL_IP": "127.0.0.1"},
    )
    assert done.returncode == 0, done.stderr
    return Run(run)


@pytest.mark.slow
def test_two_hosts_give_the_bytes_of_one_and_build_the_matrix_once_each(cluster, corpus, tmp_path):  # noqa: F811
    spread = fit(corpus, tmp_path / "spread", cluster, tmp_path / "home")
    facts = spread.manifest("train")
    assert len(facts["matrix_builds"]) == 2
    assert set(facts["matrix_builds"].values()) == {1}
    assert len({Path(folder).parents[1] for folder in facts["matrix_builds"]}) == 2
    assert not any(os.path.exists(folder) for folder in facts["matrix_builds"]), "left behind on a host"
    local = fit(corpus, tmp_path / "local", "local[2]", tmp_path / "home")
    assert list(local.manifest("train")["matrix_builds"].values()) == [1]
    assert prints(spread) == prints(local)

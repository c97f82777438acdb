"""A Spark standalone cluster on the loopback: `make cluster-up`, `make cluster-down`.

    python -m jobs.cluster up|down|status [--folder .cluster]

A master and its workers run from the installed pyspark.  The folder holds all of it:

    cluster.json               address and processes (pid and start time) of the running cluster
    conf/spark-defaults.conf   the secret and the settings of masters, workers and drivers, mode 600
    *.log, work*/              logs of the daemons; work folders of the workers with the logs of executors

Spark reads spark-defaults.conf from the folder SPARK_CONF_DIR: with that variable set, `tagmill --master URL` and
`spark-submit` know the secret without its being on a command line, where every user of the host could read it.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil

from jobs.entry import guarded, logging_to_stderr
from pipeline.errors import ConfigError, ServiceError, shown
from pipeline.host import alone
from pipeline.session import java_home
from pipeline.store import write_json

HOST = "127.0.0.1"
DEPLOY = "org.apache.spark.deploy"
STATE = "cluster.json"
START = 180.0  # seconds until all workers are registered
STOP = 20.0  # seconds between SIGTERM and SIGKILL


def up(folder: Path, workers: int = 2, cores: int = 1, memory: str = "1g", port: int = 0, ui_port: int = 0) -> dict:
    """Start a master and its workers, and wait until all are registered; a cluster that runs is left as it is.

    Args:
        folder: of the cluster, made where it is missing.
        cores, memory: of each worker; memory is that of the executors' JVM, Python workers take theirs beside it.
        port, ui_port: of the master; 0 takes free ones.

    Returns what `cluster.json` holds: master (address), ui (address), conf (folder), workers, processes.

    Raises ServiceError where it does not start; nothing is left running then.
    """
    folder = Path(os.path.abspath(folder))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with alone(folder / "lock"):
        state = running(folder)
        if state:
            return state
        down_locked(folder)  # what is left of a cluster that lost some of its processes
        return _started(folder, workers, cores, memory, port or free_port(), ui_port or free_port())


def down(folder: Path) -> list[str]:
    """Stop what `up` started, and nothing else; the names of the processes that ran.  Twice is as good as once."""
    folder = Path(os.path.abspath(folder))
    if not folder.is_dir():
        return []
    with alone(folder / "lock"):
        return down_locked(folder)


def running(folder: Path) -> dict | None:
    """What `cluster.json` holds, where all of its processes are alive; else None."""
    state = _state(folder)
    return state if state["processes"] and all(map(_process, state["processes"])) else None


def down_locked(folder: Path) -> list[str]:
    """`down` for whoever holds the lock of the folder."""
    found = [(item["name"], process) for item in _state(folder)["processes"] if (process := _process(item))]
    for _, process in reversed(found):  # workers first: they take their executors with them
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs([process for _, process in found], timeout=STOP)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # each leads a session of its own; executors are in it
    psutil.wait_procs(alive, timeout=STOP)
    for gone in (folder / STATE, folder / "conf" / "spark-defaults.conf"):  # the secret is of no use any more
        gone.unlink(missing_ok=True)
    return [name for name, _ in found]


def _started(folder, workers, cores, memory, port, ui_port):
    conf = folder / "conf"
    address, ui = f"spark://{HOST}:{port}", f"http://{HOST}:{ui_port}"
    for old in folder.glob("work[0-9]*"):
        shutil.rmtree(old, ignore_errors=True)
    _write_settings(conf, memory)
    env = {
        **os.environ,
        "JAVA_HOME": java_home(),
        "SPARK_CONF_DIR": str(conf),
        "SPARK_LOCAL_IP": HOST,  # all user interfaces listen here too
        "SPARK_DAEMON_MEMORY": "256m",
        "SPARK_DAEMON_JAVA_OPTS": "-XX:+UseSerialGC",
        "SPARK_MASTER_OPTS": "-Dspark.port.maxRetries=0",  # a taken port is an error, not another port
    }
    env.pop("SPARK_HOME", None)  # of another Spark; spark-class finds its own
    state: dict = {
        "master": address,
        "ui": ui,
        "conf": str(conf),
        "workers": workers,
        "cores": cores,
        "memory": memory,
        "processes": [],
    }

    def start(name, *words, **more):
        with (folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [spark_class(), *map(str, words)],
                env={**env, **more},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=folder,
            )
        state["processes"].append(
            {"name": name, "pid": process.pid, "created": psutil.Process(process.pid).create_time()}
        )
        write_json(folder / STATE, state)  # at once: whoever kills us here can still stop what runs

    try:
        start("master", f"{DEPLOY}.master.Master", "--host", HOST, "--port", port, "--webui-port", ui_port)
        for number in range(1, workers + 1):
            work = folder / f"work{number}"
            work.mkdir(mode=0o700)
            # fmt: off
            start(
                f"worker{number}", f"{DEPLOY}.worker.Worker", "--host", HOST, "--cores", cores, "--memory", memory,
                "--webui-port", 0, "--work-dir", work, address, SPARK_LOCAL_DIRS=str(work),
            )
            # fmt: on
        _wait(folder, state)
    except BaseException:
        down_locked(folder)
        raise
    return state


def _write_settings(conf, memory):
    """spark-defaults.conf with a new secret; nobody else can read it, not even for a moment."""
    conf.mkdir(mode=0o700, exist_ok=True)
    lines = {
        "spark.authenticate": "true",
        "spark.authenticate.secret": secrets.token_hex(32),
        "spark.master.rest.enabled": "false",  # takes jobs from anyone, secret or not
        "spark.master.ui.decommission.allow.mode": "DENY",
        "spark.ui.killEnabled": "false",
        "spark.driver.host": HOST,
        "spark.driver.bindAddress": HOST,
        "spark.executor.memory": memory,
    }
    path = conf / "spark-defaults.conf"
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.writelines(f"{key} {value}\n" for key, value in lines.items())


def _wait(folder, state):
    until = time.monotonic() + START
    while (alive := _registered(state["ui"])) < state["workers"]:
        dead = [item["name"] for item in state["processes"] if not _process(item)]
        if dead or time.monotonic() > until:
            log = folder / f"{dead[0] if dead else 'master'}.log"
            what = f"{dead[0]} ended" if dead else f"{alive} of {state['workers']} workers registered in {START:.0f} s"
            raise ServiceError(f"the cluster did not start: {what}: {_last_line(log)}; see {log}")
        time.sleep(0.3)


def _registered(ui):
    try:
        with urllib.request.urlopen(f"{ui}/json/", timeout=5) as answer:
            return int(json.load(answer)["aliveworkers"])
    except (OSError, ValueError, KeyError):
        return 0


def _last_line(log):
    """The last error of a daemon, or the last it said."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"ERROR|Exception|error", line)]
    return shown((errors or lines or ["it said nothing"])[-1], 300)


def _state(folder):
    try:
        state = json.loads((folder / STATE).read_text())
        return state if isinstance(state["processes"], list) else {"processes": []}
    except (OSError, ValueError, KeyError, TypeError):
        return {"processes": []}


def _process(item):
    """The process that was started, if it is alive; a later one with the same pid is not it."""
    try:
        process = psutil.Process(item["pid"])
        same = abs(process.create_time() - item["created"]) < 0.05 and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, KeyError, TypeError, ValueError):
        return None
    return process if same else None


def spark_class() -> str:
    """The script of the installed pyspark that starts its daemons."""
    spec = importlib.util.find_spec("pyspark")
    if spec is None or not spec.origin:
        raise ConfigError("pyspark is not installed here; run `make setup`")
    return str(Path(spec.origin).parent / "bin" / "spark-class")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def _told(state):
    return (
        f"{state['master']}\n"
        f"export SPARK_CONF_DIR={state['conf']}   # the secret; then: tagmill fit --master {state['master']} ..."
    )


def main(argv: list[str] | None = None) -> int:
    """The command line of `make cluster-up` and `make cluster-down`.  The address is the first line of the output."""
    parser = argparse.ArgumentParser(prog="python -m jobs.cluster", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("up", "down", "status"))
    parser.add_argument("--folder", default=".cluster", metavar="DIR", help="of state, secret and logs")
    parser.add_argument("--workers", type=int, default=2, help="how many (2)")
    parser.add_argument("--cores", type=int, default=1, help="of each worker (1)")
    parser.add_argument("--memory", default="1g", help="of the executor's JVM on each worker (1g)")
    parser.add_argument("--port", type=int, default=0, help="of the master (0: a free one)")
    parser.add_argument("--ui-port", type=int, default=0, help="of the master's web page (0: a free one)")
    parser.add_argument("--debug", action="store_true", help="traceback on failure")
    args = parser.parse_args(argv)
    logging_to_stderr(args.debug)
    folder = Path(os.path.abspath(args.folder))

    def command():
        if args.what == "down":
            stopped = down(folder)
            print(f"stopped: {', '.join(stopped)}" if stopped else f"nothing runs in {folder}")
            return
        state = running(folder)
        if state is None and args.what == "status":
            raise ServiceError(f"no cluster runs in {folder}; start one with `make cluster-up`")
        if state is not None:
            print(_told(state))
            print(f"it runs already: {state['workers']} workers, {state['ui']}", file=sys.stderr)
            return
        state = up(folder, args.workers, args.cores, args.memory, args.port, args.ui_port)
        print(_told(state))
        size = f"{state['workers']} workers, each with cores: {state['cores']}, memory: {state['memory']}"
        print(f"{size}; {state['ui']}", file=sys.stderr)

    return guarded(command, args.debug)


if __name__ == "__main__":
    raise SystemExit(main())

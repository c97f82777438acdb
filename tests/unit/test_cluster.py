import json
import os
import stat
import subprocess
import sys

import psutil
import pytest

from jobs import cluster
from pipeline.errors import ServiceError

DAEMON = """#!/bin/bash
# what spark-class would start: it registers nothing and waits
echo "$@" >> "$OUT/started"
[ -z "$BREAK" ] || { echo "ERROR Master: it broke"; exit 3; }
exec sleep 600
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder for a cluster whose daemons are stand-ins; everything that they start is gone afterwards."""
    script = tmp_path / "spark-class"
    script.write_text(DAEMON)
    script.chmod(0o755)
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(cluster, "spark_class", lambda: str(script))
    monkeypatch.setattr(cluster, "java_home", lambda: "/java")
    folder = tmp_path / "cluster"
    # a master and two workers a cluster, each of which has come as far as its line
    monkeypatch.setattr(cluster, "_registered", lambda ui: 0 if len(started(folder)) % 3 else 2)
    (tmp_path / "started").touch()
    yield folder
    cluster.down(folder)


def started(place):
    return (place.parent / "started").read_text().splitlines()


def test_a_second_up_finds_the_first(place):
    state = cluster.up(place)
    assert state["master"].startswith("spark://127.0.0.1:")
    assert [item["name"] for item in state["processes"]] == ["master", "worker1", "worker2"]
    assert cluster.up(place) == state
    assert cluster.running(place) == state
    assert len(started(place)) == 3
    assert sum(state["master"] in line for line in started(place)) == 2  # both workers know the master


def test_the_secret_is_in_one_private_file_and_on_no_command_line(place):
    cluster.up(place)
    path = place / "conf" / "spark-defaults.conf"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == stat.S_IMODE(place.stat().st_mode) == 0o700
    settings = dict(line.split(" ", 1) for line in path.read_text().splitlines())
    secret = settings["spark.authenticate.secret"]
    assert len(secret) == 64
    assert settings["spark.authenticate"] == "true"
    assert settings["spark.master.rest.enabled"] == "false"
    assert not any(secret in line for line in started(place))
    others = [p for p in place.rglob("*") if p.is_file() and p != path]
    assert not any(secret.encode() in p.read_bytes() for p in others)
    cluster.down(place)
    assert not path.exists()
    cluster.up(place)
    assert secret not in path.read_text()


def test_down_stops_what_up_started_twice_is_as_good_as_once(place):
    processes = [psutil.Process(item["pid"]) for item in cluster.up(place)["processes"]]
    assert cluster.down(place) == ["master", "worker1", "worker2"]
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)
    assert cluster.down(place) == []
    assert cluster.down(place.parent / "never") == []
    assert cluster.running(place) is None


def test_down_leaves_a_process_alone_that_has_the_number_of_one_of_ours(place):
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        place.mkdir()
        item = {"name": "master", "pid": other.pid, "created": psutil.Process(other.pid).create_time() - 10}
        mine = {"name": "worker1", "pid": os.getpid(), "created": 1.0}
        (place / cluster.STATE).write_text(json.dumps({"processes": [item, mine]}))
        assert cluster.running(place) is None
        assert cluster.down(place) == []
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_cluster_that_lost_a_worker_is_started_anew(place):
    first = cluster.up(place)
    lost = psutil.Process(first["processes"][1]["pid"])
    lost.kill()
    psutil.wait_procs([lost])
    assert cluster.running(place) is None
    second = cluster.up(place)
    assert len(started(place)) == 6
    pids = {item["pid"] for item in first["processes"]} & {item["pid"] for item in second["processes"]}
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids)


def test_what_does_not_start_says_why_and_leaves_nothing(place, monkeypatch):
    monkeypatch.setattr(cluster, "_registered", lambda ui: 0)
    monkeypatch.setenv("BREAK", "1")
    with pytest.raises(ServiceError, match=r"did not start: (master|worker\d) ended: ERROR Master: it broke; see /"):
        cluster.up(place)
    assert cluster.running(place) is None
    assert not (place / cluster.STATE).exists()


def test_workers_that_do_not_register_in_time(place, monkeypatch):
    monkeypatch.setattr(cluster, "_registered", lambda ui: 1)
    monkeypatch.setattr(cluster, "START", 0.5)
    with pytest.raises(ServiceError, match="1 of 2 workers registered"):
        cluster.up(place)
    assert cluster.running(place) is None


def test_the_command_prints_the_address_first(place, capsys):
    assert cluster.main(["status", "--folder", str(place)]) == ServiceError.code
    assert cluster.main(["up", "--folder", str(place), "--port", "7077"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "spark://127.0.0.1:7077"
    assert cluster.main(["up", "--folder", str(place)]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "spark://127.0.0.1:7077"
    assert "it runs already" in err
    assert cluster.main(["down", "--folder", str(place)]) == 0
    assert capsys.readouterr().out == "stopped: master, worker1, worker2\n"
    assert cluster.main(["down", "--folder", str(place)]) == 0
    assert "nothing runs" in capsys.readouterr().out


def test_a_damaged_state_is_no_cluster(place):
    place.mkdir()
    for text in ("", "[]", '{"processes": 3}', '{"processes": [{"pid": "x"}]}', '{"processes": [{}]}'):
        (place / cluster.STATE).write_text(text)
        assert cluster.running(place) is None
        assert cluster.down(place) == []

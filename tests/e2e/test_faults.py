"""Whole fits by the command: another environment, secrets around it, signals in its stages, full disks."""

import contextlib
import datetime
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from pipeline.store import MANIFEST
from tests.chaos import checker
from tests.chaos.__main__ import SETS, Fit, Local
from tests.site import patched

ROOT = Path(__file__).parents[2]
CANARY = "canary-7f3a9c51e2"
pytestmark = pytest.mark.timeout(1200)  # the first test waits for two fits


class Small(Local):
    sets = ("spark.driver_memory=1g",)


@pytest.fixture(scope="module")
def folder(memory, toy):
    """Where the fits of this file are; in memory where there is such a place."""
    folder = memory / "e2e-faults"
    folder.mkdir()
    shutil.copy(toy, folder / "documents.jsonl")
    return folder


@pytest.fixture(scope="module")
def golden(folder):
    """Prints of an undisturbed fit."""
    fit = Fit(folder, folder / "golden", Small())
    assert fit.process.wait(500) == 0, fit.said()
    return checker.prints(folder / "golden")


# -- another environment (D1, F11), secrets (H10), open ports (H11), the order of system calls (B5) --------------------


class Watch(threading.Thread):
    """Command lines and listening sockets of the processes of a fit, looked at again and again until it ends."""

    def __init__(self, fit):
        super().__init__(daemon=True)
        self.fit, self.listening, self.lines, self.looks = fit, set(), set(), 0
        self.start()

    def run(self):
        while self.fit.process.poll() is None:
            for process in self.fit.family():
                with contextlib.suppress(psutil.Error):
                    self.lines.add(" ".join(process.cmdline()))
                    for socket in process.net_connections(kind="inet"):
                        if socket.status == psutil.CONN_LISTEN:
                            self.listening.add(socket.laddr.ip)
            self.looks += 1
            time.sleep(0.2)


@pytest.fixture(scope="module")
def hostile(folder):
    """A fit in an environment in which nothing is as usual, and what was seen of it."""
    place = Small()
    place.environment = {
        **{"PYTHONHASHSEED": "4242", "LC_ALL": "C", "LANG": "C", "TZ": "Pacific/Kiritimati"},
        **patched(**{"pipeline.store": "tests.chaos.clock:untrusted"}),
        **dict.fromkeys(("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"), CANARY),
        **dict.fromkeys(("DATABASE_URL", "SOME_TOKEN"), f"https://me:{CANARY}@host/"),
    }
    log = folder / "calls.log"
    traced = "trace=fsync,?rename,?renameat,renameat2"
    place.prefix = ["strace", "-f", "--seccomp-bpf", "-y", "-s", "0", "-e", traced, "-e", "signal=none", "-o", str(log)]
    if shutil.which("strace") is None or subprocess.run([*place.prefix, "true"], check=False).returncode:
        place.prefix = ()
    place.sets = (*Small.sets, "mlflow.enabled=true", "spark.partitions=3")
    place.umask = 0
    fit = Fit(folder, folder / "hostile", place)
    watch = Watch(fit)
    code = fit.process.wait(560)
    watch.join()
    assert code == 0, fit.said()
    return fit, watch, log if place.prefix else None


@pytest.mark.slow
def test_clock_locale_zone_hash_seed_and_umask_change_no_byte(folder, golden, hostile):
    assert checker.prints(folder / "hostile") == golden
    since = re.search(r"since (\S+ \S+) UTC", (folder / "hostile" / ".lock").read_text())[1]
    off = datetime.datetime.fromisoformat(since) - datetime.datetime.now(datetime.UTC).replace(tzinfo=None)
    assert abs(off.days) > 390  # the clock was another one


@pytest.mark.slow
def test_secrets_of_the_environment_are_in_no_file_no_log_and_on_no_command_line(folder, hostile):
    fit, watch, _ = hostile
    assert any(path.suffix == ".db" for path in (folder / "home").rglob("*")), "MLflow has written nothing"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert [str(path) for path in files if CANARY.encode() in path.read_bytes()] == []
    assert CANARY not in fit.said()
    assert len(watch.lines) > 2
    assert not [line for line in watch.lines if CANARY in line]


@pytest.mark.slow
def test_nothing_of_a_fit_listens_beyond_the_loopback(hostile):
    _, watch, _ = hostile
    assert watch.looks > 5
    assert watch.listening, "not even Spark's own ports were seen"
    assert not [ip for ip in watch.listening if not ip.removeprefix("::ffff:").startswith("127.") and ip != "::1"]


@pytest.mark.slow
def test_every_published_file_is_on_disk_before_the_manifest_that_names_it(folder, hostile):
    if hostile[2] is None:
        pytest.skip("strace is not installed, or may not trace here")
    named, when = {}, {}  # path -> line of the log
    for number, line in enumerate(hostile[2].read_text(errors="replace").splitlines()):
        if match := re.search(r"fsync\(\d+<([^>]+)>", line):
            when.setdefault(match[1], number)
        elif match := re.search(r'rename\w*\((?:AT_FDCWD\S* )?"([^"]+)", (?:AT_FDCWD\S* )?"([^"]+)"', line):
            if match[1] in when:  # as a temporary file
                when[match[2]] = when[match[1]]
            if Path(match[2]).name == MANIFEST:
                named[match[2]] = number
    run = folder / "hostile"
    late, looked = [], 0
    for stage, manifest in checker.manifests(run).items():
        published = next(number for path, number in named.items() if path == str(run / stage / MANIFEST))
        for table in manifest["tables"]:
            for path in checker.files(run, manifest, table):
                looked += 1
                if when.get(str(path), published) >= published:
                    late.append(str(path))
    assert looked > 15
    assert late == []


# -- signals (A12) -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_signals_in_several_stages_leave_no_process_no_lock_and_no_other_byte(folder, golden):
    run = folder / "signals"
    for number, stage, code in (
        (signal.SIGTERM, None, 143),
        (signal.SIGINT, "ingest", 130),
        (signal.SIGHUP, "featurize", 143),
    ):
        fit = Fit(folder, run, Small())
        until = run / stage / MANIFEST if stage else run / "run.json"
        while not until.exists():
            assert fit.process.poll() is None, fit.said()
            time.sleep(0.005)
        fit.process.send_signal(number)
        sent = time.monotonic()
        assert fit.process.wait(60) == code, fit.said()
        assert fit.gone() == []
        assert time.monotonic() - sent < 30
        said = fit.said()
        assert "Traceback" not in said
        assert "run the same command again to go on" in said.splitlines()[-1]
        assert not (run / "evaluate" / MANIFEST).exists()
    last = Fit(folder, run, Small())  # the lock is free
    assert last.process.wait(500) == 0, last.said()
    assert checker.prints(run) == golden
    assert checker.leftovers(run) == []


# -- full disks (B1, B2) -----------------------------------------------------------------------------------------------

# in a mount namespace of its own: nothing is left mounted, whatever happens
FULL = """
mount -t tmpfs -o size=16m tmpfs "$1" && mount -t tmpfs -o size=16m tmpfs "$2" || exit 99
fill() { cat /dev/zero > "$1/ballast" 2> /dev/null; }
place="$1" scratch="$2"; shift 2
fill "$scratch"; "$@" 2> scratch.err; echo "scratch $?"; rm "$scratch/ballast"
fill "$place"; "$@" 2> place.err; echo "place $?"; rm "$place/ballast"
"$@" 2> free.err; echo "free $?"; ls -A "$scratch" | wc -l
"""


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("unshare"), reason="needs root, unshare and mount")
def test_a_full_disk_is_one_line_that_says_where_and_goes_on_when_there_is_room(folder, toy):
    top = folder / "full"
    place, scratch = top / "place", top / "scratch"
    for made in (place, scratch):
        made.mkdir(parents=True)
    words = [
        sys.executable,
        "-m",
        "jobs.ingest",
        "--run",
        str(place / "run"),
        "--input",
        str(toy),
        "--master",
        Small.master,
    ]
    options = (*SETS, "spark.driver_memory=1g", f"spark.options.spark.local.dir={scratch}")
    done = subprocess.run(
        [
            "unshare",
            "--mount",
            "sh",
            "-c",
            FULL,
            "sh",
            place,
            scratch,
            *words,
            *(x for s in options for x in ("--set", s)),
        ],
        capture_output=True,
        text=True,
        timeout=560,
        cwd=top,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TAGMILL_HOME": str(folder / "home")},
        check=False,
    )
    if done.returncode == 99 or "unshare:" in done.stderr:
        pytest.skip(f"no own mounts here: {done.stderr.strip()}")
    said = {name: (top / f"{name}.err").read_text() for name in ("scratch", "place", "free")}
    codes = dict(line.split() for line in done.stdout.splitlines() if " " in line)
    assert codes == {"scratch": "74", "place": "74", "free": "0"}, said
    for name, where in (("scratch", "spark.local.dir"), ("place", str(place / "run"))):
        [last] = [line for line in said[name].splitlines() if line.startswith("tagmill: ")]
        assert "No space left on device" in last
        assert where in last
        assert "Traceback" not in said[name]
        assert "\tat " not in said[name]  # of a Java trace

"""The lock of a run in an object store."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import jobs.entry
from pipeline import lease, storage
from pipeline.errors import LockedError, TagmillError
from pipeline.stages import evaluate
from pipeline.store import Run, entry

ROOT = Path(lease.__file__).parents[1]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, seconds in (("RENEW", 0.3), ("LEASE", 2.0), ("LOOK", 0.02)):
        monkeypatch.setattr(lease, name, seconds)


@pytest.fixture
def run(bucket):
    return Run(f"{bucket}/run")


def numbers(run):
    return sorted(path.name for path in (run.root / lease.FOLDER).iterdir())


def test_one_writer_at_a_time(run):
    assert run.holder() is None
    with run.writing():
        other = Run(run.root)
        assert other.holder() == run.lease.holder
        message = f"locked by process {os.getpid()} on .*; wait for it or stop it"
        with pytest.raises(LockedError, match=message), other.writing():
            pytest.fail("two writers")
        assert run.lease.number == 1
    assert run.holder() is None and run.lease is None and lease.latest(run.root).released
    with run.writing():  # at once: it was released
        assert run.lease.number == 2 and numbers(run) == ["000002.json"]


def test_of_many_that_come_at_once_one_gets_it(run):
    got, refused = [], []
    start, end = threading.Barrier(6), threading.Event()

    def come():
        start.wait()
        try:
            with Run(run.root).writing():
                got.append(1)
                end.wait(10)
        except LockedError:
            refused.append(1)

    crowd = [threading.Thread(target=come) for _ in range(6)]
    for thread in crowd:
        thread.start()
    until = time.monotonic() + 20
    while len(refused) < 5 and time.monotonic() < until:
        time.sleep(0.02)
    end.set()
    for thread in crowd:
        thread.join()
    assert (len(got), len(refused)) == (1, 5)


def test_the_lease_of_a_dead_process_is_taken_over(run, monkeypatch, caplog):
    dead = lease.Lease(run.root, 7, storage.Conditions(True, True))
    dead.path.write_bytes(dead.content())
    began = time.monotonic()
    assert run.holder() is None
    with run.writing():
        assert time.monotonic() - began >= lease.LEASE
        assert run.lease.number == 8
    assert "was not renewed" in caplog.text
    with pytest.raises(LockedError, match=r"lease 8, ours is 7"):
        dead.check()


@pytest.mark.parametrize("days", [-400, 400])
def test_no_wall_clock_decides(run, monkeypatch, days):
    with run.writing():
        now, jumps = time.time, itertools.cycle([86400 * days, 0])
        monkeypatch.setattr(time, "time", lambda: now() + next(jumps))
        time.sleep(3 * lease.RENEW)
        with pytest.raises(LockedError), Run(run.root).writing():
            pytest.fail("two writers")
        run.fenced()


def test_a_store_that_hangs_up_for_a_beat_is_asked_again(run, monkeypatch, caplog):
    write = storage.ObjectPath.write_bytes
    failed = []

    def sometimes(self, data):
        if lease.FOLDER in str(self) and len(failed) < 2:
            failed.append(1)
            raise TagmillError("hangs up")
        return write(self, data)

    with run.writing():
        monkeypatch.setattr(storage.ObjectPath, "write_bytes", sometimes)
        until = time.monotonic() + 30
        while run.lease.beat < 4 and time.monotonic() < until:
            time.sleep(0.02)
        run.fenced()
    assert caplog.text.count("not renewed: hangs up") == 2
    assert run.holder() is None


HOLDER = """
import sys, time
from pipeline import lease
from pipeline.errors import TagmillError
from pipeline.store import Run
lease.RENEW, lease.LEASE, lease.LOOK = 0.3, 2.0, 0.02
run = Run(sys.argv[1])
try:
    with run.writing():
        attempt = run.attempt("ingest")
        print("held", flush=True)
        sys.stdin.readline()
        run.commit("ingest", attempt, {"by": "the first"}, {}, {})
except TagmillError as error:
    print(error)
    sys.exit(error.code)
"""


def test_who_slept_longer_than_its_lease_publishes_nothing(run):
    """SIGSTOP, another process takes over, SIGCONT."""
    first = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run.root)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert first.stdout.readline() == "held\n"
        first.send_signal(signal.SIGSTOP)
        with run.writing():
            run.commit("ingest", run.attempt("ingest"), {"by": "the second"}, {}, {})
            assert run.finished("ingest")["lease"] == 2
            first.send_signal(signal.SIGCONT)
            out, _ = first.communicate("go\n", timeout=60)
            assert first.returncode == LockedError.code == 75
            assert "taken over by another process (lease 2, ours is 1)" in out
            assert run.finished("ingest")["recipe"] == {"by": "the second"}
            run.fenced()
    finally:
        first.kill()
        first.wait()


def test_who_lost_its_lease_writes_nothing_at_all(run):
    first = Run(run.root)
    with first.writing():
        taken = lease.Lease(run.root, 2, storage.Conditions(True, True))
        taken.path.write_bytes(taken.content())
        for write in (
            lambda: first.create({"config": {}, "input": "x"}),
            lambda: first.drop(["ingest"]),
            lambda: first.commit("ingest", first.root / "ingest" / "attempt-1", {}, {}, {}),
        ):
            with pytest.raises(LockedError, match="taken over"):
                write()
        assert not first.exists and first.manifest("ingest") is None


def test_what_a_sleeper_published_in_between_is_replaced(run, monkeypatch):
    """It looked at its lease, slept, and put its manifest after another process had taken over."""
    with run.writing():
        version_of = storage.version_of
        late = []

        def slept(path):
            seen = version_of(path)
            if not late:
                late.append(path)
                path.write_bytes(b'{"of": "the sleeper"}')
            return seen

        monkeypatch.setattr(storage, "version_of", slept)
        run.commit("ingest", run.attempt("ingest"), {"by": "the holder"}, {}, {})
        assert late and run.finished("ingest")["recipe"] == {"by": "the holder"}


@pytest.mark.parametrize("asleep", ["after the put", "after its last look"])
def test_who_wakes_up_within_a_commit_removes_nothing_of_who_took_over(run, monkeypatch, asleep):
    owner, name = (storage, "publish") if asleep == "after the put" else (lease.Lease, "check")
    real = getattr(owner, name)
    first, second = Run(run.root), Run(run.root)
    calls = []

    def slept(*args):
        done = real(*args)
        if threading.current_thread() is not threading.main_thread():
            return done
        calls.append(name)
        if calls.count("check") == 1:  # before the put
            return done
        monkeypatch.setattr(owner, name, real)
        first.lease.done.set()  # it beats no more
        with second.writing():
            commit(second, "the second")
        return done

    def commit(by, names):
        attempt = by.attempt("ingest")
        (attempt / "labels.txt").write_bytes(names.encode())
        path = attempt / "labels.txt"
        by.commit("ingest", attempt, {"by": names}, {"labels": [entry(path, attempt, 1)]}, {})

    with run.writing():
        for number in range(2):  # left by attempts that were killed
            (run.root / "ingest" / f"attempt-{number}" / "x").write_bytes(b"")
    with first.writing():
        monkeypatch.setattr(owner, name, slept)
        if asleep == "after the put":
            with pytest.raises(LockedError, match="taken over"):
                commit(first, "the first")
        else:
            commit(first, "the first")
    assert run.finished("ingest")["recipe"] == {"by": "the second"}
    assert run.damage("ingest") is None


def test_who_lost_its_lease_publishes_no_copies_of_the_metrics(run, monkeypatch):
    with run.writing():
        taken = lease.Lease(run.root, 2, storage.Conditions(True, True))
        taken.path.write_bytes(taken.content())
        monkeypatch.setattr(evaluate, "publish", lambda run: pytest.fail("published"))
        with pytest.raises(LockedError, match="taken over"):
            jobs.entry._publish(run)


@pytest.mark.parametrize("theirs", [True, False])  # or removed by hand
def test_who_shares_its_number_with_another_publishes_nothing(run, theirs, monkeypatch):
    """Two came at once to a store that keeps no condition: the last one that wrote has it."""
    monkeypatch.setattr(lease, "RENEW", 60.0)
    first = Run(run.root)
    with first.writing():
        other = lease.Lease(run.root, first.lease.number, storage.Conditions(False, False))
        if theirs:
            other.path.write_bytes(other.content())
            other.check()
        else:
            other.path.unlink()
        with pytest.raises(LockedError, match=f"lease 1 is held by {other.holder if theirs else 'an unknown'}"):
            first.fenced()
    if theirs:  # not released, nor renewed
        assert other.path.read_bytes() == other.content()


def test_who_shares_its_number_with_another_stops_to_renew_it(run, caplog):
    with run.writing():
        mine = run.lease
        other = lease.Lease(run.root, mine.number, storage.Conditions(False, False))
        time.sleep(lease.RENEW / 3)
        other.path.write_bytes(other.content())
        time.sleep(3 * lease.RENEW)
        if "nothing more is published" not in caplog.text:
            other.path.write_bytes(other.content())  # a beat of ours was under way
            time.sleep(3 * lease.RENEW)
        assert "nothing more is published" in caplog.text
        assert other.path.read_bytes() == other.content()

"""Many starts at once, other users, planted links, an input that changes; and the table of all faults, FAULTS.md."""

import contextlib
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.entry import guarded
from pipeline import config, host, store
from pipeline.errors import DataError, InputError, LockedError, TagmillError
from pipeline.learners import tagger as taggers
from pipeline.learners.tagger import Tagger
from pipeline.sources import plan, refuse_changed
from pipeline.store import MANIFEST, Run, write_bytes
from tests.unit.learners.test_tagger import folder as saved_tagger  # noqa: F401  (a fixture)
from tests.unit.test_store import publish, whole

TESTS = Path(__file__).parents[1]
ROWS = {"A": 14, "B": 12, "C": 9, "D": 3, "E": 17, "F": 11, "G": 8}  # of FAULTS.md


# -- one writer (A13, C1) ----------------------------------------------------------------------------------------------


class Start:
    """A command of ours in a process of its own: takes the lock, publishes `value`, holds the lock until it may go."""

    def __init__(self, folder, value, late=0.0):
        self.said, self.at = folder / f"said-{value}", folder / f"seconds-{value}"
        self.pid = os.fork()
        if self.pid:
            return
        status = 1
        try:
            sys.stderr = self.said.open("w")
            time.sleep(late)
            began = time.monotonic()

            def command():
                try:
                    run = Run(folder / "run")
                    run.prepare()
                    with run.writing():
                        run.create({"config": {}, "input": "x"})
                        publish(run, value)
                        until = time.monotonic() + 30
                        while not (folder / "go").exists() and time.monotonic() < until:
                            time.sleep(0.02)
                finally:
                    self.at.write_text(str(time.monotonic() - began))

            status = guarded(command)
            sys.stderr.flush()
        finally:
            os._exit(status)

    def end(self):
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def ended(self):
        """Exit code; None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None


def first_of(both):
    """(the start that ends first, the other one, exit code of the first)."""
    while True:
        for start, other in (both, both[::-1]):
            if (code := start.ended()) is not None:
                return start, other, code
        time.sleep(0.01)


def test_of_two_starts_one_publishes_and_the_other_says_who_does(quick_path):
    """Fifty times, from 0 to 2 s apart; after a kill the next start gets in without more ado."""
    warm = Run(quick_path / "warm")
    warm.prepare()
    publish(warm, 1)  # what is slow the first time is not slow in every child
    draw = random.Random(5)
    pairs = []
    for number in range(50):
        folder = quick_path / str(number)
        folder.mkdir()
        late = draw.choice([0.0, draw.uniform(0, 2)])
        pairs.append((folder, Start(folder, 1), Start(folder, 2, late)))
    seen, seconds = set(), []
    for folder, *both in pairs:
        loser, winner, code = first_of(both)
        assert code == 75
        (folder / "go").touch()
        assert winner.end() == 0
        assert whole(Run(folder / "run")) == both.index(winner) + 1
        assert f"locked by process {winner.pid} on " in loser.said.read_text()
        seconds.append(float(loser.at.read_text()))
        seen.add(both.index(winner))
    assert 0 in seen
    assert statistics.median(seconds) < 2  # a hundred processes at once
    folder = pairs[0][0]
    (folder / "go").unlink()
    holder = Start(folder, 3)
    while f"process {holder.pid} " not in (folder / "run" / ".lock").read_text():
        time.sleep(0.01)
    os.kill(holder.pid, signal.SIGKILL)
    assert holder.end() == -signal.SIGKILL
    with Run(folder / "run").writing():
        publish(Run(folder / "run"), 4)
    assert whole(Run(folder / "run")) == 4


def test_a_writer_that_is_stopped_keeps_the_lock(quick_path):
    """Nobody takes its place meanwhile, so that nothing has to be refused when it wakes up."""
    holder = Start(quick_path, 1)
    lock = quick_path / "run" / ".lock"
    while not lock.exists() or f"process {holder.pid} " not in lock.read_text():
        time.sleep(0.01)
    os.kill(holder.pid, signal.SIGSTOP)
    with pytest.raises(LockedError, match=f"process {holder.pid} "), Run(quick_path / "run").writing():
        pytest.fail("two writers")
    (quick_path / "go").touch()
    os.kill(holder.pid, signal.SIGCONT)
    assert holder.end() == 0
    assert whole(Run(quick_path / "run")) == 1


# -- other users and planted links (B8) --------------------------------------------------------------------------------


def in_child(function):
    """(exit code, stderr) of a command of ours in a process of its own."""
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                sys.stderr = said
                status = guarded(function)
                sys.stderr.flush()
            finally:
                os._exit(status)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        return code, said.read()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("what", ["prepare", "write", "read", "holder", "begin"])
def test_another_user_is_refused_with_exit_code_77_and_the_path(what):
    with tempfile.TemporaryDirectory() as top:  # the folders of pytest are closed to others altogether
        os.chmod(top, 0o755)
        mine = Run(Path(top) / "run")
        mine.prepare()
        mine.create({"config": {}, "input": "x"})
        publish(mine, 1)
        action = {
            "prepare": Run(Path(top) / "new").prepare,
            "write": lambda: mine.writing().__enter__(),
            "read": lambda: mine.files("folds"),
            "holder": mine.holder,
            "begin": lambda: mine.attempt("split"),
        }[what]

        def as_nobody():
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            action()

        code, said = in_child(as_nobody)
        assert code == 77, said
        assert top in said
        assert said.count("\n") == 1
        assert whole(mine) == 1


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_no_umask_opens_a_run_to_others(tmp_path, mask):
    def command():
        os.umask(mask)
        run = Run(tmp_path / "run")
        run.prepare()
        with run.writing():
            run.create({"config": {}, "input": "x"})
            publish(run, 1)

    assert in_child(command) == (0, "")
    found = [tmp_path / "run", *(tmp_path / "run").rglob("*")]
    assert len(found) > 6
    for path in found:
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640) & ~mask, path
    assert whole(Run(tmp_path / "run")) == 1


def test_planted_links_are_replaced_or_refused_and_never_followed(tmp_path, monkeypatch):
    run = Run(tmp_path / "run")
    run.prepare()
    run.create({"config": {}, "input": "somewhere"})
    precious = tmp_path / "precious"
    precious.write_text("content")
    publish(run, 1)
    for path in (run.root / "split" / MANIFEST, run.root / "run.json"):
        content = path.read_bytes()
        path.unlink()
        path.symlink_to(precious)
        write_bytes(path, content)
        assert not path.is_symlink()
    assert whole(run) == 1
    monkeypatch.setattr(store.uuid, "uuid4", lambda: uuid.UUID(int=0))
    (run.root / ".run.json.00000000.tmp").symlink_to(precious)
    with pytest.raises(FileExistsError), store.replacing(run.root / "run.json") as part:
        part.write_text("{}")
    assert precious.read_text() == "content"
    assert run.info["input"] == "somewhere"


def test_a_planted_folder_of_the_host_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    planted = tmp_path / f"tagmill-{os.getuid()}"
    planted.symlink_to(tmp_path / "elsewhere")
    assert in_child(lambda: host.host_folder("", "m"))[0] == 77
    planted.unlink()
    host.host_folder("", "m")
    assert planted.stat().st_mode & 0o777 == 0o700
    if os.getuid() == 0:
        os.chown(planted, 65534, 65534)
        assert in_child(lambda: host.host_folder("", "m"))[0] == 77


# -- what is read has changed (B9, B10) --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_an_input_that_changed_while_it_was_read_is_refused(tmp_path, kind):
    rows = pa.table({"doc_id": [f"d{k}" for k in range(9)], "text": ["a text"] * 9, "labels": [["x"]] * 9})
    for number in range(2):
        path = tmp_path / f"{number}.{kind}"
        if kind == "parquet":
            pq.write_table(rows, path)
        else:
            rows.to_pandas().to_json(path, orient="records", lines=True)
    planned = plan(str(tmp_path), config.load()[0].input)
    refuse_changed(planned)
    before = path.stat()
    content = path.read_bytes()
    path.write_bytes(content.replace(b"d8", b"e8"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with pytest.raises(InputError, match=rf"1\.{kind}.* changed while it was read") as caught:
        refuse_changed(planned)
    assert caught.value.code == 66
    path.unlink()
    with pytest.raises(InputError, match=rf"1\.{kind}"):
        refuse_changed(planned)


def test_changed_bytes_and_lengths_of_a_model_are_refused_before_it_is_parsed(saved_tagger, monkeypatch):  # noqa: F811
    def parsed(*args, **kwargs):
        pytest.fail("parsed")

    monkeypatch.setattr(taggers.pq, "read_table", parsed)
    monkeypatch.setattr(taggers.np, "load", parsed)
    tried = 0
    for path in sorted(saved_tagger.iterdir()):
        if path.name == "tagger.json":  # MLflow has its SHA-256: tests/unit/test_tracking.py
            continue
        content = path.read_bytes()
        for k in range(0, len(content), 1 + len(content) // 200):  # every byte of the small ones
            for damaged in (content[:k] + bytes([content[k] ^ 1]) + content[k + 1 :], content[:k]):
                path.write_bytes(damaged)
                with pytest.raises(DataError, match=path.name):
                    Tagger.load(saved_tagger)
                tried += 1
        path.write_bytes(content)
    assert tried > 1500


def test_a_damaged_card_of_a_model_is_an_error_of_ours_or_none(saved_tagger):  # noqa: F811
    path = saved_tagger / "tagger.json"
    content = path.read_bytes()
    for k in range(0, len(content), 3):
        for damaged in (content[:k] + bytes([content[k] ^ 1]) + content[k + 1 :], content[:k]):
            path.write_bytes(damaged)
            with contextlib.suppress(TagmillError):
                Tagger.load(saved_tagger)


# -- the table ---------------------------------------------------------------------------------------------------------


def table():
    """(row, promise, what shows it) of FAULTS.md."""
    lines = (TESTS / "FAULTS.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if re.match(r"\| [A-G]\d", line)]
    assert all(len(row) == 3 for row in cells)
    return cells


def test_every_test_that_the_table_of_faults_names_exists():
    known = {}
    for path in TESTS.rglob("test_*.py"):
        name = str(path.relative_to(TESTS).with_suffix(""))
        known[name] = set(re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    missing = []
    for row, _, shown in table():
        named = re.findall(r"`([\w/]+)::(test_\w+)`", shown)
        missing += [f"{row}: {file}::{test}" for file, test in named if test not in known.get(file, ())]
        assert named or "`make chaos`" in shown or "not shown:" in shown, row
    assert missing == []


def test_the_table_of_faults_has_every_row():
    expected = [
        f"{group}{k}" for group, n in zip("ABCDEFG", (14, 12, 9, 3, 17, 11, 8), strict=True) for k in range(1, n + 1)
    ]
    assert [row for row, _, _ in table()] == expected

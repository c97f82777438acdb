"""A function that a document kills: who is convicted, of what, and who is not."""

import ctypes
import json
import os
import resource
import signal
import time

import numpy as np
import psutil
import pyarrow as pa
import pytest

from pipeline.errors import InputError
from pipeline.stages import poison
from pipeline.stages.poison import Guard, Limits, alone, bounded, isolated
from pipeline.store import Run

LIMITS = Limits(20.0, 1_000_000_000)
SHORT = LIMITS._replace(seconds=0.3)


def sink_memory():
    np.ones(3_000_000_000, np.uint8)


def fail():
    raise ValueError("a \x1b message\nof two lines")


DEEDS = {
    "crash": (lambda: ctypes.string_at(0), "worker_crash", "SIGSEGV"),
    "abort": (os.abort, "worker_crash", "SIGABRT"),
    "leave": (lambda: os._exit(3), "worker_crash", "exit code 3"),
    "pretend": (lambda: os._exit(0), "worker_crash", "exit code 0"),
    "memory": (sink_memory, "oom", "more than 1.0 GB"),
    "sleep": (lambda: time.sleep(1e5), "timeout", "0.3 s"),
    "native": (lambda: ctypes.PyDLL(None).pause(), "timeout", "0.3 s"),  # holds the interpreter's lock
    "error": (fail, "error:ValueError", r"ValueError: a \x1b message of two lines"),
    "exit": (lambda: exit(0), "error:SystemExit", "SystemExit"),
}


@pytest.mark.parametrize("deed", sorted(DEEDS))
def test_who_fails_alone_is_convicted_of_what_it_did(deed):
    act, reason, what = DEEDS[deed]
    verdict = alone(7, lambda item: act() if item == 7 else None, SHORT if reason == "timeout" else LIMITS)
    assert verdict["reason"] == reason
    assert what in verdict["what"]
    assert verdict["peak_bytes"] > 1_000_000
    assert verdict["limit_bytes"] == 1_000_000_000
    assert (verdict["seconds"] >= 0.3) is (reason == "timeout")


def test_who_works_alone_is_innocent():
    assert alone(7, lambda item: [item] * 1000, LIMITS) is None


def test_the_child_tells_where_it_was_and_goes_through_all():
    with poison.mmap.mmap(-1, 16) as seen:

        def work(item):
            seen[item : item + 1] = b"x"
            if item == 9:
                os.abort()

        death = isolated(range(4, 12), work, LIMITS)
        assert (death.item, death.signal, death.code, death.raised) == (9, signal.SIGABRT, 0, "")
        assert isolated(range(10, 12), work, LIMITS) is None
        assert seen[:] == b"\0" * 4 + b"x" * 8 + b"\0" * 4


@pytest.mark.parametrize(("kills", "reason"), [(1, None), (2, None), (3, "oom")])
def test_a_kill_from_outside_is_no_evidence_until_it_comes_each_time(kills, reason):
    with poison.mmap.mmap(-1, 1) as count:

        def work(item):
            count[0] += 1
            if count[0] <= kills:
                os.kill(os.getpid(), signal.SIGKILL)

        verdict = alone(0, work, LIMITS)
    assert (verdict and verdict["reason"]) == reason


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT])
def test_who_is_asked_to_end_is_never_convicted(number):
    assert alone(0, lambda _: os.kill(os.getpid(), number), LIMITS) is None


def test_kills_of_several_kinds_are_no_evidence(tmp_path):
    """Somebody ends processes here, in one way and another."""

    def work(_):
        count = len(list(tmp_path.iterdir()))
        (tmp_path / str(count)).touch()
        os.kill(os.getpid(), (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL)[count])

    assert alone(0, work, LIMITS) is None
    assert len(list(tmp_path.iterdir())) == 3


def test_a_timer_counts_whatever_a_parent_does_with_its_signal():
    before = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    try:
        found = alone(0, lambda _: time.sleep(60), LIMITS._replace(seconds=0.2))
        child = os.fork()
        if child == 0:
            with bounded(LIMITS._replace(seconds=0.2)):
                time.sleep(20)
            os._exit(0)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
        signal.signal(signal.SIGALRM, before)
    assert found and found["reason"] == "timeout"
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGALRM


def test_a_limit_of_memory_that_is_there_is_not_raised():
    child = os.fork()
    if child == 0:
        given = psutil.Process().memory_info().vms + (1 << 30)
        resource.setrlimit(resource.RLIMIT_AS, (given, resource.getrlimit(resource.RLIMIT_AS)[1]))
        with bounded(LIMITS._replace(memory=1 << 40)):
            os._exit(int(resource.getrlimit(resource.RLIMIT_AS)[0] != given))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_an_error_that_cannot_say_what_it_is_goes_by_its_name():
    class Mute(Exception):
        def __str__(self):
            raise ValueError

    def work(_):
        raise Mute

    found = alone(0, work, LIMITS)
    assert found and found["reason"] == "error:Mute"


def test_a_child_does_not_outlive_its_parent():
    """The worker is killed while its child hangs."""
    parent = os.fork()
    if parent == 0:
        isolated(range(1), lambda _: time.sleep(60), LIMITS._replace(seconds=60))
        os._exit(0)
    deadline = time.monotonic() + 10
    while not (found := psutil.Process(parent).children()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.2)  # it asks for the signal first of all
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    while found[0].is_running() and found[0].status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the child lives on"
        time.sleep(0.01)


def test_limits_end_with_the_batch():
    before = poison.resource.getrlimit(poison.resource.RLIMIT_AS)
    handler, timer = signal.signal(signal.SIGALRM, signal.SIG_IGN), signal.getitimer(signal.ITIMER_REAL)[0]
    try:
        with pytest.raises(MemoryError), bounded(LIMITS):
            sink_memory()
        assert signal.getitimer(signal.ITIMER_REAL)[0] == pytest.approx(timer, abs=5)
        assert poison.resource.getrlimit(poison.resource.RLIMIT_AS) == before
        with bounded(Limits(5.0, 0)):
            assert 4 < signal.getitimer(signal.ITIMER_REAL)[0] <= 5
            assert poison.resource.getrlimit(poison.resource.RLIMIT_AS) == before
    finally:
        signal.signal(signal.SIGALRM, handler)


# -- batches of a task -------------------------------------------------------------------------------------------------

BATCH = pa.table({"doc_id": [f"d{k}" for k in range(9)], "text": [f"text {k}" for k in range(9)]})


@pytest.fixture
def attempted(monkeypatch):
    """attempted(n): what follows happens in attempt n of a task."""
    return lambda number: monkeypatch.setattr(poison, "_attempt", lambda: number)


@pytest.fixture
def guard(tmp_path):
    return Guard("featurize", str(tmp_path), LIMITS)


def texts(batch):
    return batch["text"].to_pylist()


def test_outside_of_a_task_the_work_is_all_that_is_done(guard, attempted, monkeypatch):
    attempted(None)
    monkeypatch.setattr(poison, "bounded", None)
    assert list(guard.over([BATCH, BATCH.slice(0, 2)], texts)) == [texts(BATCH), texts(BATCH.slice(0, 2))]


def test_a_first_attempt_has_its_limits_and_no_child(guard, attempted, monkeypatch):
    attempted(0)
    monkeypatch.setattr(os, "fork", None)
    calls = []

    def work(batch):
        calls.append((texts(batch), signal.getitimer(signal.ITIMER_REAL)[0]))

    assert list(guard.over([BATCH], work)) == [None]
    assert calls[0][0] == ["one two three four"]  # kernels are compiled before any time is taken
    assert not 0 < calls[0][1] <= 20
    assert calls[1][0] == texts(BATCH)
    assert 19 < calls[1][1] <= 20
    assert list(guard.over([], work)) == []
    assert len(calls) == 2


def test_a_later_attempt_goes_on_without_the_convicted(guard, attempted, tmp_path):
    attempted(1)

    def work(batch):
        for text in texts(batch):
            if text == "text 3":
                os.abort()
            if text == "text 7":
                raise KeyError("seven")
        return texts(batch)

    [found] = guard.over([BATCH], work)
    assert found == [text for text in texts(BATCH) if text not in ("text 3", "text 7")]
    _, convicted = poison.judged(tmp_path, lambda: "outcome")
    assert [(v["doc_id"], v["reason"], v["stage"]) for v in convicted] == [
        ("d3", "worker_crash", "featurize"),
        ("d7", "error:KeyError", "featurize"),
    ]
    assert all(v["text_bytes"] == 6 for v in convicted)


def test_a_batch_that_fails_as_a_whole_convicts_nobody(guard, attempted, tmp_path):
    attempted(1)

    def work(batch):
        if batch.num_rows > 1:
            raise ValueError("too many")

    with pytest.raises(ValueError, match="too many"):
        list(guard.over([BATCH], work))
    assert poison.judged(tmp_path, lambda: "outcome") == ("outcome", [])


def test_a_document_that_dies_after_others_and_not_alone_is_innocent(guard, attempted, tmp_path):
    attempted(1)
    parent, before = os.getpid(), []

    def work(batch):
        if os.getpid() != parent:
            before.append(batch)
            if batch.num_rows > 1 or len(before) > 3:
                os.abort()
        return texts(batch)

    assert list(guard.over([BATCH], work)) == [texts(BATCH)]
    assert poison.judged(tmp_path, lambda: "outcome") == ("outcome", [])


def test_work_that_fails_on_a_harmless_document_is_a_bug_and_no_verdict(guard, attempted, tmp_path):
    attempted(1)
    with pytest.raises(ValueError):
        list(guard.over([BATCH], lambda batch: fail()))
    assert poison.judged(tmp_path, lambda: "outcome") == ("outcome", [])


def test_a_later_attempt_has_more_time_and_memory(guard, attempted, monkeypatch):
    seen = []
    monkeypatch.setattr(poison, "bounded", lambda limits: seen.append(limits) or bounded(limits))
    for number in range(4):
        attempted(number)
        list(guard.over([BATCH], texts))
    assert seen == [LIMITS, *(Limits(20.0 * 2**n, 0) for n in (1, 2, 3))]


def test_a_long_text_has_the_time_of_each_mb_that_it_begins(guard, attempted, monkeypatch):
    assert [LIMITS.of_text(size).seconds for size in (0, 1_000_000, 1_000_001, 20_000_000)] == [20, 20, 40, 400]
    attempted(1)
    seen = []

    def noted(items, work, limits):
        seen.append((len(items), limits.seconds))
        return isolated(items, work, limits)

    def work(batch):
        if "x" in batch["text"][-1].as_py():
            raise ValueError

    monkeypatch.setattr(poison, "isolated", noted)
    batch = pa.table({"doc_id": ["a", "b", "c"], "text": ["a" * 1_500_000, "b" * 2_500_000, "x"]})
    assert guard.screened(batch, work)["doc_id"].to_pylist() == ["a", "b"]
    assert seen == [(1, 100.0), (3, 60.0), (1, 20.0)]  # the batch, each of its documents, the last one alone


def test_what_one_round_convicts_is_bounded(guard, attempted, monkeypatch):
    attempted(1)
    monkeypatch.setattr(poison, "MOST", 2)
    batch = guard.screened(BATCH, lambda batch: fail())
    assert texts(batch) == texts(BATCH.slice(2))


def test_an_error_of_the_stage_is_told_unless_documents_are_convicted(guard, tmp_path):
    with pytest.raises(ValueError):
        poison.judged(tmp_path, fail)
    guard._write_down("../é", 2, {"reason": "oom"})
    outcome, [verdict] = poison.judged(tmp_path, fail)
    assert outcome is None
    assert verdict == {"doc_id": "../é", "reason": "oom", "stage": "featurize", "text_bytes": 2}


# -- the list ----------------------------------------------------------------------------------------------------------


def verdict(doc_id, reason="timeout"):
    return {"doc_id": doc_id, "reason": reason, "stage": "split", "what": "no end within 3 s"}


def test_the_list_grows_and_belongs_to_its_input_and_code(tmp_path):
    run = Run(tmp_path)
    mark = poison.mark_of(["b", "a"], "code")
    assert poison.listed(run, mark) == []
    assert poison.grown(run, mark, [verdict("d9")]) == [verdict("d9")]
    assert poison.grown(run, mark, [verdict("d1", "oom")]) == [verdict("d1", "oom"), verdict("d9")]
    assert poison.listed(run, poison.mark_of(["a", "b"], "code")) == [verdict("d1", "oom"), verdict("d9")]
    for other in (poison.mark_of(["a", "c"], "code"), poison.mark_of(["a", "b"], "other")):
        assert poison.listed(run, other) == []
    assert poison.grown(run, other, [verdict("d5")]) == [verdict("d5")]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"of": "x"}', '{"of": "x", "documents": [{"doc_id": 1}]}'])
def test_a_list_that_is_none_is_refused_by_name(tmp_path, text):
    (tmp_path / poison.LIST).write_text(text)
    with pytest.raises(InputError, match=r"quarantine\.json: not a list of documents; remove it"):
        poison.listed(Run(tmp_path), "x")


def test_only_who_and_why_decides_what_ingest_writes():
    assert poison.decisive([{**verdict("d1"), "seconds": 3.1}]) == [["d1", "timeout"]]


def test_what_is_told_is_bounded_and_cannot_forge_a_line():
    line = poison.told([verdict(f"d{k}\n") for k in range(7)])
    assert line.count("no end within 3 s") == 5
    assert line.endswith(" and 2 more")
    assert "\n" not in line


def test_a_verdict_is_json_that_is_written_whole(guard, tmp_path):
    guard._write_down("d1", 0, {"reason": "oom"})
    [path] = tmp_path.iterdir()
    assert json.loads(path.read_text())["doc_id"] == "d1"

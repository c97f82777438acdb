"""Documents that crash, hang or exhaust a worker: found, convicted by evidence, listed.

    batches of a part, work(batch)  ->  results of the batches, a verdict of each document that fails alone

On a task's first attempt a batch costs a timer and a limit of memory.  What ends the worker is not asked: Spark tries
again, and a repeated attempt sends every batch through a child process first.  Where that dies, its documents go one by
one through another child, and the one that was under way when it died goes alone through a third.  Only who fails there
is convicted, so a worker that was killed for nobody's fault convicts nobody.  A task goes on without the convicted, so
that one job finds those of all parts; the frame of the jobs then begins again at ingest, which rejects them.
"""

import contextlib
import ctypes
import faulthandler
import hashlib
import json
import mmap
import os
import resource
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import InputError, shown
from pipeline.host import shown_bytes
from pipeline.storage import Place, place
from pipeline.store import Run, fingerprint, write_json

LIST = "quarantine.json"
VERDICT = "poison-"  # file of one in the folder of an attempt, which is never published then
ROUNDS = 10  # how often one command begins again at ingest
MOST = 100  # convicted of one batch and round; what is left comes with the next one
KILLS = 3  # from outside, in a row, until the kernel's want of memory is believed
OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)
BOARD = 2048  # bytes that a child leaves to its parent: the item, since when, what was raised

# every kernel is compiled by a document that harms nobody, before any time is taken
HARMLESS = pa.table({"row": [0], "doc_id": [""], "text": ["one two three four"]})

Result = TypeVar("Result")


class Limits(NamedTuple):
    """What one batch, or one document alone, may take."""

    seconds: float
    memory: int  # bytes on top of what the process has mapped; 0: no limit

    def of_text(self, size: int) -> "Limits":
        """With the seconds of each MB that is begun: a long text may take long."""
        return self._replace(seconds=self.seconds * max(1, -(-size // 1_000_000)))


class Death(NamedTuple):
    """How a child process ended."""

    item: int  # that it was at
    signal: int  # 0: none
    code: int  # of its exit
    raised: str  # name of the exception, and its message after a colon
    seconds: float  # at that item
    peak_bytes: int


class Guard(NamedTuple):
    """Runs the work of a task on batches of documents (doc_id, text, ...)."""

    stage: str
    folder: str  # of the attempt: verdicts go there
    limits: Limits  # of one MB of text

    @classmethod
    def of(cls, stage: str, attempt: Place, spark) -> "Guard":
        """spark: SparkConfig."""
        return cls(stage, str(attempt), Limits(spark.document_seconds, int(spark.document_gb * 1e9)))

    def over(self, batches: Iterable[pa.Table], work: Callable[[pa.Table], Result]) -> Iterator[Result]:
        """work(batch) of every batch; outside of a Spark task nothing else happens."""
        attempt = _attempt()
        if attempt is None:
            yield from map(work, batches)
            return
        for number, batch in enumerate(batches):
            if number == 0:
                work(HARMLESS)
            if attempt:
                batch = self.screened(batch, work)
            # a batch may need more time or memory than any of its documents: it gets that the next time
            limits = self.limits.of_text(int(_sizes(batch).sum()))
            with bounded(Limits(limits.seconds * 2**attempt, 0 if attempt else limits.memory)):
                result = work(batch)
            yield result

    def screened(self, batch: pa.Table, work: Callable[[pa.Table], Any]) -> pa.Table:
        """The batch without the documents that fail alone, which are written down."""
        size = _sizes(batch)
        if isolated(range(1), lambda _: work(batch), self.limits.of_text(int(size.sum()))) is None:
            return batch

        def one(row):
            work(batch.slice(row, 1).combine_chunks())

        guilty = np.zeros(batch.num_rows, bool)
        rows = range(batch.num_rows)
        while rows and guilty.sum() < MOST:
            death = isolated(rows, one, self.limits.of_text(int(size.max())))
            if death is None:
                break
            verdict = alone(death.item, one, self.limits.of_text(int(size[death.item])))
            if verdict:
                guilty[death.item] = True
                self._write_down(batch["doc_id"][death.item].as_py(), int(size[death.item]), verdict)
            rows = range(death.item + 1, batch.num_rows)
        return batch.filter(pa.array(~guilty)).combine_chunks()

    def _write_down(self, doc_id, size, verdict):
        name = hashlib.sha256(doc_id.encode()).hexdigest()[:32]
        facts = {"doc_id": doc_id, "stage": self.stage, "text_bytes": size}
        write_json(place(self.folder) / f"{VERDICT}{name}.json", {**facts, **verdict})


def _sizes(batch):
    return pc.binary_length(batch["text"]).to_numpy().astype(np.int64)


def _attempt() -> int | None:
    """Which attempt of a Spark task this process is at; None outside of one."""
    from pyspark import TaskContext

    task = TaskContext.get()
    return None if task is None else task.attemptNumber()


@contextlib.contextmanager
def bounded(limits: Limits) -> Iterator[None]:
    """SIGALRM ends this process, also inside of native code, when the time is over; memory beyond its limit is refused.

    The timer of the kernel needs no thread, and no interpreter that still turns.
    """
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = _deadly(signal.SIGALRM)
    if limits.memory:
        _limit_memory(limits.memory)
    timer = signal.setitimer(signal.ITIMER_REAL, limits.seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)
        if limits.memory:
            resource.setrlimit(resource.RLIMIT_AS, before)


def _deadly(number):
    """Have a signal end this process, whatever was inherited; the handler of before."""
    before = signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
    return before


def _limit_memory(more):
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = psutil.Process().memory_info().vms + more
    limit = min([limit, *(given for given in (soft, hard) if given != resource.RLIM_INFINITY)])
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


# -- children ----------------------------------------------------------------------------------------------------------


def alone(item: int, work: Callable[[int], Any], limits: Limits) -> dict | None:
    """work(item) in a child process of its own: reason and what was measured where it fails, else None."""
    deaths: list[Death] = []
    while len(deaths) < KILLS and {death.signal for death in deaths} <= set(OUTSIDE):
        death = isolated(range(item, item + 1), work, limits)
        if death is None:
            return None
        deaths.append(death)
    # of several kills from outside only SIGKILL each time is believed to be want of memory
    if deaths[-1].signal in OUTSIDE and any(death.signal != signal.SIGKILL for death in deaths):
        return None
    return verdict_of(deaths[-1], limits)


def verdict_of(death: Death, limits: Limits) -> dict | None:
    """Reason and measurement; None where the process was killed from outside, and not for want of memory."""
    measured = {"seconds": round(death.seconds, 3), "peak_bytes": death.peak_bytes}
    limit = {"limit_seconds": limits.seconds, "limit_bytes": limits.memory}
    if death.signal == signal.SIGALRM:
        reason, what = "timeout", f"no end within {limits.seconds:g} s"
    elif death.raised.startswith("MemoryError"):
        reason, what = "oom", f"needs more than {shown_bytes(limits.memory)} of memory"
    elif death.raised:
        reason, what = f"error:{death.raised.split(':')[0]}", death.raised
    elif death.signal == signal.SIGKILL:
        reason, what = "oom", f"killed {KILLS} times running, at {shown_bytes(death.peak_bytes)} of memory"
    elif death.signal in OUTSIDE:
        return None
    elif death.signal:
        reason, what = "worker_crash", f"ended by {signal.Signals(death.signal).name}"
    else:
        reason, what = "worker_crash", f"left with exit code {death.code}"
    return {"reason": reason, "what": what, **measured, **limit}


def isolated(items: range, work: Callable[[int], Any], limits: Limits) -> Death | None:
    """work(item) of each, one after the other in one forked child; how it died, or None where all came back.

    Memory that both see tells which item is under way: the child writes it there, whatever ends it.
    """
    with mmap.mmap(-1, BOARD) as board:
        child = os.fork()
        if child == 0:
            _child(items, work, limits, board)
        _, status, usage = os.wait4(child, 0)
        item, began = (int.from_bytes(board[at : at + 8], "little") for at in (0, 8))
        raised = board[16:].rstrip(b"\0").decode(errors="replace")
    if item == items.stop and status == 0:
        return None
    code = os.waitstatus_to_exitcode(status)
    seconds = (time.monotonic_ns() - began) / 1e9 if began else 0.0
    at = min(max(item, items.start), items.stop - 1)  # it may have died before the first
    return Death(at, max(-code, 0), max(code, 0), raised, seconds, usage.ru_maxrss * 1024)


def _child(items, work, limits, board) -> NoReturn:
    try:
        faulthandler.disable()  # the file that it would write to is the parent's
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nothing outlives a worker
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for number in (signal.SIGALRM, *OUTSIDE):
            if number != signal.SIGKILL:
                _deadly(number)
        if limits.memory:
            _limit_memory(limits.memory)
        for item in items:
            board[:8] = item.to_bytes(8, "little")
            board[8:16] = time.monotonic_ns().to_bytes(8, "little")
            signal.setitimer(signal.ITIMER_REAL, limits.seconds)
            work(item)
        board[:8] = items.stop.to_bytes(8, "little")
        os._exit(0)
    except MemoryError:  # Arrow's is one too; nothing is left to make a message of
        board[16:27] = b"MemoryError"
    except BaseException as error:
        text = type(error).__name__.encode()
        with contextlib.suppress(Exception):  # an error that cannot say what it is
            text += f": {shown(' '.join(str(error).split()), 300)}".encode()
        text = text[: BOARD - 16]
        board[16 : 16 + len(text)] = text
    finally:
        os._exit(1)


# -- the list ----------------------------------------------------------------------------------------------------------


def judged(attempt: Place, stage: Callable[[], Result]) -> tuple[Result | None, list[dict]]:
    """What `stage` returns, or None and the verdicts of the documents that its tasks have convicted, by doc_id.

    What it makes of the others, or what it misses, is of no interest then.
    """
    outcome, error = None, None
    try:
        outcome = stage()
    except Exception as met:
        error = met
    found = [json.loads(path.read_text(encoding="utf-8")) for path in attempt.glob(f"{VERDICT}*.json")]
    if error and not found:
        raise error
    return None if found else outcome, sorted(found, key=lambda verdict: verdict["doc_id"])


def listed(run: Run, mark: str) -> list[dict]:
    """The verdicts in force, by doc_id.

    mark: of the input and the code that they were found with; others are of another document, or of a mended fault.
    """
    path = run.root / LIST
    if not path.exists():
        return []
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        documents = [
            {**entry, "doc_id": str(entry["doc_id"]), "reason": str(entry["reason"])} for entry in known["documents"]
        ]
        return documents if known["of"] == mark else []
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: not a list of documents; remove it, and they are looked for again") from error


def grown(run: Run, mark: str, found: list[dict]) -> list[dict]:
    """The list with more verdicts; it is written."""
    known = {verdict["doc_id"]: verdict for verdict in [*found, *listed(run, mark)]}
    documents = [known[doc_id] for doc_id in sorted(known)]
    write_json(run.root / LIST, {"of": mark, "documents": documents})
    return documents


def decisive(convicted: list[dict]) -> list[list[str]]:
    """What of a list decides the output of ingest."""
    return [[verdict["doc_id"], verdict["reason"]] for verdict in convicted]


def mark_of(digests: Iterable[str], code: str) -> str:
    return fingerprint({"files": sorted(digests), "code": code})


def too_often(run: Run, found: list[dict]) -> str:
    return (
        f"{run.root}: documents that crash, hang or exhaust a worker were found {ROUNDS} times in a row, last "
        f"{told(found)}; remove them from the input, or run the same command to go on looking"
    )


def told(found: Sequence[dict]) -> str:
    """Verdicts in a line."""
    some = "; ".join(f"{shown(v['doc_id'])} {v['reason']} ({shown(v['what'], 120)})" for v in found[:5])
    return some + (f" and {len(found) - 5} more" if len(found) > 5 else "")

"""Progress of a stage: a bar with counts and time left on a terminal, a plain line now and then elsewhere."""

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger("tagmill")

POLL = 0.5  # seconds
PLAIN_EVERY = 30.0  # seconds between plain lines


@contextlib.contextmanager
def watching(context, stage: str) -> Iterator[None]:
    """Show how many tasks of the running Spark jobs are done; `context` is a SparkContext or None."""
    stop = threading.Event()
    show = _bar if sys.stderr.isatty() else _lines
    thread = threading.Thread(target=show, args=(context, stage, stop), name="progress", daemon=True)
    if context is not None:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        if context is not None:
            thread.join(timeout=5)


class Repeated:
    """Counts, from its making on, the tasks that Spark had to start again: a worker or an executor was lost."""

    def __init__(self, context):
        self._context, self._before = context, set(_jobs(context))

    def count(self) -> int:
        """As far as Spark remembers its jobs; 0 without a context."""
        failed: dict[int, int] = {}
        with contextlib.suppress(Exception):  # the context may be stopping
            tracker = self._context.statusTracker()
            for job in set(_jobs(self._context)) - self._before:
                for number in tracker.getJobInfo(job).stageIds:
                    stage = tracker.getStageInfo(number)
                    failed[number] = stage.numFailedTasks if stage else 0
        return sum(failed.values())


def _jobs(context):
    try:
        return list(context.statusTracker().getJobIdsForGroup(None))
    except Exception:  # no context, or it is stopping
        return []


def counts(context) -> tuple[int, int]:
    """(done, all) tasks of the active jobs; (0, 0) where none is active or Spark does not tell."""
    done = total = 0
    try:
        tracker = context.statusTracker()
        for job in tracker.getActiveJobsIds():
            info = tracker.getJobInfo(job)
            for number in info.stageIds if info else ():
                stage = tracker.getStageInfo(number)
                if stage:
                    done += stage.numCompletedTasks
                    total += stage.numTasks
    except Exception:  # the context may be stopping
        return 0, 0
    return done, total


def _bar(context, stage, stop):
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tasks"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(stage, total=None)
        while not stop.wait(POLL):
            done, total = counts(context)
            if total:
                progress.update(task, completed=done, total=total)


def _lines(context, stage, stop):
    started = said = time.monotonic()
    while not stop.wait(POLL):
        now = time.monotonic()
        if now - said < PLAIN_EVERY:
            continue
        said = now
        done, total = counts(context)
        if total and done:
            left = (now - started) / done * (total - done)
            log.info("%s: %d of %d tasks, %.0f s, about %.0f s left", stage, done, total, now - started, left)
        else:
            log.info("%s: running for %.0f s", stage, now - started)

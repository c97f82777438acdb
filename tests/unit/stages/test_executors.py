"""A job that has no executors is given up after a time; one that has, or that does not run, is not."""

import time
from types import SimpleNamespace

import pytest

from pipeline.errors import ServiceError
from pipeline.stages.executors import executors_wanted


class Context:
    """A SparkContext with so many executors and so many jobs, which end when they are cancelled."""

    def __init__(self, executors=0, jobs=1, master="spark://h:1"):
        self.executors, self.jobs, self.master, self.cancelled = executors, jobs, master, False
        status = SimpleNamespace(size=lambda: 1 + self.executors)
        self._jsc = SimpleNamespace(sc=lambda: SimpleNamespace(getExecutorMemoryStatus=lambda: status))

    def statusTracker(self):
        return SimpleNamespace(getActiveJobsIds=lambda: list(range(self.jobs)))

    def cancelAllJobs(self):
        self.cancelled = True

    def job(self, seconds):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.cancelled:
                raise RuntimeError("job was cancelled")
            time.sleep(0.01)


def within(context, seconds=0.6, wait=0.2):
    with executors_wanted(SimpleNamespace(sparkContext=context), wait):
        context.job(seconds)


def test_a_job_without_executors_is_given_up():
    with pytest.raises(ServiceError, match=r"no executor of spark://h:1 within spark.wait = 0.2 s; .*same command"):
        within(Context(), seconds=20)


def test_executors_that_go_in_the_middle_are_missed():
    context = Context(executors=2)

    def lose():
        context.job(0.3)
        context.executors = 0
        context.job(20)

    with pytest.raises(ServiceError), executors_wanted(SimpleNamespace(sparkContext=context), 0.2):
        lose()


@pytest.mark.parametrize("context", [Context(executors=1), Context(jobs=0), Context(master="local[2]")])
def test_nobody_else_is_given_up(context):
    within(context)
    assert not context.cancelled


def test_what_fails_for_another_reason_keeps_it():
    with pytest.raises(KeyError), executors_wanted(SimpleNamespace(sparkContext=Context(executors=1)), 0.2):
        raise KeyError
    with executors_wanted(None, 0.2):
        pass

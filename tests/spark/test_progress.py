"""What Spark tells of its tasks: how many it had to begin again."""

import functools
import os
import signal

from jobs.progress import Repeated
from pipeline.stages.parts import run_tasks


def once_killed(folder, number):
    """Task 1 loses its worker at the first attempt."""
    marker = folder / "was-here"
    if number == 1 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_lost_worker_is_counted_and_earlier_jobs_are_not(spark, tmp_path):
    run_tasks(spark, "first", functools.partial(once_killed, tmp_path), range(3))
    repeated = Repeated(spark.sparkContext)
    assert repeated.count() == 0
    (tmp_path / "was-here").unlink()
    assert run_tasks(spark, "second", functools.partial(once_killed, tmp_path), range(3)) == [0, 1, 2]
    assert repeated.count() == 1


def test_without_a_context_nothing_was_repeated():
    assert Repeated(None).count() == 0

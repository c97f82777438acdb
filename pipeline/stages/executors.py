"""A job on a cluster without executors: it would wait for ever, say because the master has begun anew without it."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

from pipeline.errors import ServiceError, shown

log = logging.getLogger(__name__)


@contextlib.contextmanager
def executors_wanted(spark, wait: float) -> Iterator[None]:
    """Cancel the jobs of the block where none of them has had an executor for `wait` seconds.

    Local masters, and a session that is None, are left alone.  Raises ServiceError then.
    """
    if spark is None or spark.sparkContext.master.startswith("local"):
        yield
        return
    watch = _Watch(spark.sparkContext, wait)
    threading.Thread(target=watch.run, name="executors", daemon=True).start()
    try:
        yield
    except Exception as error:
        if not watch.late:
            raise
        raise ServiceError(
            f"no executor of {shown(watch.context.master)} within spark.wait = {wait:g} s; check that its master and "
            "workers run and have spark.executor.cores and spark.executor.memory free, then run the same command again"
        ) from error
    finally:
        watch.done.set()


class _Watch:
    def __init__(self, context, wait):
        self.context, self.wait, self.done, self.late = context, wait, threading.Event(), False

    def run(self):
        since = None
        while not self.done.wait(min(5.0, self.wait / 4)):
            try:
                if not self._waits():
                    since = None
                    continue
                since = since or time.monotonic()
                if time.monotonic() - since >= self.wait:
                    self.late = True
                    self.context.cancelAllJobs()
                    return
            except Exception as error:  # the context is stopping
                log.debug("spark: %s", error)
                return

    def _waits(self):
        """Whether a job runs and the driver is alone."""
        alone = self.context._jsc.sc().getExecutorMemoryStatus().size() <= 1
        return alone and len(self.context.statusTracker().getActiveJobsIds()) > 0

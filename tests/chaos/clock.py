"""A wall clock that cannot be trusted."""

import time


def untrusted(module):
    """400 days ahead; from the third second of a process on, 400 days behind.  For `tests.site.patched`."""
    now, now_ns, gmtime, localtime = time.time, time.time_ns, time.gmtime, time.localtime
    began = time.monotonic()

    def shift():
        return 400 * 86400 * (1 if time.monotonic() - began < 3 else -1)

    time.time = lambda: now() + shift()
    time.time_ns = lambda: now_ns() + shift() * 10**9
    time.gmtime = lambda seconds=None: gmtime(time.time() if seconds is None else seconds)
    time.localtime = lambda seconds=None: localtime(time.time() if seconds is None else seconds)

"""A wall clock that cannot be trusted: 400 days ahead, then, from the third second of a process on, 400 days behind."""

import time

_now, _now_ns, _began = time.time, time.time_ns, time.monotonic()


def _shift():
    return 400 * 86400 * (1 if time.monotonic() - _began < 3 else -1)


time.time = lambda: _now() + _shift()
time.time_ns = lambda: _now_ns() + _shift() * 10**9

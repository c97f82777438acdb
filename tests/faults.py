"""Faults of the operating system, put into a chosen call of a process by strace."""

import ctypes
import logging
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from jobs.entry import guarded

# what changes a disk; the question mark is for processors that do not know a call
CHANGES = ("openat", "write", "pwrite64", "ftruncate", "sendfile", "copy_file_range", "fsync")
CHANGES += ("?rename", "?renameat", "renameat2", "?unlink", "unlinkat", "?mkdir", "mkdirat", "?rmdir", "?link")
LOOKS = ("read", "close")
LINE = re.compile(r"(\w+)\((.*)\)\s+= (-?\d+|\?)(?: ?<[^>]*>)?(?: (E\w+))?.*")


class Call(NamedTuple):
    """One call in the log of a process."""

    name: str
    number: int  # the how manieth of its name
    text: str  # arguments; descriptors with their paths
    error: str | None


class End(NamedTuple):
    """How a process ended."""

    status: int  # exit code, or minus the signal
    calls: list[Call]
    said: str  # on stderr


def traced(folder: Path, action: Callable[[], object], inject: str | None = None) -> End:
    """Run `action` as a command of ours in a child, under strace; `folder` takes the log.

    inject: as strace takes it; calls are counted from the beginning of `action`.
    """
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    log, errors = folder / "strace.log", folder / "stderr"
    go, start = os.pipe()
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(start)
            ctypes.CDLL(None).prctl(0x59616D61, -1, 0, 0, 0)  # PR_SET_PTRACER: strace is no parent of this process
            sys.stderr = errors.open("w")
            logging.getLogger().handlers.clear()  # of tests before, whose streams are closed

            def command():
                os.close(tell)
                select.select([go], [], [])  # not a call that is traced
                action()

            status = guarded(command)
            sys.stderr.flush()
        finally:
            os._exit(status)
    for end in (go, tell):
        os.close(end)
    os.read(ready, 1)
    os.close(ready)
    calls = ",".join((*CHANGES, *LOOKS))
    words = ["strace", "-y", "-s", "0", "-p", str(child), "-o", str(log), "-e", f"trace={calls}"]
    strace = subprocess.Popen(
        [*words, *(["-e", f"inject={inject}"] if inject else [])], stderr=subprocess.PIPE, text=True
    )
    first = strace.stderr.readline()
    try:
        if "attached" not in first:
            pytest.skip(f"strace may not attach here: {first.strip()}")
    finally:
        os.close(start) if "attached" in first else os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        strace.communicate(timeout=60)
    return End(status, parsed(log), errors.read_text())


def parsed(log: Path) -> list[Call]:
    seen: Counter[str] = Counter()
    calls = []
    for line in log.read_text(errors="replace").splitlines():
        if match := LINE.fullmatch(line):
            seen[match[1]] += 1
            calls.append(Call(match[1], seen[match[1]], match[2], match[4]))
    return calls


def killed_everywhere(
    folder: Path, prepare: Callable[[], Callable[[], object]], names: tuple[str, ...] = CHANGES
) -> Iterator[Call]:
    """Each call of an action in turn, with the process killed as it enters the call."""
    wanted = {name.lstrip("?") for name in names}
    calls = [call for call in traced(folder, prepare()).calls if call.name in wanted]
    for call in calls:
        end = traced(folder, prepare(), f"{call.name}:signal=KILL:when={call.number}")
        assert end.status == -signal.SIGKILL, (call, end.said)
        yield call


def failed_everywhere(
    folder: Path, place: Path, prepare: Callable[[], Callable[[], object]], errors: dict[str, tuple[str, ...]]
) -> Iterator[tuple[Call, str, End]]:
    """Each call below `place` that would have done its work, in turn, with an error instead; how the process ended."""
    for call in traced(folder, prepare()).calls:
        if str(place) in call.text and call.error is None:
            for error in errors.get(call.name, ()):
                yield call, error, traced(folder, prepare(), f"{call.name}:error={error}:when={call.number}")

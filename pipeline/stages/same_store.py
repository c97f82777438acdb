"""Whether driver and executors see the same storage, and run the same code: one tiny job before the first of a run.

Without it a run folder on a local disk shows itself late, as files that are missing on the driver after hours of work.
"""

import logging
import os
import secrets
import socket
import time
from collections.abc import Iterable

from pipeline.code import code_version
from pipeline.errors import ConfigError, TagmillError, shown
from pipeline.stages.executors import executors_wanted
from pipeline.stages.parts import run_tasks
from pipeline.storage import ObjectPath, Place, explained, place, remove
from pipeline.store import PROBE, write_bytes

log = logging.getLogger(__name__)

TOKEN = "driver"
LATE = 5.0  # seconds that a network file system may take to show a new file


def check_same_store(spark, root: Place, wait: float) -> list[str]:
    """The hosts of the executors that answered, sorted.

    The driver writes a random token below `root`, a task on every executor reads it and writes an answer, the driver
    reads the answers.

    Args:
        root: the run folder, whose lock the caller holds.
        wait: seconds for the first executor to start.

    Raises ConfigError naming which host saw what where the storage or the code is not the same, ServiceError where no
    executor starts.
    """
    for old in root.glob(f"{PROBE}*"):  # of a driver that was killed here
        remove(old)
    token = secrets.token_hex(16)
    folder = root / f"{PROBE}{token[:8]}"
    try:
        with explained(folder, "create"):
            folder.mkdir()
            write_bytes(folder / TOKEN, token.encode())
        count = max(2, 2 * spark.sparkContext.defaultParallelism)  # so that no executor is left out
        tasks = [(str(folder), token, number) for number in range(count)]
        with executors_wanted(spark, wait):
            found = run_tasks(spark, "start: do all hosts see the run folder", answer, tasks)
        problems = [(host, problem or _unseen(folder, token, number, host)) for number, host, problem, _ in found]
        _refuse(root, problems)
        _refuse_other_code([(host, code) for _, host, _, code in found])
    finally:
        remove(folder)
    hosts = sorted({host for host, _ in problems})
    log.info("spark: the run folder is the same on %d host%s", len(hosts), "" if len(hosts) == 1 else "s")
    return hosts


def answer(task: tuple[str, str, int]) -> tuple[int, str, str, str]:
    """What an executor does: (number of the task, host, what is wrong or nothing, mark of its code)."""
    folder, token, number = place(task[0]), task[1], task[2]
    try:
        problem = "" if (folder / TOKEN).read_text() == token else "sees another content"
    except (OSError, TagmillError) as error:
        problem = f"cannot read what the driver wrote ({getattr(error, 'strerror', error)})"
    if not problem:
        try:
            write_bytes(folder / f"answer-{number}", token.encode())
        except (OSError, TagmillError) as error:
            problem = f"cannot write there ({getattr(error, 'strerror', error)})"
    try:
        code = code_version()
    except OSError:  # a package inside of an archive has no files to look at
        code = ""
    return number, socket.gethostname(), problem, code


def _unseen(folder, token, number, host):
    """What is wrong with the answer as the driver sees it."""
    until = time.monotonic() + LATE
    while True:
        try:
            if (folder / f"answer-{number}").read_text() == token:
                return ""
        except OSError:
            pass
        if time.monotonic() > until:
            return "wrote an answer that the driver does not see"
        if not isinstance(folder, ObjectPath):
            os.stat(folder)
        time.sleep(0.1)


def _refuse(root, problems: Iterable[tuple[str, str]]):
    told = _by_problem((host, problem) for host, problem in problems if problem)
    if told:
        raise ConfigError(
            f"{root}: driver {socket.gethostname()} and executors do not see the same storage: {told}; "
            "expected one file system that all hosts have under this path: choose another --run, or mount it there"
        )


def _refuse_other_code(codes: Iterable[tuple[str, str]]):
    ours = code_version()
    told = _by_problem((host, f"has {code}") for host, code in codes if code not in ("", ours))
    if told:
        raise ConfigError(
            f"driver {socket.gethostname()} and executors run different versions of Tagmill or of its numeric "
            f"packages: driver {ours}, {told}; install the same on all hosts, or ship it (make dist)"
        )


def _by_problem(found):
    """'a, b cannot read ...; c sees ...' from (host, problem) pairs."""
    hosts: dict[str, set[str]] = {}
    for host, problem in found:
        hosts.setdefault(problem, set()).add(host)
    return "; ".join(f"{shown(', '.join(sorted(names)), 300)} {problem}" for problem, names in sorted(hosts.items()))

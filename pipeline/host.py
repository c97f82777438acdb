"""A host: the memory that it has left within its control group, its disk, a lock among its processes."""

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUPS = (  # limit, use, and statistics, version 2 and version 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)
CACHED = ("inactive_file", "total_inactive_file")  # file pages that the kernel gives up when it needs them


def free_memory() -> int:
    """Bytes that processes can still take: what the kernel has, or what the control group allows, if that is less."""
    free = psutil.virtual_memory().available
    for limit, used, statistics in CGROUPS:
        try:
            allowed = int(Path(limit).read_text()) - int(Path(used).read_text()) + _cached(Path(statistics))
        except (OSError, ValueError):  # no such group, or "max"
            continue
        free = min(free, max(allowed, 0))
    return free


def _cached(statistics):
    if not statistics.is_file():
        return 0
    found = dict(line.split()[:2] for line in statistics.read_text().splitlines() if line.strip())
    return max(int(found.get(name, 0)) for name in CACHED)


def free_disk(folder: Path) -> int:
    """Bytes that can be written below `folder`, or below its nearest parent that exists."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold the lock `path` of this host; the kernel frees it when the holder dies."""
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def shown_bytes(count: float) -> str:
    """A size for people.

    >>> shown_bytes(1_234_000_000), shown_bytes(56_700_000)
    ('1.2 GB', '57 MB')
    """
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"

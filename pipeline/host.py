"""A host: the memory left within its control group, its disk, a lock and folders that its processes share."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
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


def host_folder(cache_dir: str, key: str) -> Path:
    """Where this host keeps the arrays `key`; private to the user."""
    root = Path(cache_dir or tempfile.gettempdir()) / f"tagmill-{os.getuid()}"
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if root.is_symlink() or root.stat().st_uid != os.getuid():
        raise PermissionError(13, "belongs to another user", str(root))
    return root / key


def shared(folder: Path, build: Callable[[Path], None]) -> bool:
    """Have `folder` built by exactly one process of this host; whether it was this one."""
    built = False
    if not folder.is_dir():
        with alone(folder.with_name(folder.name + ".lock")):
            if not folder.is_dir():
                part = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
                try:
                    build(part)
                    os.rename(part, folder)
                    built = True
                finally:
                    shutil.rmtree(part, ignore_errors=True)
    return built


def clean(folder: Path) -> None:
    """Remove a shared folder; processes that have it mapped keep their pages."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_name(folder.name + ".lock").unlink(missing_ok=True)


def shown_bytes(count: float) -> str:
    """A size for people.

    >>> shown_bytes(1_234_000_000), shown_bytes(56_700_000)
    ('1.2 GB', '57 MB')
    """
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"

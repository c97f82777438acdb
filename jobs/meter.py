"""What a stage costs: seconds, CPU seconds and peak memory of this process and its children (JVM, Python workers)."""

import threading
import time
from types import TracebackType

import psutil

INTERVAL = 0.5  # seconds between two looks at the processes


class Meter:
    """Measures from `with` to its end.

    Memory is the proportional set size summed over the process tree, so that pages shared by workers (the mapped
    matrix) count once; where the kernel does not tell, the resident set size.
    """

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0
        self.peak_bytes = 0
        self._stop = threading.Event()

    def __enter__(self) -> "Meter":
        self._started = time.monotonic()
        self._cpu: dict[tuple[int, float], float] = {}
        self._before = _cpu_by_process()
        self._thread = threading.Thread(target=self._watch, name="meter", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self._look()
        self.seconds = time.monotonic() - self._started
        # a process that has ended counts with what it had at the last look
        self.cpu_seconds = sum(spent - self._before.get(process, 0.0) for process, spent in self._cpu.items())

    def facts(self) -> dict[str, float | int]:
        return {
            "seconds": round(self.seconds, 3),
            "cpu_seconds": round(self.cpu_seconds, 3),
            "peak_bytes": self.peak_bytes,
        }

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._look()

    def _look(self) -> None:
        self.peak_bytes = max(self.peak_bytes, tree_bytes())
        self._cpu.update(_cpu_by_process())


def tree() -> list[psutil.Process]:
    """This process and all its descendants."""
    me = psutil.Process()
    return [me, *me.children(recursive=True)]


def tree_bytes() -> int:
    """Memory of the process tree in bytes."""
    total = 0
    for process in tree():
        try:
            memory = process.memory_full_info()
            total += getattr(memory, "pss", 0) or memory.rss
        except psutil.Error:
            continue
    return total


def _cpu_by_process() -> dict[tuple[int, float], float]:
    spent = {}
    for process in tree():
        try:
            times = process.cpu_times()
            spent[process.pid, process.create_time()] = times.user + times.system
        except psutil.Error:
            continue
    return spent

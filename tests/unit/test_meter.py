import subprocess
import sys
import threading
import time

from jobs.meter import Meter, tree_bytes

# works, says so, and stays until it is let go: a process that has ended counts with what it had when last seen
BURN = """
import sys, time
while time.process_time() < 0.5:
    pass
print("done", flush=True)
sys.stdin.read()
"""
HOLD = """
import sys
held = b"x" * 100_000_000
print("done", flush=True)
sys.stdin.read()
"""
# the work is done by a child of the child
NESTED = "import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', sys.argv[1]], check=True)"


class Child:
    def __init__(self, *command):
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self):
        assert self.process.stdout.readline() == "done\n"
        return self

    def __exit__(self, *error):
        self.process.communicate()


def test_cpu_of_children_and_of_their_children_counts():
    meter = Meter()
    meter.__enter__()
    with Child(BURN), Child(NESTED, BURN):
        meter.__exit__(None, None, None)
    assert 0.9 < meter.cpu_seconds < 10


def test_cpu_spent_before_does_not_count():
    with Child(BURN):
        with Meter() as meter:
            pass
        assert meter.cpu_seconds < 0.4


def test_own_cpu_counts():
    with Meter() as meter:
        started = time.process_time()
        while time.process_time() - started < 0.3:
            pass
    assert 0.2 < meter.cpu_seconds < 10


def test_memory_of_a_child_counts_at_its_peak(monkeypatch):
    monkeypatch.setattr("jobs.meter.INTERVAL", 0.02)
    before = tree_bytes()
    with Meter() as meter, Child(HOLD):
        peak_seen = threading.Event()
        while not peak_seen.wait(0.02):
            if meter.peak_bytes > before + 90_000_000:
                peak_seen.set()
    # the child is gone at the end, its peak is not
    assert before + 90_000_000 < meter.peak_bytes < before + 400_000_000
    assert tree_bytes() < meter.peak_bytes - 50_000_000


def test_facts_are_numbers_and_the_watch_ends_with_the_block():
    with Meter() as meter:
        time.sleep(0.01)
    facts = meter.facts()
    assert set(facts) == {"seconds", "cpu_seconds", "peak_bytes"}
    assert facts["seconds"] >= 0.01
    assert facts["peak_bytes"] > 1_000_000
    assert not [t for t in threading.enumerate() if t.name == "meter"]


def test_an_exception_passes_and_is_measured():
    meter = Meter()
    try:
        with meter:
            raise ValueError
    except ValueError:
        pass
    assert meter.peak_bytes > 0
    assert not [t for t in threading.enumerate() if t.name == "meter"]

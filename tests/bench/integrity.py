"""What it costs that nothing is lost: hashes, fsync, manifests and accounting, as a share of a fit's wall time."""

import collections
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.processes import ROOT, Skipped
from tests.bench.report import Report, number
from tests.site import patched

CORPUS = "arxiv2010s"
GOAL = 0.05
GUARDS = {
    "pipeline.storage": ("digest", "sync_file", "sync_folder"),
    "pipeline.store": ("write_json", "write_bytes", "fingerprint"),
    "pipeline.sources": ("_digest",),
    "pipeline.code": ("code_version",),
}
COLUMNS = {"guard": str, "calls": number(0), "s": number(2), "of the fit": number(2, percent=True)}


def integrity(options):
    report = Report("integrity", "time in the guards of a fit, all processes added up", COLUMNS, [], [], [])
    corpus = (options.corpora or (CORPUS,))[0]
    path = Path(os.environ.get("TAGMILL_DATA", "")) / corpus / "documents.parquet"
    if not path.is_file():
        raise Skipped(f"{corpus} is not there; TAGMILL_DATA names the folder of corpora")
    with tempfile.TemporaryDirectory() as folder:
        times = Path(folder) / "times"
        environment = patched(**{module: "tests.bench.integrity:timed" for module in GUARDS}) | {
            "GUARD_TIMES": str(times)
        }
        command = [str(Path(sys.executable).parent / "tagmill"), "fit", "--input", str(path), "--run", f"{folder}/run"]
        began = time.monotonic()
        command += ["--set", "mlflow.enabled=false"]
        subprocess.run(command, check=True, env=os.environ | environment, cwd=ROOT, stdout=subprocess.DEVNULL)
        wall = time.monotonic() - began
        spent: dict[str, list[float]] = collections.defaultdict(list)
        for line in times.read_text().splitlines():
            name, seconds = json.loads(line)
            spent[name].append(seconds)
    for name, seconds in sorted(spent.items(), key=lambda item: -sum(item[1])):
        report.rows.append({"guard": name, "calls": len(seconds), "s": sum(seconds), "of the fit": sum(seconds) / wall})
    total = sum(sum(seconds) for seconds in spent.values())
    report.rows.append({"guard": "all", "s": total, "of the fit": total / wall})
    report.notes.append(
        f"A fit of {corpus} with default settings took {wall:.1f} s. The guards took {total / wall:.2%} of it, counted "
        f"as if no two ran at once (goal: at most {GOAL:.0%}). A guard within another counts once, for the outer."
    )
    return report


_inside = False


def timed(module) -> None:
    """Have the guards of a module write their names and seconds to the file GUARD_TIMES."""
    for name in GUARDS[module.__name__]:
        setattr(module, name, _timed(getattr(module, name)))


def _timed(function):
    @functools.wraps(function)
    def measured(*arguments, **named):
        global _inside
        if _inside:
            return function(*arguments, **named)
        _inside, began = True, time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            _inside = False
            line = json.dumps([function.__name__.lstrip("_"), time.perf_counter() - began]) + "\n"
            descriptor = os.open(os.environ["GUARD_TIMES"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.write(descriptor, line.encode())
            os.close(descriptor)

    return measured

"""Seconds from the start of a process to its first solved group, with numba's cache empty and filled.

python -m tests.bench.start MATRIX LOCKS        (one process, as the part `start` starts it)
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from pipeline.config import TrainConfig
from pipeline.learners.matrix import open_shared
from pipeline.learners.ovr import fit_block, warm_up
from pipeline.learners.placement import label_groups
from tests.bench.matrices import made, read
from tests.bench.processes import Skipped, output
from tests.bench.processes import start as process
from tests.bench.report import Report, number

CORPUS = "reuters21578_r90"
COMPILED = 2.5  # times the CPU seconds that the same step takes where the cache is filled
COLUMNS = {
    "numba's cache": str,
    "imports s": number(1),
    "kernels s": number(1),
    "kernels CPU s": number(1),
    "first group s": number(2),
    "first group CPU s": number(2),
    "start to first group s": number(1),
    "compiled in": str,
}


def start(options):
    report = Report("start", "from the start of a job to its first solved group of sixteen", COLUMNS, [], [], [])
    corpus = (options.corpora or (CORPUS,))[0]
    try:
        matrix = made(corpus)
    except LookupError as why:
        raise Skipped(str(why)) from why
    with tempfile.TemporaryDirectory() as folder:
        matrix = _mapped(read(matrix), Path(folder) / "matrix")
        one, two = Path(folder) / "one", Path(folder) / "two"
        rows = [("empty", *_run(matrix, one, 1)), ("filled", *_run(matrix, one, 1))]
        rows += [("empty, two at once", found) for found in _run(matrix, two, 2)]
    filled = rows[1][1]
    for name, found in rows:
        steps = [step for step in ("kernels", "first group") if _cpu(found, step) > COMPILED * _cpu(filled, step)]
        report.rows.append({"numba's cache": name, **found, "compiled in": " and ".join(steps) or "–"})
    count = sum(row["compiled in"] != "–" for row in report.rows[2:])
    report.notes.append(
        f"Of two processes that started at once on an empty cache {count} compiled (goal: at most 1): a step counts as "
        f"compiled where it took more than {COMPILED:g} times the CPU seconds that it takes on a filled cache."
    )
    report.notes.append(
        "A process imports, compiles or reads the kernels under the lock of the host (ovr.warm_up), maps the matrix as "
        f"the stage does and fits the first group (ovr.fit_block, defaults, {corpus})."
    )
    return report


def _cpu(found, step):
    return found[f"{step} CPU s"]


def _mapped(found, folder):
    """The training rows as the stage has them on a host."""
    folder.mkdir()
    arrays = found.X._asdict() | {"fold": found.gold.fold, "gold_indptr": found.gold.indptr}
    for name, array in (arrays | {"gold_rows": found.gold.rows}).items():
        np.save(folder / f"{name}.npy", np.atleast_1d(array))
    return folder


def _run(matrix, folder, count):
    """What `count` processes say that start at once and share the cache and the locks in `folder`."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.bench.start", matrix, folder]
    began = time.monotonic()
    started = [process(command, NUMBA_CACHE_DIR=str(folder / "cache")) for _ in range(count)]
    found = [json.loads(output(child)) for child in started]
    return [
        {
            "imports s": said["imported"] - began,
            "kernels s": said["ready"] - said["imported"],
            "kernels CPU s": said["ready CPU"] - said["imported CPU"],
            "first group s": said["solved"] - said["ready"],
            "first group CPU s": said["solved CPU"] - said["ready CPU"],
            "start to first group s": said["solved"] - began,
        }
        for said in found
    ]


def main(matrix: str, locks: str) -> None:
    said = {}

    def note(event):
        said[event], said[f"{event} CPU"] = time.monotonic(), time.process_time()

    cfg = TrainConfig()
    note("imported")
    warm_up(Path(locks), cfg)
    note("ready")
    X, gold, _ = open_shared(Path(matrix))
    fit_block(label_groups(np.diff(gold.indptr), cfg.labels_per_block)[0], X, gold, cfg)
    note("solved")
    print(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The shared matrix: one builder a host, and the same bytes however the tables are cut into parts."""

import multiprocessing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.learners import matrix
from pipeline.tables import TABLES


def write(folder: Path, parts: int, n: int = 60_000):
    """features, folds and documents of n short rows, cut into parts."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(0, 6, n)
    values = rng.random(lengths.sum()).astype(np.float32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    indices = rng.integers(0, 1000, lengths.sum()).astype(np.int32)
    fold = rng.integers(-1, 3, n).astype(np.int32)
    gold = [["a"] if i % 3 == 0 else ["b", "a"] if i % 5 == 0 else [] for i in range(n)]
    lists = [pa.ListArray.from_arrays(pa.array(offsets), pa.array(x)) for x in (indices, values)]
    row = pa.array(np.arange(n))
    text = pa.array([""] * n)
    tables = {
        "features": pa.table([row, *lists], schema=TABLES["features"].schema),
        "folds": pa.table({"row": row, "fold": fold}),
        "documents": pa.table({"row": row, "doc_id": text, "text": text, "labels": gold}),
    }
    files = {name: [] for name in tables}
    edges = np.linspace(0, n, parts + 1).astype(int)
    for name, table in tables.items():
        for k in range(parts):
            path = folder / f"{name}-{parts}-{k}.parquet"
            pq.write_table(table.slice(edges[k], edges[k + 1] - edges[k]), path)
            files[name].append(path)
    return files["features"], files["folds"], files["documents"], lengths, values, fold, gold


def built(folder, *files):
    folder.mkdir()
    matrix.build(folder, *files, ["a", "b"], 1000)
    return {name: (folder / f"{name}.npy").read_bytes() for name in matrix.ARRAYS}


def test_parts_change_no_byte(tmp_path):
    whole = built(tmp_path / "one", *write(tmp_path, 1)[:3])
    assert built(tmp_path / "seven", *write(tmp_path, 7)[:3]) == whole


def test_arrays_are_those_of_the_training_rows(tmp_path):
    *files, lengths, values, fold, gold = write(tmp_path, 3, n=500)
    built(tmp_path / "m", *files)
    X, Y = matrix.open_shared(tmp_path / "m")
    kept = np.flatnonzero(fold >= 0)
    starts = np.cumsum(lengths) - lengths
    assert X.size == kept.size
    assert X.features == 1000
    for i, row in enumerate(kept):
        mine = values[starts[row] : starts[row] + lengths[row]]
        np.testing.assert_array_equal(X.data[X.indptr[i] : X.indptr[i + 1]], mine)
        assert X.squares[i] == pytest.approx(1 + np.sum(mine.astype(float) ** 2), rel=1e-6)
    for j, label in enumerate(["a", "b"]):
        assert Y.positives(j).tolist() == [i for i, row in enumerate(kept) if label in gold[row]]
    assert Y.fold.tolist() == fold[kept].tolist()


def _open(folder, log):
    def build(part):
        with open(log, "a") as file:
            file.write("built\n")
        (part / "x").write_text("1")

    matrix.shared(Path(folder), build)


def test_one_process_builds_and_the_others_wait(tmp_path):
    folder, log = matrix.host_folder(str(tmp_path), "m"), tmp_path / "log"
    context = multiprocessing.get_context("fork")
    crowd = [context.Process(target=_open, args=(folder, log)) for _ in range(8)]
    for process in crowd:
        process.start()
    for process in crowd:
        process.join(60)
        assert process.exitcode == 0
    assert log.read_text() == "built\n"
    assert folder.parent.stat().st_mode & 0o777 == 0o700
    matrix.clean(folder)
    assert not folder.exists()

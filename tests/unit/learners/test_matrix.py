"""The shared matrix: one builder a host, and the same bytes however the tables are cut into parts."""

import multiprocessing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import host
from pipeline.errors import DataError
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
    text = pa.array([f"d{i}" for i in range(n)])
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
    X, Y, start = matrix.open_shared(tmp_path / "m")
    assert start is None
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


@pytest.mark.parametrize("parts", [1, 7])
def test_rows_of_the_matrix_have_the_names_of_their_documents(tmp_path, parts):
    *files, _, _, fold, _ = write(tmp_path, parts, n=500)
    built(tmp_path / "m", *files)
    kept = np.flatnonzero(fold >= 0)
    for rows in ([5, 0, 5, kept.size - 1], [], range(kept.size)[::-1]):
        found = matrix.named(tmp_path / "m", np.array(rows, np.int64)).to_pydict()
        assert found == {"row": [kept[i] for i in rows], "doc_id": [f"d{kept[i]}" for i in rows]}


def _open(folder, log, queue):
    def build(part):
        with open(log, "a") as file:
            file.write("built\n")
        (part / "x").write_text("1")

    queue.put(host.shared(Path(folder), build))


def test_one_process_builds_and_the_others_wait(tmp_path):
    folder, log = host.host_folder(str(tmp_path), "m"), tmp_path / "log"
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    crowd = [context.Process(target=_open, args=(folder, log, queue)) for _ in range(8)]
    for process in crowd:
        process.start()
    for process in crowd:
        process.join(60)
        assert process.exitcode == 0
    assert log.read_text() == "built\n"
    assert sorted(queue.get(timeout=10) for _ in crowd) == [False] * 7 + [True]
    assert folder.parent.stat().st_mode & 0o777 == 0o700
    host.clean(folder)
    assert not folder.exists()


@pytest.mark.parametrize("place", [0, 2, -1])  # the first of a row follows the last of the one before
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_with_its_row(tmp_path, value, place):
    features, folds, documents, lengths, *_, fold, _ = write(tmp_path, 2, n=400)
    row = next(i for i in range(300, 400) if fold[i] >= 0 and lengths[i] > 2)
    part = pq.read_table(features[1])
    lists = part["values"].to_pylist()
    lists[row - 200][place] = value
    where = part["indices"].to_pylist()[row - 200][place]
    values = pa.array(lists, pa.list_(pa.float32()))
    pq.write_table(part.set_column(part.schema.get_field_index("values"), "values", values), features[1])
    (tmp_path / "m").mkdir()
    with pytest.raises(DataError, match=rf"{features[1].name}: row {row} has {value} for feature {where}; expected"):
        matrix.build(tmp_path / "m", features, folds, documents, ["a", "b"], 1000)


def test_earlier_models_come_by_name(tmp_path):
    """Yesterday's labels b, c, a are today's 0 = a, 1 = b, 2 = new; c is gone and a had failed."""
    models = [
        {"label_id": 0, "bias": -1.5, "indices": [2, 5], "weights": [0.5, -0.25], "status": "ok"},
        {"label_id": 1, "bias": 3.0, "indices": [1], "weights": [1.0], "status": "not_converged"},
        {"label_id": 2, "bias": 9.0, "indices": [], "weights": [], "status": "failed: no memory"},
    ]
    rest = {"C": 1.0, "positive_weight": 1.0, "epochs": 1, "gap": 0.0, "solver_gap": 0.0, "objective": 0.0}
    table = pa.Table.from_pylist([{**rest, **row} for row in models], schema=TABLES["label_models"].schema)
    pq.write_table(table, tmp_path / "models.parquet")
    built(tmp_path / "m", *write(tmp_path, 1, n=50)[:3])
    matrix.add_start(tmp_path / "m", [tmp_path / "models.parquet"], ["a", "b", "new"], ["b", "c", "a"])
    *_, start = matrix.open_shared(tmp_path / "m")
    W = start.weights_of([1, 0, 2], 1000).reshape(-1, 16)
    assert W[-1, 0] == -1.5
    assert np.isnan(W[-1, 1:]).all()
    assert np.flatnonzero(W[:-1].any(axis=1)).tolist() == [2, 5]
    assert W[[2, 5], 0].tolist() == [0.5, -0.25]

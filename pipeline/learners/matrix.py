"""The training matrix of a host: built once, memory-mapped by every worker on it.

    features, folds, documents (labels)  ->  indptr, indices, data, squares, fold, gold  (one .npy each), names

One process builds, under a lock; the others wait and map.  The folder is named by the fingerprint of its content, so a
later run with the same features finds it again and a different one never mixes with it.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import DataError
from pipeline.kernels.lockstep import Rows, row_squares
from pipeline.learners.ovr import Gold, Start
from pipeline.storage import read_table
from pipeline.tables import TABLES

ARRAYS = ("indptr", "indices", "data", "squares", "fold", "gold_indptr", "gold_rows")
START = ("start_indptr", "start_indices", "start_weights", "start_bias")
NAMES = "names.arrow"  # row and doc_id of every training row, a record batch for each part of `documents`


def build(folder: Path, feature_files, fold_files, document_files, labels: list[str], features: int) -> None:
    """Write the arrays of all training rows (fold >= 0), in row order, to `folder`.

    Parts are read one at a time; memory stays at one part and what is appended.  Raises DataError naming the row where
    a value is not finite.
    """
    fold = np.concatenate([_column(path, "fold") for path in fold_files] or [np.empty(0, np.int32)])
    training = fold >= 0
    with _appending(folder, "indices", np.int32) as indices, _appending(folder, "data", np.float32) as data:
        lengths, squares = [np.zeros(1, np.int64)], []
        for path in feature_files:
            part = read_table(path).combine_chunks()
            part = part.filter(pa.array(training[part["row"].to_numpy()])).combine_chunks()
            count = pc.list_value_length(part["indices"]).to_numpy().astype(np.int64)
            values = pc.list_flatten(part["values"]).to_numpy()
            _refuse_not_finite(path, part, count, values)
            indices(pc.list_flatten(part["indices"]).to_numpy())
            data(values)
            lengths.append(count)
            squares.append(row_squares(count, values))
    np.save(folder / "indptr.npy", np.cumsum(np.concatenate(lengths)))
    np.save(folder / "squares.npy", np.concatenate(squares or [np.empty(0, np.float32)]))
    np.save(folder / "fold.npy", fold[training].astype(np.int8))
    write_names(folder, document_files, training)
    gold_indptr, gold_rows = gold_by_label(document_files, labels, training)
    np.save(folder / "gold_indptr.npy", gold_indptr)
    np.save(folder / "gold_rows.npy", gold_rows)
    np.save(folder / "features.npy", np.array([features]))


def _refuse_not_finite(path, part, count, values):
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        place = int(np.searchsorted(np.cumsum(count), bad[0], side="right"))
        feature = pc.list_flatten(part["indices"]).to_numpy()[bad[0]]
        raise DataError(
            f"{path}: row {part['row'][place].as_py()} has {values[bad[0]]} for feature {feature}; "
            f"expected finite values ({bad.size} are not); run featurize again, or reject that document"
        )


def add_start(folder: Path, model_files, names: list[str], earlier_names: list[str]) -> None:
    """Write earlier models, turned to the labels of this run, beside the arrays (see `ovr.Start`)."""
    number = {name: label_id for label_id, name in enumerate(names)}
    found: dict[int, tuple] = {}
    for path in model_files:
        part = read_table(path, columns=["label_id", "bias", "indices", "weights", "status"]).combine_chunks()
        for row in range(part.num_rows):
            label_id = number.get(earlier_names[part["label_id"][row].as_py()])
            if label_id is not None and part["status"][row].as_py().startswith(("ok", "not_converged")):
                found[label_id] = (
                    part["indices"][row].values.to_numpy(),
                    part["weights"][row].values.to_numpy(),
                    part["bias"][row].as_py(),
                )
    lengths = [found[label_id][0].size if label_id in found else 0 for label_id in range(len(names))]
    bias = [found[label_id][2] if label_id in found else np.nan for label_id in range(len(names))]
    np.save(folder / "start_indptr.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    for k, (name, dtype) in enumerate((("start_indices", np.int32), ("start_weights", np.float32))):
        pieces = [np.empty(0, dtype), *(found[label_id][k] for label_id in sorted(found))]
        np.save(folder / f"{name}.npy", np.concatenate(pieces).astype(dtype))
    np.save(folder / "start_bias.npy", np.array(bias, np.float32))


def write_names(folder: Path, document_files, kept: np.ndarray) -> None:
    """Row and doc_id of the kept rows, for `named`."""
    schema = pa.schema([TABLES["documents"].schema.field(name) for name in ("row", "doc_id")])
    with pa.ipc.new_file(folder / NAMES, schema) as file:
        for path in document_files:
            part = read_table(path, columns=schema.names)
            part = part.filter(pa.array(kept[part["row"].to_numpy()])).cast(schema).combine_chunks()
            file.write_table(part)


def named(folder: Path, rows: np.ndarray) -> pa.Table:
    """Row in `documents` and doc_id of some training rows, (m,) int64 in any order; only their pages are read."""
    wanted, place = np.unique(rows, return_inverse=True)
    found = []
    with pa.memory_map(str(folder / NAMES)) as source:
        file = pa.ipc.open_file(source)
        first = 0
        for number in range(file.num_record_batches):
            batch = file.get_batch(number)
            here = wanted[slice(*np.searchsorted(wanted, [first, first + batch.num_rows]))]
            found.append(batch.take(pa.array(here - first)))
            first += batch.num_rows
        return pa.Table.from_batches(found, file.schema).take(pa.array(place))


def gold_by_label(document_files, labels: list[str], kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows that carry each label, counted among the kept rows: indptr (L + 1,) int64, rows int32 ascending."""
    place = np.cumsum(kept) - 1
    rows, ids = [], []
    for path in document_files:
        part = read_table(path, columns=["row", "labels"]).combine_chunks()
        row, label_id = gold_pairs(part, labels)
        mask = kept[row]
        rows.append(place[row[mask]].astype(np.int32))
        ids.append(label_id[mask])
    row_of, label_of = (np.concatenate([np.empty(0, np.int32), *x]) for x in (rows, ids))
    order = np.argsort(label_of, kind="stable")
    indptr = np.concatenate([[0], np.cumsum(np.bincount(label_of, minlength=len(labels)))]).astype(np.int64)
    return indptr, row_of[order]


def gold_pairs(documents: pa.Table, labels: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(row, label_id) of every assignment whose label is in `labels` (sorted), rows in order."""
    flat = pc.list_flatten(documents["labels"])
    parent = pc.list_parent_indices(documents["labels"])
    row = documents["row"].to_numpy()[parent.to_numpy()]
    found = pc.index_in(flat, value_set=pa.array(labels, pa.string()))
    mask = pc.is_valid(found).to_numpy()
    return row[mask], found.to_numpy(zero_copy_only=False)[mask].astype(np.int32)


def open_shared(folder: Path) -> tuple[Rows, Gold, Start | None]:
    """Map the arrays of a built folder."""
    present = [*ARRAYS, *(START if (folder / f"{START[0]}.npy").exists() else ())]
    # the kernels want plain arrays: a view on the same pages
    a = {name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)) for name in present}
    features = int(np.load(folder / "features.npy", allow_pickle=False)[0])
    rows = Rows(a["indptr"], a["indices"], a["data"], a["squares"], features)
    start = Start(*(a[name] for name in START)) if START[0] in a else None
    return rows, Gold(a["gold_indptr"], a["gold_rows"], a["fold"]), start


def _column(path, name):
    return read_table(path, columns=[name])[name].to_numpy()


class _appending:
    """A one-dimensional .npy file that grows; the header is written when the length is known."""

    def __init__(self, folder, name, dtype):
        self.path, self.dtype, self.size = folder / f"{name}.npy", np.dtype(dtype), 0
        self.offset = 128

    def __enter__(self):
        self.file = open(self.path, "wb")
        self.file.write(b" " * self.offset)
        return self

    def __call__(self, values):
        np.ascontiguousarray(values, self.dtype).tofile(self.file)
        self.size += len(values)

    def __exit__(self, *_):
        header = str({"descr": self.dtype.str, "fortran_order": False, "shape": (self.size,)})
        start = b"\x93NUMPY\x01\x00" + (self.offset - 10).to_bytes(2, "little")
        self.file.seek(0)
        self.file.write(start + header.ljust(self.offset - 11).encode() + b"\n")
        self.file.close()

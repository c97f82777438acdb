"""Matrices of the real corpora for the benchmarks, made by the library's own functions without Spark, kept as .npy.

    python -m tests.bench.matrices CORPUS [FOLDER]        (TAGMILL_DATA names the folder of corpora)

FOLDER/CORPUS, where FOLDER is TAGMILL_BENCH or lies below the temporary folder unless given, then holds

    indptr, indices, data    training rows, CSR, TF-IDF, no bias column
    test_*                   the same of the test rows
    features                 how many there are
    fold                     0 to 2 for each training row, by hash of doc_id
    gold_indptr, gold_rows   the training rows of each label;  test_gold_*: of the test rows
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from pipeline.config import Config
from pipeline.kernels.lockstep import Rows, row_squares
from pipeline.learners.ovr import Gold
from pipeline.learners.vectorizer import Vocabulary, batches, count_documents, one_array, vectorize
from pipeline.stages.featurize import choose_terms
from pipeline.stages.parts import hashes

FOLDS = 3
LAST = "fold.npy"  # written when all else is there


class Corpus(NamedTuple):
    """Training and test rows of a corpus with their gold labels."""

    X: Rows
    gold: Gold
    X_test: Rows
    test_gold: Gold  # its fold is 0 throughout


def corpus(name: str, folder: Path | None = None) -> Corpus:
    """The matrices of corpus `name`, made on first use."""
    return read(made(name, folder))


def made(name: str, folder: Path | None = None) -> Path:
    """Where the matrices of corpus `name` are, made on first use.  LookupError says why they cannot be."""
    root = folder or os.environ.get("TAGMILL_BENCH") or Path(tempfile.gettempdir()) / f"tagmill-bench-{os.getuid()}"
    folder = Path(root) / name
    if not (folder / LAST).exists():
        data = os.environ.get("TAGMILL_DATA")
        if not data:
            raise LookupError(f"TAGMILL_DATA is not set; it names the folder of corpora that holds {name}")
        if not (Path(data) / name / "documents.parquet").exists():
            raise LookupError(f"TAGMILL_DATA has no {name}/documents.parquet")
        folder.mkdir(parents=True, exist_ok=True)
        _make(Path(data) / name, folder)
    return folder


def read(folder: Path) -> Corpus:
    """The matrices in `folder`."""

    def load(name):
        return np.load(folder / f"{name}.npy", allow_pickle=False)

    def side(prefix, fold):
        indptr, data = load(f"{prefix}indptr"), load(f"{prefix}data")
        squares = row_squares(np.diff(indptr), data)
        rows = Rows(indptr, load(f"{prefix}indices"), data, squares, int(load("features")[0]))
        return rows, Gold(load(f"{prefix}gold_indptr"), load(f"{prefix}gold_rows"), fold(rows.size))

    return Corpus(*side("", lambda _: load("fold")), *side("test_", lambda n: np.zeros(n, np.int8)))


def _make(source, folder):
    table = pq.read_table(source / "documents.parquet").combine_chunks()
    doc_id, split = table["doc_id"].cast(pa.string()), _split(source, table)
    train, test = np.flatnonzero(split == "train"), np.flatnonzero(split == "test")
    train = train[np.argsort(hashes(doc_id, "order")[train], kind="stable")]  # as the pipeline orders rows
    cfg = Config().featurize
    vocabulary = _vocabulary(table.select(["text"]).take(train), cfg)
    names = pc.unique(pc.list_flatten(table["labels"])).sort()
    for prefix, chosen in (("", train), ("test_", test)):
        part = table.select(["text", "labels"]).take(chosen)
        for name, array in (_rows(part, vocabulary, cfg) | _gold(part["labels"], names)).items():
            np.save(folder / f"{prefix}{name}.npy", array)
    np.save(folder / "features.npy", np.array([vocabulary.ids.size]))
    np.save(folder / LAST, (hashes(doc_id.take(train), "fold 0") % np.uint64(FOLDS)).astype(np.int8))


def _split(source, table):
    """train, dev or test of each document, (n,) object: as suggested beside the corpus, or as it says itself."""
    if not (source / "suggested_split.csv").exists():
        return np.array(table["split"].to_pylist(), object)
    as_text = pyarrow.csv.ConvertOptions(column_types={"doc_id": pa.string()})
    given = pyarrow.csv.read_csv(source / "suggested_split.csv", convert_options=as_text)
    place = pc.index_in(table["doc_id"].cast(pa.string()), value_set=given["doc_id"].combine_chunks())
    return np.array(given["split"].take(place).to_pylist(), object)


def _vocabulary(texts, cfg):
    counted = [count_documents(one_array(batch["text"]), cfg.ngrams) for batch in batches(texts)]
    merged = pa.concat_tables(counted).group_by("hash").aggregate([("df", "sum"), ("term", "min")])
    merged = merged.select(["hash", "df_sum", "term_min"]).rename_columns(["hash", "df", "term"])
    frequent = merged.filter(pc.greater_equal(merged["df"], cfg.min_df))
    return Vocabulary.from_table(choose_terms(frequent, texts.num_rows, cfg))


def _rows(texts, vocabulary, cfg):
    parts = [vectorize(one_array(b["text"]), vocabulary, cfg.ngrams, cfg.sublinear) for b in batches(texts)]
    lengths = np.concatenate([[0], *(np.diff(indptr) for indptr, _, _ in parts)])
    return {
        "indptr": np.cumsum(lengths).astype(np.int64),
        "indices": np.concatenate([indices for _, indices, _ in parts]).astype(np.int32),
        "data": np.concatenate([values for _, _, values in parts]).astype(np.float32),
    }


def _gold(labels, names):
    labels = labels.combine_chunks()
    row = pc.list_parent_indices(labels).to_numpy()
    label = pc.index_in(pc.list_flatten(labels), value_set=names).to_numpy()
    counts = np.bincount(label, minlength=len(names))
    return {
        "gold_indptr": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        "gold_rows": row[np.lexsort((row, label))].astype(np.int32),
    }


if __name__ == "__main__":
    found = corpus(sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else None)
    print(f"{found.X.size:,} rows, {found.X.indices.size:,} non-zeros, {found.X.features:,} features")

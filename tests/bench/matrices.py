"""Matrices of the real corpora for the benchmarks, made by the library's own functions without Spark, kept as .npy.

python -m tests.bench.matrices eurlex57k FOLDER        (TAGMILL_DATA names the folder of corpora)

indptr, indices, data    training rows, CSR, TF-IDF, no bias column
test_*                   the same of the test rows
fold                     0 to 2 for each training row, by hash of doc_id
gold_indptr, gold_rows   the training rows of each label;  test_gold_*: of the test rows
"""

import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from pipeline.config import Config
from pipeline.kernels.lockstep import Rows, row_squares
from pipeline.learners.ovr import Gold
from pipeline.learners.vectorizer import Vocabulary, batches, count_documents, one_array, vectorize
from pipeline.stages.featurize import _merged, choose_terms
from pipeline.stages.parts import hashes

NAMES = ("indptr", "indices", "data", "gold_indptr", "gold_rows")


class Corpus(NamedTuple):
    """Training and test rows of a corpus with their gold labels."""

    X: Rows
    gold: Gold
    X_test: Rows
    test_gold: Gold  # its fold is 0 throughout


def corpus(name: str, folder: Path | None = None) -> Corpus:
    """The matrices of corpus `name`; made on first use, then read from `folder` (default: TAGMILL_BENCH or /tmp)."""
    folder = Path(folder or os.environ.get("TAGMILL_BENCH") or f"/tmp/tagmill-bench-{os.getuid()}") / name
    if not (folder / "fold.npy").exists():
        folder.mkdir(parents=True, exist_ok=True)
        _make(Path(os.environ["TAGMILL_DATA"]) / name, folder)
    a = {path.stem: np.load(path, allow_pickle=False) for path in folder.glob("*.npy")}
    d = int(a["features"][0])

    def side(prefix, fold):
        indptr, indices, data, gold_indptr, gold_rows = (a[prefix + name] for name in NAMES)
        rows = Rows(indptr, indices, data, row_squares(np.diff(indptr), data), d)
        return rows, Gold(gold_indptr, gold_rows, fold)

    return Corpus(*side("", a["fold"]), *side("test_", np.zeros(a["test_indptr"].size - 1, np.int8)))


def _make(source, folder):
    table = pq.read_table(source / "documents.parquet").combine_chunks()
    split = np.array(table["split"].to_pylist(), object)
    if (source / "suggested_split.csv").exists():
        as_text = pyarrow.csv.ConvertOptions(column_types={"doc_id": pa.string()})
        given = pyarrow.csv.read_csv(source / "suggested_split.csv", convert_options=as_text)
        by_id = dict(zip(given["doc_id"].to_pylist(), given["split"].to_pylist(), strict=True))
        split = np.array([by_id[d] for d in table["doc_id"].to_pylist()], object)
    cfg = Config()
    train = np.flatnonzero(split == "train")
    test = np.flatnonzero(split == "test")
    # as the pipeline orders rows: by a hash of the identity
    order = np.argsort(hashes(table["doc_id"].cast(pa.string()), "order")[train], kind="stable")
    train = train[order]
    texts = table.select(["doc_id", "text", "labels"])
    counted = []
    for batch in batches(texts.take(train)):
        counted.append(count_documents(one_array(batch["text"]), cfg.featurize.ngrams))
        if len(counted) > 8:
            counted = [_merged(counted)]
    merged = _merged(counted)
    merged = merged.filter(
        pa.compute.greater_equal(merged["df"] if "df" in merged.column_names else merged["df_sum"], 2)
    )
    terms = choose_terms(merged.rename_columns(["hash", "df", "term"]), train.size, cfg.featurize)
    vocabulary = Vocabulary.from_table(terms)
    names = sorted({label for labels in table["labels"].to_pylist() for label in labels})
    number = {label: j for j, label in enumerate(names)}
    for prefix, rows in (("", train), ("test_", test)):
        parts = [
            vectorize(one_array(b["text"]), vocabulary, cfg.featurize.ngrams, cfg.featurize.sublinear)
            for b in batches(texts.take(rows))
        ]
        lengths = np.concatenate([np.diff(indptr) for indptr, _, _ in parts])
        np.save(folder / f"{prefix}indptr.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
        np.save(folder / f"{prefix}indices.npy", np.concatenate([i for _, i, _ in parts]).astype(np.int32))
        np.save(folder / f"{prefix}data.npy", np.concatenate([v for _, _, v in parts]).astype(np.float32))
        pairs = [(number[label], i) for i, r in enumerate(table["labels"].take(rows).to_pylist()) for label in r]
        label, row = np.array(sorted(pairs), np.int64).T
        counts = np.bincount(label, minlength=len(names))
        np.save(folder / f"{prefix}gold_indptr.npy", np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
        np.save(folder / f"{prefix}gold_rows.npy", row.astype(np.int32))
    np.save(folder / "features.npy", np.array([terms.num_rows]))
    ids = table["doc_id"].cast(pa.string()).take(train)
    np.save(folder / "fold.npy", (hashes(ids, "fold 0") % np.uint64(3)).astype(np.int8))


if __name__ == "__main__":
    found = corpus(sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else None)
    print(f"{found.X.size:,} rows, {found.X.indices.size:,} non-zeros, {found.X.features:,} features")

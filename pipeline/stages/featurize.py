"""Featurize.

    documents, folds  ->  vocabulary (feature_id, term, hash, df, idf), features (row, indices, values)

The vocabulary is exact and comes from training documents only: every term is counted by its 64-bit hash, one occurrence
gives it its name.  Feature ids go by falling document frequency, so that the weights of frequent terms lie together.
"""

import functools

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import ConfigError, DataError
from pipeline.kernels.text import smooth_idf
from pipeline.learners.vectorizer import Vocabulary, batches, count_documents, one_array, vectorize
from pipeline.stages.parts import Outcome, map_tasks, run_tasks
from pipeline.stages.poison import Guard
from pipeline.storage import Place, place, read_table
from pipeline.store import Run, write_part
from pipeline.tables import TABLES


def featurize(spark, run: Run, attempt: Place, cfg) -> Outcome:
    """Fit the vocabulary and write one TF-IDF row a document.  Raises DataError where no term is left."""
    pairs = list(zip(run.files("documents"), run.files("folds"), strict=True))
    training = run.finished("split")["documents"]["train"]
    guard = Guard.of("featurize", attempt, cfg.spark)
    if cfg.featurize.vocabulary:
        earlier = Run(cfg.featurize.vocabulary)
        ngrams = earlier.info["config"].get("featurize", {}).get("ngrams")
        if ngrams != cfg.featurize.ngrams:
            raise ConfigError(
                f"featurize.vocabulary is {earlier.root}, made with featurize.ngrams = {ngrams}; "
                f"expected {cfg.featurize.ngrams}, as this run has it"
            )
        vocabulary, collisions = earlier.read("vocabulary", verify=True), 0
    else:
        counted, collisions = count_terms(spark, pairs, guard, cfg.featurize.ngrams, cfg.featurize.min_df)
        vocabulary = choose_terms(counted, training, cfg.featurize)
    if vocabulary.num_rows == 0:
        raise DataError(
            f"no term stands in at least {cfg.featurize.min_df} of {training} training documents; "
            "expected text in the column(s) of input.text, or a lower featurize.min_df"
        )
    written = write_part(attempt, "vocabulary", vocabulary, 0)
    done = run_tasks(
        spark,
        "featurize: apply the vocabulary",
        apply_part,
        [
            (str(documents), str(attempt), number, str(attempt / written["file"]), guard, cfg.featurize)
            for number, (documents, _) in enumerate(pairs)
        ],
    )
    facts = {
        "terms": vocabulary.num_rows,
        "hash_collisions": collisions,
        "nonzeros": sum(nonzeros for _, nonzeros, _ in done),
        "documents_without_features": sum(empty for _, _, empty in done),
    }
    return Outcome({"vocabulary": [written], "features": [e for e, _, _ in done]}, facts)


def summary(facts: dict, rows: dict) -> str:
    return (
        f"{facts['terms']:,} terms, {facts['nonzeros']:,} non-zeros in {rows['features']:,} rows, "
        f"{facts['documents_without_features']:,} documents without a known term"
    )


def count_terms(spark, pairs, guard: Guard, ngrams: int, min_df: int) -> tuple[pa.Table, int]:
    """Terms on at least `min_df` training documents (hash, df, term), and how many hashes stand for two terms."""
    from pyspark.sql import functions as F

    spark.sparkContext.setJobDescription("featurize: count terms")
    counted = (
        map_tasks(spark, pairs, _term_counter(guard, ngrams), "hash bigint, df bigint, term string")
        .groupBy("hash")
        .agg(F.sum("df").alias("df"), F.min("term").alias("term"), (F.min("term") != F.max("term")).alias("collided"))
        .where(F.col("df") >= min_df)
        .toArrow()
    )
    return counted, int(pc.sum(counted["collided"].cast(pa.int64())).as_py() or 0)


def choose_terms(counted: pa.Table, n: int, cfg) -> pa.Table:
    """The table `vocabulary` from counted terms: by falling df, then by term."""
    kept = counted.filter(pc.less_equal(counted["df"], int(cfg.max_df * n)))
    kept = kept.sort_by([("df", "descending"), ("term", "ascending"), ("hash", "ascending")]).slice(0, cfg.max_features)
    df = kept["df"].to_numpy()
    columns = [np.arange(len(df), dtype=np.int32), kept["term"], kept["hash"], df, smooth_idf(df, n)]
    return pa.table(columns, schema=TABLES["vocabulary"].schema)


def _term_counter(guard, ngrams):
    def terms(batch):
        return count_documents(one_array(batch["text"]), ngrams)

    def count(pair):
        documents, folds = pair
        table = read_table(documents, columns=["doc_id", "text"])
        kept = pc.greater_equal(read_table(folds, columns=["fold"])["fold"], 0)
        partial = []
        for counted in guard.over(batches(table.filter(kept)), terms):
            partial.append(counted)
            if len(partial) > 8:
                partial = [_merged(partial)]
        if partial:
            yield from _merged(partial).to_batches(max_chunksize=50_000)

    return count


def _merged(partial):
    """Counts of the same term added up."""
    if len(partial) == 1:
        return partial[0]
    merged = pa.concat_tables(partial).group_by("hash").aggregate([("df", "sum"), ("term", "min")])
    return merged.select(["hash", "df_sum", "term_min"]).rename_columns(["hash", "df", "term"])


@functools.lru_cache(maxsize=1)
def _vocabulary(path):
    return Vocabulary.from_table(read_table(path, columns=["feature_id", "hash", "idf"]))


def apply_part(task):
    """Features of one part of documents: entry for the manifest, non-zeros, documents without a known term."""
    documents, attempt, number, vocabulary, guard, cfg = task
    known = _vocabulary(vocabulary)
    totals = [0, 0]

    def features(batch):
        return batch["row"], vectorize(one_array(batch["text"]), known, cfg.ngrams, cfg.sublinear)

    def rows():
        table = read_table(documents, columns=["row", "doc_id", "text"])
        for row, (indptr, indices, values) in guard.over(batches(table), features):
            totals[0] += indices.size
            totals[1] += int((np.diff(indptr) == 0).sum())
            offsets = pa.array(indptr.astype(np.int32))
            lists = [pa.ListArray.from_arrays(offsets, pa.array(x)) for x in (indices, values)]
            yield pa.table([row, *lists], schema=TABLES["features"].schema)

    return write_part(place(attempt), "features", rows(), number), *totals

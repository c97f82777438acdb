"""The input of a job: files, or a Spark table, which is written to files of the run before it is read."""

import dataclasses

from pipeline import sources, storage
from pipeline.errors import ConfigError, InputError, shown
from pipeline.store import Run

TABLE = "table:"


def is_table(path: str) -> bool:
    """`table:NAME` names a Spark table or view; everything else is a file, folder or glob."""
    return path.startswith(TABLE)


def location(path: str) -> str:
    """`path` as it goes into run.json: absolute, and a table by its name."""
    return path if is_table(path) else str(storage.place(path))


def planned(path: str, cfg, spark=None, need_labels: bool = True) -> sources.Plan:
    """What is to be read; of a table, which needs a session, its identity only: `exported` writes its rows."""
    if not is_table(path):
        return sources.plan(path, cfg.input, need_labels=need_labels)
    table = _table(path, cfg, spark)
    spark.sparkContext.setJobDescription("ingest: identity of the table")
    return sources.Plan((), ((path, 0, content_mark(table)),), ())


def refuse_table(path: str, root: storage.Place, option: str = "--run") -> None:
    """Raise ConfigError where `path` is a table and the run folder is in an object store."""
    if is_table(path) and isinstance(root, storage.ObjectPath):
        raise ConfigError(
            f"{shown(path)}: Spark writes a table's rows, and folders in an object store are written without it; "
            f"write the table to files and give their URI, or choose {option} on a file system that all hosts share"
        )


def exported(plan: sources.Plan, cfg, spark, run: Run, need_labels: bool = True) -> sources.Plan:
    """The plan with something to read: a table's rows go to a folder of the ingest stage, which drops it when done."""
    path, _, mark = plan.files[0]
    if not is_table(path):
        return plan
    refuse_table(path, run.root)
    folder = run.root / "ingest" / f"table-{mark}"
    storage.remove(folder)
    spark.sparkContext.setJobDescription("ingest: rows of the table")
    _table(path, cfg, spark).write.parquet(folder.as_uri())
    files = sources.plan(str(folder), cfg.input, need_labels=need_labels)
    return dataclasses.replace(files, files=((path, sum(size for _, size, _ in files.files), mark),))


def content_mark(table) -> str:
    """Count and sum of the 64-bit hashes of a DataFrame's rows: the order of rows and partitions does not matter."""
    from pyspark.sql import functions as F

    hashed = F.xxhash64(*(F.col(f"`{column}`") for column in table.columns)).cast("decimal(38,0)")
    count, total = table.agg(F.count(F.lit(1)), F.sum(hashed)).first()
    return f"{count}-{int(total or 0) & (2**128 - 1):032x}"


def _table(path, cfg, spark):
    try:
        table = spark.table(path.removeprefix(TABLE))
    except Exception as error:
        raise InputError(f"{shown(path)}: no such Spark table or view; check the name and the catalog") from error
    wanted = [cfg.input.doc_id, *cfg.input.text, cfg.input.labels, cfg.input.split]
    return table.select(*(f"`{column}`" for column in wanted if column and column in table.columns))

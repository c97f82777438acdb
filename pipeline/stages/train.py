"""Train.

    features, folds, documents (labels)  ->  label_models, curves, histograms, suspicious, weights

One Spark job; a task is a block of labels.  The matrix is mapped once per host.  A block that is done has its marker,
so a second run solves only what is missing; what a block holds depends on the data and the settings alone, never on who
solved it.  `refit` solves some labels again, or for the first time, and leaves the rows of all others as they are.
"""

import json
import logging
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from pipeline.errors import ConfigError, DataError, InputError, shown
from pipeline.host import clean, free_disk, free_memory, host_folder, shown_bytes
from pipeline.host import shared as shared_folder
from pipeline.learners import matrix, placement
from pipeline.learners.ovr import Extras, candidates, constant_rows, failed_block, fit_block, warm_up
from pipeline.learners.tagger import Weights
from pipeline.stages import poison
from pipeline.stages.parts import Outcome, hashes, run_tasks
from pipeline.storage import Place, digest, filling, link, place, read_table, sync_file
from pipeline.store import Run, entry, write_bytes, write_json, write_part
from pipeline.tables import conform

log = logging.getLogger(__name__)

BLOCK_TABLES = ("label_models", "curves", "histograms", "suspicious")
UNFINISHED = ("out_of_time", "not_selected")  # statuses of labels that were not begun


def train(spark, run: Run, attempt: Place, cfg, key: str) -> Outcome:
    """Solve the blocks that are not solved yet, then turn the models into weights by feature.

    Args:
        attempt: folder of the blocks; it stays the same for the same fingerprint, so that a killed run is resumed.
        key: names the matrix in the host's cache.

    Raises DataError where more than train.max_failed labels failed, ConfigError where a host is too small.
    """
    work = _Work(spark, run, attempt, cfg, key)
    facts, resumed = work.solved(list(enumerate(work.planned())))
    tables = {name: [f["tables"][name] for f in facts] for name in BLOCK_TABLES}
    return work.outcome(tables, facts, resumed)


def refit(spark, run: Run, attempt: Place, cfg, key: str, names: Sequence[str]) -> Outcome:
    """Solve the labels `names` only; the rows of all others are those of the finished stage, or `not_selected`.

    attempt: a folder of this refit, where a killed one goes on; parts of the finished stage that hold none of the
        labels are linked into it.

    train.budget counts only where none of the labels has a model yet: a model is not given up for a constant.
    """
    work = _Work(spark, run, attempt, cfg, key)
    number = {name: label_id for label_id, name in enumerate(work.names)}
    chosen = sorted({number[name] for name in names})
    work.late = not _trained(run, chosen)
    kept = {name: _kept_parts(run, attempt, name, chosen) for name in BLOCK_TABLES}
    first = max((int(item["file"].rsplit("-", 1)[1].split(".")[0]) + 1 for item in kept["label_models"]), default=0)
    if run.manifest("train") is None:
        others = sorted(set(range(len(work.names))) - set(chosen))
        rows = constant_rows(others, work.support, int(work.rows), "not_selected")
        kept["label_models"] = [write_part(attempt, "label_models", rows, first)]
        first += 1
    facts, resumed = work.solved(list(enumerate(work.planned(chosen), first)))
    tables = {name: [*kept[name], *(f["tables"][name] for f in facts)] for name in BLOCK_TABLES}
    outcome = work.outcome(tables, facts, resumed)
    return outcome._replace(facts={**outcome.facts, "solved_anew": len(chosen)})


def _trained(run, chosen):
    """Whether some of the labels have a model in the finished stage."""
    if run.manifest("train") is None:
        return False
    models = run.read("label_models", ["label_id", "status"])
    mine = models.filter(pc.is_in(models["label_id"], value_set=pa.array(chosen, pa.int32())))
    return any(status not in UNFINISHED for status in mine["status"].to_pylist())


def _kept_parts(run, attempt, name, chosen):
    """The parts of the finished stage without the rows of the labels `chosen`."""
    if run.manifest("train") is None:
        return []
    entries = []
    for path, item in zip(run.files(name, verify=True), run.finished("train")["tables"][name], strict=True):
        number = int(path.stem.rsplit("-", 1)[1])
        ids = read_table(path, columns=["label_id"])["label_id"]
        mask = pc.is_in(ids, value_set=pa.array(chosen, pa.int32()))
        if pc.any(mask).as_py():
            entries.append(write_part(attempt, name, read_table(path).filter(pc.invert(mask)), number))
        else:
            link(path, attempt / path.name)
            entries.append(item)
    return entries


class _Work:
    """The labels of a run, and the job that solves some of them."""

    def __init__(self, spark, run: Run, attempt: Place, cfg, key: str):
        self.spark, self.run, self.attempt, self.cfg, self.key = spark, run, attempt, cfg, key
        self.began = time.time()
        self.support = run.read("label_support")["train"].to_numpy()
        self.names = run.read("labels", ["label"])["label"].to_pylist()
        featurized = run.finished("featurize")
        self.features, self.nonzeros = featurized["terms"], featurized["nonzeros"]
        self.rows = run.finished("split")["documents"]["train"]
        self.late = True  # whether train.budget counts
        self.earlier = earlier_run(cfg.train.warm_start, run) if cfg.train.warm_start else None

    def arranged(self, only: Iterable[int] | None = None) -> list[list[int]]:
        """Blocks of all labels, or of some, by expected cost."""
        per_block = self.cfg.train.labels_per_block
        groups = placement.label_groups(self.support, per_block, None if only is None else list(only))
        known = learned_seconds(self.earlier, self.names) if self.earlier else None
        costs = [placement.expected_cost(self.support, group, known) for group in groups]
        labels = sum(map(len, groups))
        return placement.blocks(groups, costs, -(-labels // per_block))

    def planned(self, only: list[int] | None = None) -> list[list[int]]:
        """The blocks of this attempt: arranged once, so that a resumed run has the same."""
        wanted = list(range(len(self.names))) if only is None else only
        path = self.attempt / "blocks.json"
        try:
            plan = json.loads(path.read_text())
            if sorted(label for block in plan for label in block) == wanted:
                return plan
        except (OSError, ValueError, TypeError):
            pass
        plan = self.arranged(only)
        write_json(path, plan)
        return plan

    def solved(self, tasks: list[tuple[int, list[int]]]) -> tuple[list[dict], int]:
        """Facts of each block, and how many were done before; the others are solved now."""
        done = {number: found for number, _ in tasks if (found := finished_block(self.attempt, number))}
        resumed = len(done)
        if done:
            log.info("train: %d of %d blocks are done already", resumed, len(tasks))
        missing = [task for task in tasks if task[0] not in done]
        done.update(zip((number for number, _ in missing), self.solve(missing), strict=True))
        return [done[number] for number, _ in tasks], resumed

    def solve(self, tasks: list[tuple[int, list[int]]]) -> list[dict]:
        """Facts of each block, solved by one Spark job."""
        if not tasks:
            return []
        cfg, run = self.cfg, self.run
        self._refuse_too_large()
        positive, negative = label_weights(cfg.train.label_weights, self.names)
        earlier = self.earlier
        shared = self.spark.sparkContext.broadcast(
            {
                "cache_dir": cfg.spark.cache_dir,
                "key": self.key,
                "feature_files": [str(p) for p in run.files("features")],
                "fold_files": [str(p) for p in run.files("folds")],
                "document_files": [str(p) for p in run.files("documents")],
                "labels": self.names,
                "features": self.features,
                "extras": Extras(hashes(pa.array(self.names, pa.string()), "train"), positive, negative),
                "start": None
                if earlier is None
                else {
                    "model_files": [str(p) for p in earlier.files("label_models", verify=True)],
                    "earlier_names": earlier.read("labels", ["label"])["label"].to_pylist(),
                },
                "deadline": self.began + cfg.train.budget if cfg.train.budget and self.late else np.inf,
                "give_up": max(attempts(self.spark) - 1, 1),
                "job": uuid.uuid4().hex,
            }
        )
        labels = sum(len(block) for _, block in tasks)
        found: list[dict] = []
        try:
            found = run_tasks(
                self.spark,
                f"train: {labels:,} labels, block{'' if len(tasks) == 1 else 's'} {ranges([n for n, _ in tasks])}",
                _solver(shared, cfg.train),
                [(number, block, str(self.attempt)) for number, block in tasks],
            )
        finally:
            self._clean({(f["host"], f["folder"]) for f in found})
        return found

    def _refuse_too_large(self):
        """Stop before any work where the matrix and the workers do not fit a host."""
        matrix_size = placement.matrix_bytes(self.rows, self.nonzeros, int(self.support.sum()))
        worker = placement.worker_bytes(self.rows, self.features, len(candidates(self.cfg.train)))
        cache_dir = self.cfg.spark.cache_dir
        folder = host_folder(cache_dir, self.key)
        slots = self.spark.sparkContext.defaultParallelism
        if self.spark.sparkContext.master.startswith("local["):
            hosts = {socket.gethostname(): (free_memory(), free_disk(folder), folder.is_dir())}
        else:
            probes = run_tasks(self.spark, "train: look at the hosts", _probe, [(cache_dir, self.key)] * (2 * slots))
            hosts = {host: (memory, disk, there) for host, memory, disk, there in probes}
        each = -(-slots // len(hosts))
        for host, (memory, disk, there) in sorted(hosts.items()):
            needed = matrix_size + each * worker
            if needed > memory:
                raise ConfigError(
                    f"train needs {shown_bytes(needed)} of memory on {host}: {shown_bytes(matrix_size)} for the matrix "
                    f"({self.rows:,} documents, {self.nonzeros:,} non-zeros) and {shown_bytes(worker)} for each of "
                    f"{each} workers ({self.features:,} features); {shown_bytes(memory)} are free: fewer cores "
                    f"(--master local[N], spark.executor.cores), a smaller featurize.max_features "
                    f"(now {self.cfg.featurize.max_features:,}) or a larger featurize.min_df "
                    f"(now {self.cfg.featurize.min_df})"
                )
            if not there and matrix_size > disk:
                raise ConfigError(
                    f"train needs {shown_bytes(matrix_size)} of disk for the matrix in {folder.parent} on {host}; "
                    f"{shown_bytes(disk)} are free: set spark.cache_dir to a folder of a larger disk"
                )

    def _clean(self, used: set[tuple[str, str]]):
        """Remove the matrix from every host that had it; a host that takes no task any more keeps its copy."""
        here = host_folder(self.cfg.spark.cache_dir, self.key)
        clean(here)
        left = used - {(socket.gethostname(), str(here))}
        for _ in range(5):
            if not left:
                return
            count = 4 * self.spark.sparkContext.defaultParallelism
            left -= set(run_tasks(self.spark, "train: clean the hosts", _cleaner(self.cfg, self.key), [None] * count))
        log.warning("train: the matrix could not be removed from %s", ", ".join(sorted(f"{h}:{f}" for h, f in left)))

    def outcome(self, tables: dict[str, list[dict]], facts: list[dict], resumed: int) -> Outcome:
        """Weights by feature, and what is worth knowing of the whole."""
        models = [self.attempt / item["file"] for item in tables["label_models"]]
        statuses: dict[str, int] = {}
        largest = 0.0
        for path in models:
            part = read_table(path, columns=["status", "solver_gap"])
            for status in part["status"].to_pylist():
                statuses[status] = statuses.get(status, 0) + 1
            largest = max(largest, pc.max(part["solver_gap"]).as_py() or 0.0)
        _refuse_failures(self.attempt, statuses, len(self.names), self.cfg.train.max_failed)
        with filling(self.attempt) as folder:
            paths = Weights.build(folder, models, self.features, len(self.names))
            for path in paths:
                sync_file(path)
            tables["weights"] = [entry(path, folder, np.load(path, mmap_mode="r").shape[0]) for path in paths]
        builds = [f["folder"] for f in facts if f["built"]]
        return Outcome(
            tables,
            {
                "blocks": len(facts),
                "blocks_resumed": resumed,
                "statuses": statuses,
                "unfinished": sum(statuses.get(status, 0) for status in UNFINISHED),
                "nonzero_weights": tables["weights"][1]["rows"],
                "model_bytes": sum(item["bytes"] for item in tables["weights"]),
                "largest_gap": largest,
                "block_seconds": [round(f["seconds"], 2) for f in facts],
                "matrix_builds": {folder: builds.count(folder) for folder in sorted(set(builds))},
                "compile_seconds": round(max((f["compile_seconds"] for f in facts), default=0.0), 2),
                "first_block_seconds": round(min((f["first"] for f in facts), default=self.began) - self.began, 2),
            },
        )


def summary(facts: dict, rows: dict) -> str:
    statuses = facts["statuses"]
    constant = sum(count for status, count in statuses.items() if status.startswith("no_"))
    resumed = f", {facts['blocks_resumed']:,} of them from before" if facts["blocks_resumed"] else ""
    unfinished = f", {facts['unfinished']:,} not trained yet" if facts["unfinished"] else ""
    anew = f"{facts['solved_anew']:,} of " if "solved_anew" in facts else ""
    blocks = f"{facts['blocks']:,} block{'' if facts['blocks'] == 1 else 's'}"
    return (
        f"{anew}{rows['label_models']:,} labels in {blocks}{resumed}; {constant:,} constant, "
        f"{statuses.get('not_converged', 0):,} not converged{unfinished}, largest gap {facts['largest_gap']:.2g}, "
        f"{facts['nonzero_weights']:,} weights ({shown_bytes(facts['model_bytes'])}), "
        f"{rows['suspicious']:,} suspicious gold labels"
    )


def ranges(numbers: Sequence[int]) -> str:
    """Rising numbers for people; at most ten runs of them are told.

    >>> ranges([0, 1, 2, 5, 7, 8])
    '0-2, 5, 7-8'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    told = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs[:10])
    return told if len(runs) <= 10 else f"{told}, ..."


def finished_block(folder: Place, number: int) -> dict | None:
    """Facts of a block whose marker and files are whole and whose labels were all begun, else None."""
    marker = folder / f"block-{number:05d}.json"
    try:
        facts = json.loads(marker.read_text())
        whole = all(digest(folder / e["file"]) == e["sha256"] for e in facts["tables"].values())
        whole = whole and not any(status in UNFINISHED for status in facts["statuses"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return facts if whole else None


def learned_seconds(run: Run, names: list[str]) -> np.ndarray | None:
    """Seconds of each label in the training of `run`, (L,) float64, NaN where unknown; None where there was none.

    They stand in the markers of the blocks, and decide nothing but which groups share a task.
    """
    known: dict[str, float] = {}
    for marker in sorted((run.root / "train").glob("*/block-*.json")):
        try:
            for labels, seconds in json.loads(marker.read_text())["groups"]:
                known.update(dict.fromkeys(labels, seconds / max(len(labels), 1)))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return np.array([known.get(name, np.nan) for name in names]) if known else None


def earlier_run(path: str, run: Run) -> Run:
    """The run that `train.warm_start` names.  Raises ConfigError where its vocabulary is another one."""
    earlier = Run(path)
    columns = ["feature_id", "hash"]
    ours, theirs = (r.read("vocabulary", columns).sort_by("feature_id") for r in (run, earlier))
    if not ours.equals(theirs):
        raise ConfigError(
            f"train.warm_start is {shown(path)}: its vocabulary ({theirs.num_rows:,} terms) is not that of this run "
            f"({ours.num_rows:,}); expected the same: set featurize.vocabulary to the same folder"
        )
    return earlier


def label_weights(path: str, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Factors of C for positives and negatives of each label, (L,) float64 each, from `train.label_weights`.

    Raises InputError for a table that cannot be read, ConfigError for one that says something else than expected.
    """
    positive, negative = np.ones(len(names)), np.ones(len(names))
    if not path:
        return positive, negative
    try:
        if path.endswith(".parquet"):
            table = pq.read_table(path)
        else:
            text = pyarrow.csv.ConvertOptions(column_types={"label": pa.string()})
            table = pyarrow.csv.read_csv(path, convert_options=text)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"train.label_weights is {shown(path)}: cannot be read: {shown(str(error), 200)}") from error
    missing = {"label"} - set(table.column_names)
    other = set(table.column_names) - {"label", "positive", "negative"}
    if missing or other or table.num_columns == 1:
        raise ConfigError(
            f"{shown(path)}: columns {', '.join(map(shown, table.column_names))}; "
            "expected label, and positive or negative or both"
        )
    if not pa.types.is_string(table.schema.field("label").type):
        kind = table.schema.field("label").type
        raise ConfigError(f"{shown(path)}: the column label holds {shown(str(kind))}; expected strings")
    number = {name: label_id for label_id, name in enumerate(names)}
    seen = set()
    for row in table.to_pylist():
        label_id = number.get(row["label"])
        if label_id is None or label_id in seen:
            what = "is on no document" if label_id is None else "stands twice"
            raise ConfigError(f"{shown(path)}: label {shown(repr(row['label']))} {what}; remove the line")
        seen.add(label_id)
        for side, values in (("positive", positive), ("negative", negative)):
            value = row.get(side, 1.0)
            if not isinstance(value, int | float) or not 1e-4 <= value <= 1e4:
                raise ConfigError(
                    f"{shown(path)}: {side} of {shown(repr(row['label']))} is {shown(repr(value))}; "
                    "expected a number from 0.0001 to 10000 (factor of C)"
                )
            values[label_id] = value
    return positive, negative


def attempts(spark) -> int:
    """How often Spark tries a task."""
    context = spark.sparkContext
    if context.master.startswith("local["):
        inside = context.master[len("local[") : -1].split(",")
        return int(inside[1]) if len(inside) > 1 else 1
    return int(context.getConf().get("spark.task.maxFailures", "4"))


def _probe(task):
    cache_dir, key = task
    folder = host_folder(cache_dir, key)
    return socket.gethostname(), free_memory(), free_disk(folder), folder.is_dir()


def _cleaner(cfg, key):
    cache_dir = cfg.spark.cache_dir

    def cleaned(_):
        folder = host_folder(cache_dir, key)
        clean(folder)
        return socket.gethostname(), str(folder)

    return cleaned


def _solver(shared, cfg):
    def solve(task):
        from pyspark import TaskContext

        number, label_ids, attempt = task
        s = shared.value
        folder = host_folder(s["cache_dir"], s["key"])
        started = time.monotonic()
        compile_seconds = warm_up(folder.parent, cfg)
        built = shared_folder(folder, lambda part: _build(part, s))
        X, gold, start = matrix.open_shared(folder)
        opened = time.monotonic()
        groups: list[tuple[list[str], float]] = []
        first: list[float] = []

        def after_group(group, seconds):
            groups.append(([s["labels"][label_id] for label_id in group], round(seconds, 4)))
            first.append(time.time())

        def tried(*_):
            late = s["deadline"]
            return fit_block(label_ids, X, gold, cfg, s["extras"], start, lambda: time.time() > late, after_group)

        cause = _guilt(TaskContext.get().attemptNumber(), place(attempt) / f"trial-{number:05d}", s, tried)
        if cause:
            log.warning("block %d: %s", number, cause)
            tables = failed_block(label_ids, gold, cause)
        else:
            try:
                tables = tried()
            except Exception as error:
                log.warning("block %d failed: %s: %s", number, type(error).__name__, error)
                tables = failed_block(label_ids, gold, f"{type(error).__name__}: {error}")
        tables["suspicious"] = named(tables["suspicious"], s["labels"], folder)
        statuses: dict[str, int] = {}
        for status in tables["label_models"]["status"].to_pylist():
            statuses[status] = statuses.get(status, 0) + 1
        facts = {
            "tables": {name: write_part(place(attempt), name, tables[name], number) for name in BLOCK_TABLES},
            "statuses": statuses,
            "groups": groups,
            "seconds": time.monotonic() - opened,
            "seconds_to_map": opened - started,
            "compile_seconds": compile_seconds,
            "built": built,
            "host": socket.gethostname(),
            "folder": str(folder),
            "first": first[0] if first else time.time(),
        }
        write_json(place(attempt) / f"block-{number:05d}.json", facts)
        return facts

    return solve


def _guilt(before: int, crumb: Place, s: dict, work: Callable) -> str:
    """Why a block is not to be solved in this worker: it has ended a process of its own.  Empty where it has not.

    Workers that died before it may have been killed for nobody's fault.  So it is tried in a child process from the
    attempt before the last on; a crumb stays where that took the worker along, and the last attempt believes it.

    before: how often Spark has tried the block.
    """
    if before < max(s["give_up"] - 1, 1):
        return ""
    if before >= s["give_up"] and crumb.is_file() and crumb.read_text() == s["job"]:
        return "it ends its worker, and not alone; out of memory?"  # Spark would give up the whole run
    write_bytes(crumb, s["job"].encode())
    verdict = poison.alone(0, work, poison.Limits(seconds=0, memory=0))
    crumb.unlink(missing_ok=True)
    if verdict is None or verdict["reason"] not in ("oom", "worker_crash"):
        return ""
    # the same words every time, as they are part of the model: no measure, no number of attempts
    ended = "killed; out of memory?" if verdict["reason"] == "oom" else verdict["what"]
    return f"a process of its own was {ended}"


def named(doubts: pa.Table, labels: list[str], folder: Path) -> pa.Table:
    """The table `suspicious` from the learner's, whose rows are those of the matrix in `folder`."""
    names = matrix.named(folder, doubts["row"].to_numpy())
    label = [labels[label_id] for label_id in doubts["label_id"].to_pylist()]
    doubts = doubts.set_column(doubts.schema.get_field_index("row"), "row", names["row"])
    return conform(doubts.append_column("doc_id", names["doc_id"]).append_column("label", [label]), "suspicious")


def _build(folder, s):
    matrix.build(folder, s["feature_files"], s["fold_files"], s["document_files"], s["labels"], s["features"])
    if s["start"]:
        matrix.add_start(folder, s["start"]["model_files"], s["labels"], s["start"]["earlier_names"])


def _refuse_failures(attempt, statuses, labels, allowed):
    failed = {status: count for status, count in statuses.items() if status.startswith("failed")}
    count = sum(failed.values())
    if count > allowed:
        for marker in attempt.glob("block-*.json"):
            if any(status.startswith("failed") for status in json.loads(marker.read_text())["statuses"]):
                marker.unlink(missing_ok=True)
        raise DataError(
            f"{count} of {labels} labels failed ({shown(next(iter(failed)), 200)}); "
            f"at most train.max_failed = {allowed} may"
        )

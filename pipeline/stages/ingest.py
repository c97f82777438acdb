"""Ingest.

    input files  ->  documents (row, doc_id, text, labels, split), labels (label_id, label, support), rejects

Rows are in the order of (hash of doc_id, doc_id), whatever the order, number and partition of the input files:
everything later is deterministic because of it.  A record ends as a document or as a reject with a reason.
"""

import collections
import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import sources
from pipeline.errors import DataError, InputError, shown
from pipeline.session import cores
from pipeline.stages.parts import Outcome, hashes, map_tasks, run_tasks
from pipeline.stages.poison import told
from pipeline.storage import Place, on_this_host, place, read_table, replacing
from pipeline.store import write_part
from pipeline.tables import TABLES

PART_BYTES = 64 << 20  # of input for one part
ORDER_SEED = "order"
EXAMPLES = 3  # rejects that a message shows
KEYED = sources.RAW_SCHEMA.append(pa.field("key", pa.int64())).append(pa.field("bucket", pa.int32()))
CONTENT = ("text", "labels", "split")


def partitions(plan: sources.Plan, cfg) -> int:
    """Parts of the document tables: as configured, else by size and cores."""
    size = sum(bytes_ for _, bytes_, _ in plan.files)
    return cfg.spark.partitions or max(cores(cfg.spark.master), -(-size // PART_BYTES))


def ingest(
    spark, plan: sources.Plan, attempt: Place, cfg, need_labels: bool = True, convicted: Sequence[dict] = ()
) -> Outcome:
    """Read, check and order the documents; those with a verdict of `poison.listed` are rejected.

    Raises DataError (too many rejects, no label at all, too many labels) and InputError (no record at all).
    """
    parts = partitions(plan, cfg)
    spark.sparkContext.setJobDescription("ingest: read and order")
    counted = (
        map_tasks(spark, plan.splits, _reader(cfg.input, parts), _ddl(KEYED))
        .repartitionById(parts, "bucket")
        .sortWithinPartitions("key", "doc_id", "file", "position")
        .mapInArrow(_writer(str(attempt), {v["doc_id"]: v for v in convicted}), "part int, facts string")
        .collect()
    )
    done = {row["part"]: json.loads(row["facts"]) for row in counted}
    accepted = sum(f["documents"]["rows"] for f in done.values())
    reasons = sum((collections.Counter(f["reasons"]) for f in done.values()), collections.Counter())
    repairs = sum(f["repairs"] for f in done.values())
    total = accepted + sum(reasons.values())
    if total == 0:
        raise InputError(f"{shown(plan.files[0][0])} and {len(plan.files) - 1} more: no record; expected documents")
    labels = _label_table(
        sum((collections.Counter(f["labels"]) for f in done.values()), collections.Counter()), cfg.ingest
    )
    parts_of_rejects = [attempt / f["rejects"]["file"] for f in done.values()]
    _check(total, accepted, reasons, labels, cfg.ingest, need_labels, convicted, lambda: _first_of(parts_of_rejects))

    # rows are numbered across parts once all parts are counted
    offsets = np.cumsum([0] + [done[p]["documents"]["rows"] if p in done else 0 for p in range(parts)])
    documents = run_tasks(
        spark,
        "ingest: number the rows",
        _number,
        [(str(attempt), p, int(offsets[p]), done[p]["documents"]["file"]) for p in sorted(done)],
    )
    for facts in done.values():
        (attempt / facts["documents"]["file"]).unlink(missing_ok=True)
    tables = {
        "documents": documents,
        "labels": [write_part(attempt, "labels", labels, 0)],
        "rejects": [f["rejects"] for _, f in sorted(done.items())],
    }
    facts = {
        "records": total,
        "accepted": accepted,
        "rejected": dict(sorted(reasons.items())),
        "label_repairs": repairs,
        "input": [{"file": file, "bytes": size, "sha256": digest} for file, size, digest in plan.files],
        "ignored": [{"file": file, "reason": reason} for file, reason in plan.ignored],
    }
    return Outcome(tables, facts)


def summary(facts: dict, rows: dict) -> str:
    rejected = sum(facts["rejected"].values())
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in facts["rejected"].items())
    return f"{rows['documents']:,} documents, {rows['labels']:,} labels, {rejected:,} rejected" + (
        f" ({reasons})" if reasons else ""
    )


def _first_of(parts):
    """The first rejects by file and place, as they may stand in a message."""
    rows = [row for part in parts for row in read_table(part).slice(0, EXAMPLES).to_pylist()]  # each part is sorted
    rows.sort(key=lambda row: (row["file"], row["position"]))
    return "; the first are " + ", ".join(
        f"{shown(row['file'], 200)} at {row['position']} ({row['reason']}): {shown(row['sample'], 40)}"
        for row in rows[:EXAMPLES]
    )


def _check(total, accepted, reasons, labels, cfg, need_labels, convicted, first=lambda: ""):
    rejected = total - accepted
    worst = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    worst += f"; quarantined: {told(convicted)}" if convicted else ""
    if accepted == 0:
        raise DataError(
            f"all {total} records were rejected ({worst}){first()}; expected documents with doc_id and text"
        )
    if rejected > cfg.max_rejected * total:
        raise DataError(
            f"{rejected} of {total} records were rejected ({worst}){first()}; at most the share {cfg.max_rejected} may "
            "be: mend the input or raise ingest.max_rejected"
        )
    if need_labels and labels.num_rows == 0:
        raise DataError(
            f"none of {accepted} documents carries a label"
            + (f" that stands on at least {cfg.min_label_documents} documents" if cfg.min_label_documents > 1 else "")
            + "; expected labels to learn from: check input.labels"
        )
    if labels.num_rows > cfg.max_labels:
        raise DataError(f"{labels.num_rows} distinct labels; at most ingest.max_labels = {cfg.max_labels} are expected")


def _label_table(counts, cfg):
    kept = sorted(label for label, support in counts.items() if support >= cfg.min_label_documents)
    return pa.table(
        [
            pa.array(range(len(kept)), pa.int32()),
            pa.array(kept, pa.string()),
            pa.array([counts[k] for k in kept], pa.int64()),
        ],
        schema=TABLES["labels"].schema,
    )


def _reader(fmt, parts):
    def read(split):
        for batch in sources.read_split(split, fmt):
            # a reject may have no doc_id: it goes by where it stands
            place = pc.binary_join_element_wise(batch["file"], batch["position"].cast(pa.string()), ":")
            key = hashes(pc.coalesce(batch["doc_id"], place), ORDER_SEED)
            bucket = ((key >> np.uint64(32)) * np.uint64(parts) >> np.uint64(32)).astype(np.int32)
            signed = (key ^ np.uint64(1 << 63)).view(np.int64)  # same order as the unsigned hash
            yield pa.RecordBatch.from_arrays([*batch.columns, pa.array(signed), pa.array(bucket)], schema=KEYED)

    return read


def _writer(attempt, convicted):
    def write(batches):
        from pyspark import TaskContext

        part = TaskContext.get().partitionId()
        yield _write_sorted(batches, place(attempt), part, convicted)

    return write


STAGED = pa.schema([TABLES["documents"].schema.field(name) for name in ("doc_id", *CONTENT)])


def _write_sorted(batches, attempt: Place, part: int, convicted: dict[str, dict]) -> pa.RecordBatch:
    """Documents (without row numbers yet) and rejects of one part, whose records come sorted by doc_id."""
    reasons: collections.Counter[str] = collections.Counter()
    labels: collections.Counter[str] = collections.Counter()
    repairs, rows = 0, 0
    rejects = []
    staged = attempt / f"staged-{part:05d}.arrow"
    with replacing(staged) as path, pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, STAGED) as writer:
        for group in _whole_documents(batches):
            group, refused = _without_duplicates(group)
            group, quarantined = _without_convicted(group, convicted)
            for rejected in (refused, quarantined):
                rejects.append(rejected)
                reasons.update(rejected["reason"].to_pylist())
            repairs += pc.sum(group["label_repairs"]).as_py() or 0
            for value in pc.value_counts(pc.list_flatten(group["labels"])).to_pylist():
                labels[value["values"]] += value["counts"]
            # a document without a label list has no labels
            kept = group.select(STAGED.names)
            empty = pa.array([[]], pa.list_(pa.string()))
            filled = pc.if_else(pc.is_null(kept["labels"]), empty[0], kept["labels"])
            kept = kept.set_column(kept.schema.get_field_index("labels"), "labels", filled).cast(STAGED)
            rows += kept.num_rows
            writer.write_table(kept)
    refused = pa.concat_tables([TABLES["rejects"].schema.empty_table(), *rejects])
    facts = {
        "documents": {"file": staged.name, "rows": rows},
        "rejects": write_part(
            attempt, "rejects", refused.sort_by([("file", "ascending"), ("position", "ascending")]), part
        ),
        "reasons": reasons,
        "labels": labels,
        "repairs": repairs,
    }
    return pa.RecordBatch.from_pylist(
        [{"part": part, "facts": json.dumps(facts)}], schema=pa.schema([("part", pa.int32()), ("facts", pa.string())])
    )


def _whole_documents(batches):
    """Tables in which no doc_id continues in the next one."""
    held = KEYED.empty_table()
    for batch in batches:
        held = pa.concat_tables([held, pa.Table.from_batches([batch]).cast(KEYED)])
        if held.num_rows < 2:
            continue
        last = held["key"][-1]
        whole = pc.index(held["key"], last).as_py()  # sorted by key: the first row with the last key
        if whole:
            yield held.slice(0, whole)
            held = held.slice(whole).combine_chunks()
    if held.num_rows:
        yield held


def _without_duplicates(table):
    """Accepted rows with distinct doc_id, and rejects: of exact repetitions all but the first, of conflicts all."""
    bad = table.filter(pc.is_valid(table["reason"]))
    good = table.filter(pc.is_null(table["reason"]))
    refused = [bad.select(["file", "position", "reason", "sample"])]
    if len(pc.unique(good["doc_id"])) < good.num_rows:
        places = collections.defaultdict(list)
        for row, doc_id in enumerate(good["doc_id"].to_pylist()):
            places[doc_id].append(row)
        keep, marks = [], {}
        for rows in places.values():
            contents = good.select(CONTENT).take(rows).to_pylist() if len(rows) > 1 else []
            conflict = any(c != contents[0] for c in contents)
            if not conflict:
                keep.append(rows[0])
            for row in rows if conflict else rows[1:]:
                marks[row] = "id_conflict" if conflict else "duplicate"
        refused.append(_rejects(good.take(sorted(marks)), [marks[row] for row in sorted(marks)]))
        good = good.take(pa.array(sorted(keep), pa.int64()))  # there may be none
    return good, pa.concat_tables([r.cast(TABLES["rejects"].schema) for r in refused])


def _without_convicted(table, convicted):
    """Accepted rows without those that a later stage has convicted, and the latter as rejects."""
    if not convicted:
        return table, TABLES["rejects"].schema.empty_table()
    mine = pc.is_in(table["doc_id"], value_set=pa.array(convicted, pa.string()))
    found = table.filter(mine)
    verdicts = [convicted[doc_id] for doc_id in found["doc_id"].to_pylist()]
    notes = [f", {shown(v['what'], 150)} ({v['stage']})" for v in verdicts]
    return table.filter(pc.invert(mine)), _rejects(found, [v["reason"] for v in verdicts], notes)


def _rejects(table, reasons, notes=None):
    """Rows with a doc_id as rejects; a note goes behind the doc_id."""
    places = zip(table["doc_id"].to_pylist(), notes or [""] * table.num_rows, strict=True)
    samples = [f"doc_id {shown(doc_id, 150)}{note}" for doc_id, note in places]
    return pa.table(
        [table["file"], table["position"], pa.array(reasons, pa.string()), samples], TABLES["rejects"].schema
    )


def _number(task):
    attempt, part, offset, staged = task
    folder = place(attempt)

    def numbered():
        start = offset
        with on_this_host(folder / staged) as path, pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_file(source)
            for k in range(reader.num_record_batches):
                batch = pa.Table.from_batches([reader.get_batch(k)])
                yield batch.add_column(0, "row", pa.array(np.arange(start, start + batch.num_rows)))
                start += batch.num_rows

    return write_part(folder, "documents", numbered(), part)


def _ddl(schema):
    """An Arrow schema in Spark's words."""
    words = {pa.string(): "string", pa.int64(): "bigint", pa.int32(): "int", pa.list_(pa.string()): "array<string>"}
    return ", ".join(f"`{field.name}` {words[field.type]}" for field in schema)

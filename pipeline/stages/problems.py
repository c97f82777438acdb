"""Problems of the data, for the report.

near_duplicates, label_relations, suspicious, documents (text, labels)  ->  what a person should look at first
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.storage import read_table
from pipeline.store import Run
from pipeline.tables import TABLES

SHOWN = 10  # rows of each kind
EXCERPT = 300  # characters of a text


def data_problems(run: Run) -> dict:
    """The first rows of each table with texts and gold, and how many there are in all; see `report.render`.

    Empty for a run of before, which has not looked for problems.
    """
    split = run.finished("split")
    if "near_duplicates" not in split["tables"] or "suspicious" not in run.finished("train")["tables"]:
        return {}
    near, relations, suspicious = (
        run.read(name).sort_by(TABLES[name].order) for name in ("near_duplicates", "label_relations", "suspicious")
    )
    kinds = {kind: suspicious.filter(pc.equal(suspicious["kind"], kind)) for kind in ("missing", "wrong")}
    first = {kind: table.slice(0, SHOWN).to_pylist() for kind, table in kinds.items()}
    pairs = near.slice(0, SHOWN).to_pylist()
    doubted = [row for rows in first.values() for row in rows]
    seen = documents_at(run, {*(r["row"] for r in (*pairs, *doubted)), *(r["other_row"] for r in pairs)})
    return {
        "near_duplicates": split["near_duplicates"],
        "among": split["near_duplicates_among"],
        "similarity": split["recipe"]["settings"]["split.near_duplicates"],
        "equal": int(pc.sum(pc.equal(near["similarity"], 1.0)).as_py() or 0),
        "pairs": [{**pair, **seen[pair["row"]], "other_labels": seen[pair["other_row"]]["labels"]} for pair in pairs],
        "multi_class": split["multi_class"],
        "relations": relations.num_rows,
        "related": relations.slice(0, SHOWN).to_pylist(),
        "suspicious": {
            kind: {"count": kinds[kind].num_rows, "rows": [{**row, **seen[row["row"]]} for row in rows]}
            for kind, rows in first.items()
        },
    }


def documents_at(run: Run, rows: set[int]) -> dict[int, dict]:
    """Beginning of the text, and labels, of some rows; of `documents` only the parts that hold them are read."""
    wanted = np.array(sorted(rows), np.int64)
    found = {}
    stop = 0
    for path, item in zip(run.files("documents"), run.finished("ingest")["tables"]["documents"], strict=True):
        start, stop = stop, stop + item["rows"]
        here = wanted[(wanted >= start) & (wanted < stop)]
        if here.size:
            part = read_table(path, columns=["text", "labels"]).take(pa.array(here - start)).to_pylist()
            for row, document in zip(here.tolist(), part, strict=True):
                found[row] = {"text": document["text"][:EXCERPT], "labels": document["labels"]}
    return found
